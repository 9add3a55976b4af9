//! ONNX Runtime: the search next to this library, its log messages, and a report.

use std::collections::VecDeque;
use std::ffi::{CStr, OsStr, c_char, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, Once, PoisonError, RwLock};

use serde_json::{Value, json};
use t5gemma_runtime::log::{self, Severity};
use t5gemma_runtime::onnxruntime::{also_search, report};

use crate::boundary::fallible;
use crate::error::{c_string, t5g_error};
use crate::handle::Handle;
use crate::input::{Out, Text};
use crate::tokenizer::t5g_text;

type Log = extern "C" fn(*mut c_void, i32, *const c_char);

/// The caller's log function.
#[derive(Clone, Copy)]
struct Listener {
    severity: Severity,
    log: Log,
    user: *mut c_void,
}

// SAFETY: the header says that the log function is called from any thread, so the caller promises that it and `user`
// may be.
unsafe impl Send for Listener {}
// SAFETY: as above.
unsafe impl Sync for Listener {}

static LISTENER: RwLock<Option<Listener>> = RwLock::new(None);
static RECENT: Mutex<VecDeque<String>> = Mutex::new(VecDeque::new());
/// The number of messages that are kept.
const KEPT: usize = 64;

const SEVERITIES: [Severity; 5] =
    [Severity::Verbose, Severity::Info, Severity::Warning, Severity::Error, Severity::Fatal];

/// Registers the log function and the folder of this library, before ONNX Runtime is loaded.
pub fn prepare() {
    static DONE: Once = Once::new();
    DONE.call_once(|| {
        log::set(Severity::Warning, take);
        if let Some(folder) = own_folder() {
            also_search(folder);
        }
    });
}

/// Keeps a message and passes it to the caller's log function.
fn take(severity: Severity, message: &str) {
    if severity >= Severity::Warning {
        let mut recent = RECENT.lock().unwrap_or_else(PoisonError::into_inner);
        if recent.len() == KEPT {
            recent.pop_front();
        }
        recent.push_back(format!("{severity:?}: {}", message.replace('\n', " ")));
    }
    let listener = *LISTENER.read().unwrap_or_else(PoisonError::into_inner);
    if let Some(Listener { severity: least, log, user }) = listener
        && severity >= least
    {
        log(user, severity as i32, c_string(message).as_ptr());
    }
}

/// The folder of the library that this code was loaded from.
fn own_folder() -> Option<PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    // SAFETY: an all-zero Dl_info is valid, and dladdr fills it in for the address of a function.
    let name = unsafe {
        let mut found: libc::Dl_info = std::mem::zeroed();
        if libc::dladdr(own_folder as *const c_void, &mut found) == 0 || found.dli_fname.is_null() {
            return None;
        }
        CStr::from_ptr(found.dli_fname)
    };
    let path = Path::new(OsStr::from_bytes(name.to_bytes()));
    // Without resolving links: ONNX Runtime is installed beside the path that programs use.
    std::path::absolute(path).ok()?.parent().map(Path::to_path_buf)
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_log_set(severity: i32, log: Option<Log>, user: *mut c_void) -> Handle<t5g_error> {
    fallible(|| {
        let known = usize::try_from(severity).ok().and_then(|severity| SEVERITIES.get(severity));
        let severity = *known
            .ok_or_else(|| t5g_error::argument("severity", "T5G_SEVERITY_VERBOSE to _FATAL", severity.to_string()))?;
        prepare();
        let listener = log.map(|log| Listener { severity, log, user });
        *LISTENER.write().unwrap_or_else(PoisonError::into_inner) = listener;
        log::set(severity.min(Severity::Warning), take);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_log_recent(text: Out<Handle<t5g_text>>) -> Handle<t5g_error> {
    fallible(|| {
        let place = text.check("text")?;
        let recent = RECENT.lock().unwrap_or_else(PoisonError::into_inner);
        let lines: String = recent.iter().map(|line| format!("{line}\n")).collect();
        place.put(t5g_text::handle(lines));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_onnxruntime_report(library: Text, json: Out<Handle<t5g_text>>) -> Handle<t5g_error> {
    fallible(|| {
        let place = json.check("json")?;
        let library = library.optional("library")?.map(PathBuf::from);
        prepare();
        let report = report(library.as_deref());
        let shown = |path: &Path| path.to_string_lossy().into_owned();
        let places = report.searched.iter();
        let places: Vec<Value> = places
            .map(|place| json!({"why": place.why, "path": shown(&place.path), "found": place.found.to_string()}))
            .collect();
        let (library, error) = match &report.library {
            Ok(library) => {
                let providers = &library.providers;
                (json!({"path": shown(&library.path), "build": library.build, "providers": providers}), Value::Null)
            }
            Err(error) => (Value::Null, error.to_string().into()),
        };
        place.put(t5g_text::handle(json!({"places": places, "library": library, "error": error}).to_string()));
        Ok(())
    })
}
