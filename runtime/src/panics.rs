//! Calls into libraries that parse untrusted input: tokenizer files, chat templates, grammars. If one of them panics,
//! the file or the request gets an error, and everything else goes on.
//!
//! # Design
//! The process's hook reports a panic before it can be caught, and the hook belongs to the host: a library does not
//! replace it. Programs, and the C library, which has a Rust runtime of its own, call [`silence_caught_panics`] once;
//! other hosts see the hook's report and then the error.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

thread_local! {
    /// Calls in progress whose panics become errors.
    static CALLS: Cell<usize> = const { Cell::new(0) };
}

/// Runs a call into `library`; a panic becomes an error with its message.
pub(crate) fn catch<T>(library: &str, work: impl FnOnce() -> T) -> Result<T, String> {
    CALLS.set(CALLS.get() + 1);
    // What the call was working on is dropped or immutable.
    let done = catch_unwind(AssertUnwindSafe(work));
    CALLS.set(CALLS.get() - 1);
    done.map_err(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| text.to_string());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        // The payload may itself panic when it is dropped.
        std::mem::forget(panic);
        let text = text.unwrap_or_default();
        format!("the library {library} panicked: {}", text.lines().collect::<Vec<_>>().join(" "))
    })
}

/// Stops the report on stderr of panics that become errors. It installs a panic hook that calls the previous one for
/// all other panics; for programs, not for libraries.
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
        let found: Result<(), String> = catch("x", || panic!("at {}\nof two lines", 5));
        assert_eq!(found, Err("the library x panicked: at 5 of two lines".into()));
        assert_eq!(CALLS.get(), 0);
        assert_eq!(catch("x", || 5), Ok(5));
    }
}
