//! [`Progress`]: how a caller follows an export and cancels it.

/// Follows an export and may cancel it. `()` does neither.
pub trait Progress: Sync {
    /// Called once, before `bytes` of weights are written.
    fn started(&self, bytes: u64) {
        let _ = bytes;
    }

    /// Called after `bytes` more have been converted.
    fn advanced(&self, bytes: u64) {
        let _ = bytes;
    }

    /// Whether the export should end with [`Error::Cancelled`](crate::Error::Cancelled). Asked often, from several
    /// threads.
    fn is_cancelled(&self) -> bool {
        false
    }
}

impl Progress for () {}
