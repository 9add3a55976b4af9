//! Keeps ONNX Runtime's telemetry off.
//!
//! # Design
//! ONNX Runtime 1.31 begins to record telemetry when its environment is created, before `DisableTelemetryEvents` can be
//! called: it makes a database of events under the user's cache folder and starts a thread that sends them. That thread
//! is never joined, and it reads strings that the end of the process destroys. Nobody who runs a model has asked for
//! either, and only the environment variable `ORT_DISABLE_TELEMETRY` prevents it.

/// The variable that ONNX Runtime reads; what a user has set stays.
const VARIABLE: &std::ffi::CStr = c"ORT_DISABLE_TELEMETRY";

/// Sets `ORT_DISABLE_TELEMETRY=1` in this process unless the variable is set; to be called before the environment of
/// ONNX Runtime is created.
#[cfg(unix)]
pub(crate) fn disable() {
    use std::ffi::{CStr, CString, c_char};
    use std::ptr;
    use std::sync::atomic::{AtomicPtr, Ordering};

    static ENTRIES: AtomicPtr<*mut c_char> = AtomicPtr::new(ptr::null_mut());

    /// Where the C library has the address of the environment's strings.
    fn environ() -> *mut *mut *mut c_char {
        #[cfg(target_vendor = "apple")]
        // SAFETY: it takes nothing and returns the address of a variable.
        return unsafe { libc::_NSGetEnviron() };
        #[cfg(not(target_vendor = "apple"))]
        {
            unsafe extern "C" {
                static mut environ: *mut *mut c_char;
            }
            &raw mut environ
        }
    }

    let is_ours = |entry: &CStr| {
        let rest = entry.to_bytes().strip_prefix(VARIABLE.to_bytes());
        rest.is_some_and(|rest| rest.first() == Some(&b'='))
    };
    let place = environ();
    let mut entries = Vec::new();
    // SAFETY: POSIX has `environ` point at an array of strings that ends with a null pointer, or be null. `setenv`,
    // which may move the array while it is read here, is not to be called by a program of several threads (POSIX,
    // 2.9.1).
    unsafe {
        let mut entry = place.read();
        while !entry.is_null() && !entry.read().is_null() {
            if is_ours(CStr::from_ptr(entry.read())) {
                return;
            }
            entries.push(entry.read());
            entry = entry.add(1);
        }
    }
    // Not `setenv`, which may free the array while another thread looks a variable up, as `localtime` does: the new
    // array takes its place whole, and neither is ever freed.
    let ours = [VARIABLE.to_bytes(), b"=1"].concat();
    entries.extend([CString::new(ours).expect("has no zero").into_raw(), ptr::null_mut()]);
    let entries = Box::leak(entries.into_boxed_slice()).as_mut_ptr();
    // Reachable also after a later `setenv` has replaced it, so that leak checkers do not report it.
    ENTRIES.store(entries, Ordering::Relaxed);
    // SAFETY: a pointer is stored in one piece, and it points at a whole array.
    unsafe { place.write(entries) };
}

/// Sets `ORT_DISABLE_TELEMETRY=1` in this process unless the variable is set; to be called before the environment of
/// ONNX Runtime is created.
#[cfg(not(unix))]
pub(crate) fn disable() {
    let name = VARIABLE.to_str().expect("ASCII");
    if std::env::var_os(name).is_none() {
        // SAFETY: other systems than Unix synchronise access to the environment.
        unsafe { std::env::set_var(name, "1") };
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn the_variable_is_set_beside_all_others() {
        let name = VARIABLE.to_str().expect("ASCII");
        let others = || std::env::vars_os().filter(|(key, _)| key != name).collect::<Vec<_>>();
        let before = others();
        disable();
        let first = std::env::var(name).expect("is set");
        disable();
        assert_eq!((std::env::var(name).as_deref(), others()), (Ok(first.as_str()), before));
        assert_eq!(std::env::vars_os().filter(|(key, _)| key == name).count(), 1);
    }
}
