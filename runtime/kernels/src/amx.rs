//! The tile registers of AMX: eight registers of sixteen rows of 64 bytes each.

use std::arch::asm;

use crate::isa::AmxToken;

/// Rows of a tile, and 4-byte elements in each.
pub const SIDE: usize = 16;
/// Bytes in a row of a tile.
pub const WIDTH: usize = 64;

/// Configures this thread's tiles to their full size, until it is dropped.
pub struct TileConfig(());

impl TileConfig {
    pub fn load(_: AmxToken) -> TileConfig {
        /// The operand of `LDTILECFG`, see Intel's manual.
        #[repr(C, align(64))]
        struct Config {
            palette: u8,
            start_row: u8,
            reserved: [u8; 14],
            row_bytes: [u16; 16],
            rows: [u8; 16],
        }
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for tile in 0..8 {
            (config.rows[tile], config.row_bytes[tile]) = (SIDE as u8, WIDTH as u16);
        }
        // SAFETY: the token proves that the processor has AMX and that this process may use it; the operand is a valid
        // configuration.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly, preserves_flags)) };
        TileConfig(())
    }
}

impl Drop for TileConfig {
    fn drop(&mut self) {
        // Tiles in use are saved with the thread's other registers at every switch.
        // SAFETY: a `TileConfig` exists only where the processor has AMX.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}
