//! How a caller follows an export and stops it.

use anyhow::Result;

/// Follows an export and may stop it.
pub trait Watch: Sync {
    /// `bytes` of weights are going to be written.
    fn started(&self, bytes: u64);
    /// `bytes` more of them have been.
    fn advanced(&self, bytes: u64);
    /// Returns an error when the export should stop.
    ///
    /// # Errors
    /// Whatever the export should end with.
    fn check(&self) -> Result<()>;
}

/// Follows nothing.
pub struct Silent;

impl Watch for Silent {
    fn started(&self, _: u64) {}
    fn advanced(&self, _: u64) {}
    fn check(&self) -> Result<()> {
        Ok(())
    }
}
