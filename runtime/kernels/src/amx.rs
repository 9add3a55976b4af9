//! The tiles of AMX, eight registers of sixteen rows of 64 bytes each.

use std::arch::asm;

/// Rows of a tile, and numbers of four bytes in each.
pub const SIDE: usize = 16;
/// Bytes of a row of a tile.
pub const WIDTH: usize = 64;

/// The thread's tiles, as they are configured while this lives: all of them as large as they can be.
pub struct Tiles;

impl Tiles {
    /// # Safety
    /// The processor has AMX, and this process may use it.
    pub unsafe fn configured() -> Tiles {
        /// See `LDTILECFG` in Intel's manual.
        #[repr(C, align(64))]
        struct Config {
            palette: u8,
            start_row: u8,
            reserved: [u8; 14],
            bytes_of_a_row: [u16; 16],
            rows: [u8; 16],
        }
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], bytes_of_a_row: [0; 16], rows: [0; 16] };
        for tile in 0..8 {
            (config.rows[tile], config.bytes_of_a_row[tile]) = (SIDE as u8, WIDTH as u16);
        }
        // SAFETY: the caller's.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly, preserves_flags)) };
        Tiles
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: they were configured. Tiles that are in use would be saved with every other register of the thread.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}
