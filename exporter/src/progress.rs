//! [`Progress`]: how a caller follows an export or a download, and cancels it.

/// Follows an export or a download, and may cancel it. `()` does neither.
pub trait Progress: Sync {
    /// Called before `bytes` of weights are written or of files downloaded.
    fn started(&self, bytes: u64) {
        let _ = bytes;
    }

    /// Called after `bytes` more have been converted or downloaded.
    fn advanced(&self, bytes: u64) {
        let _ = bytes;
    }

    /// Called with remarks for people: why a download waits, and that it tries again.
    fn noted(&self, message: &str) {
        let _ = message;
    }

    /// Whether the export should end with [`Error::Cancelled`](crate::Error::Cancelled), or the download with its own
    /// error. Asked often, from several threads.
    fn is_cancelled(&self) -> bool {
        false
    }
}

impl Progress for () {}
