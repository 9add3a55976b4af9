//! Calls into libraries that read what strangers wrote: tokenizer files, chat templates, grammars. Where one of them panics,
//! the file or the request is at fault and gets an error; whatever comes next goes on.
//!
//! # Design
//! A panic is reported by the process's hook before it can be caught, and the hook is the host's: a library does not replace
//! it. Programs, and the C library, whose Rust runtime is its own, call [`silence_caught_panics`] once; other hosts see the
//! hook's report and then the error.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

thread_local! {
    /// Calls in progress whose panics become errors.
    static CALLS: Cell<usize> = const { Cell::new(0) };
}

/// Runs a call into a library; if it panics, the error says so in the library's words.
pub(crate) fn call<T>(library: &str, work: impl FnOnce() -> T) -> Result<T, String> {
    CALLS.set(CALLS.get() + 1);
    // What the call was working on is dropped or read-only.
    let done = catch_unwind(AssertUnwindSafe(work));
    CALLS.set(CALLS.get() - 1);
    done.map_err(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| text.to_string());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        // What was thrown may itself panic when it is dropped.
        std::mem::forget(panic);
        let text = text.unwrap_or_default();
        format!("the library {library} cannot take it and panicked: {}", text.lines().collect::<Vec<_>>().join(" "))
    })
}

/// Has panics that become errors not be reported on stderr. It puts a hook before the process's own, which still sees
/// all others; for programs, not for libraries.
pub fn silence_caught_panics() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |panic| {
            if CALLS.try_with(Cell::get).unwrap_or(0) == 0 {
                before(panic);
            }
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_and_the_next_call_goes_on() {
        let found: Result<(), String> = call("x", || panic!("at {}\nof two lines", 5));
        assert_eq!(found, Err("the library x cannot take it and panicked: at 5 of two lines".into()));
        assert_eq!(CALLS.get(), 0);
        assert_eq!(call("x", || 5), Ok(5));
    }
}
