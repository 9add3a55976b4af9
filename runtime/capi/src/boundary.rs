//! The boundary between Rust and C: no panic crosses it, and results become error handles, values or codes.

use std::any::Any;
use std::ffi::{CStr, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use crate::error::{t5g_code, t5g_error};
use crate::handle::{Handle, Object};

impl Object for t5g_error {
    const NAME: &'static str = "t5g_error";
}

/// Runs the body of a function; a panic becomes an error.
pub fn guarded<T>(work: impl FnOnce() -> Result<T, t5g_error>) -> Result<T, t5g_error> {
    // The library has its own copy of the Rust runtime, so this replaces no panic hook of the host.
    t5gemma_runtime::silence_caught_panics();
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(of_panic(panic)))
}

fn of_panic(panic: Box<dyn Any + Send>) -> t5g_error {
    let text = panic.downcast_ref::<&str>().map(|text| text.to_string());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    // Dropping the payload may panic itself.
    std::mem::forget(panic);
    t5g_error::new(t5g_code::Internal, format!("a bug of t5gemma: {}", text.unwrap_or_else(|| "a panic".to_string())))
}

/// A function that returns a `t5g_error *`.
pub fn fallible(work: impl FnOnce() -> Result<(), t5g_error>) -> Handle<t5g_error> {
    match guarded(work) {
        Ok(()) => Handle::NULL,
        Err(error) => Handle::new(error),
    }
}

/// A function that returns a value, or `otherwise` on failure.
pub fn value<T>(otherwise: T, work: impl FnOnce() -> Result<T, t5g_error>) -> T {
    guarded(work).unwrap_or(otherwise)
}

/// A function that frees.
pub fn free<O: Object>(handle: Handle<O>, argument: &str) -> i32 {
    match guarded(|| handle.free(argument)) {
        Ok(()) => t5g_code::Ok as i32,
        Err(error) => error.code() as i32,
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_error_code(error: Handle<t5g_error>) -> i32 {
    value(t5g_code::Handle as i32, || Ok(error.get("error")?.code() as i32))
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_error_message(error: Handle<t5g_error>) -> *const c_char {
    const NONE: &CStr = c"no t5g_error, or one that was freed";
    value(NONE.as_ptr(), || Ok(error.get("error")?.message().as_ptr()))
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_error_field(error: Handle<t5g_error>) -> *const c_char {
    value(ptr::null(), || Ok(error.get("error")?.field().map_or(ptr::null(), CStr::as_ptr)))
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_error_retry_after(error: Handle<t5g_error>) -> f64 {
    value(0.0, || Ok(error.get("error")?.retry_after().as_secs_f64()))
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_error_free(error: Handle<t5g_error>) -> i32 {
    free(error, "error")
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Cup(u32);

    impl Object for Cup {
        const NAME: &'static str = "t5g_cup";
    }

    #[test]
    fn a_panic_breaks_the_objects_of_its_call_and_no_others() {
        let (used, other) = (Handle::new(Cup(1)), Handle::new(Cup(2)));
        let result = guarded(|| {
            let cup = used.get("used")?;
            assert_eq!(cup.0, 2, "this test's own bug");
            Ok(())
        });
        let error = result.expect_err("it panicked");
        assert!(error.text().contains("this test's own bug"), "{}", error.text());
        let error = used.get("used").err().expect("broken");
        assert!(error.text().contains("unknown state"), "{}", error.text());
        assert!(other.get("other").is_ok() && used.free("used").is_ok() && other.free("other").is_ok());
    }
}
