//! The matrix multiplication for any processor.

use super::{Columns, Operands};

/// Unpacks each row of weights once for all rows of activations, into int16 whose products compilers add up in vector
/// registers.
pub fn multiply(operands: &Operands) {
    let Operands { x, w, bias, y, .. } = operands;
    let (blocks, size, bytes) = (w.blocks(), w.block_size, w.block_bytes());
    let mut unpacked = vec![0_i16; blocks * size];
    let mut column = |column: usize| {
        for (block, unpacked) in unpacked.chunks_exact_mut(size).enumerate() {
            let codes = &w.codes[(column * blocks + block) * bytes..][..bytes];
            let zero = w.zero_point(column, block) as i16;
            match w.bits {
                8 => unpacked.iter_mut().zip(codes).for_each(|(to, &code)| *to = i16::from(code) - zero),
                _ => {
                    for (pair, &codes) in unpacked.as_chunks_mut::<2>().0.iter_mut().zip(codes) {
                        *pair = [i16::from(codes & 15) - zero, i16::from(codes >> 4) - zero];
                    }
                }
            }
        }
        let scales = &w.scales[column * blocks..][..blocks];
        for row in operands.rows.clone() {
            let values = &x.values[row * blocks * size..][..blocks * size];
            let mut sum = 0.0;
            for ((values, weights), scale) in values.chunks_exact(size).zip(unpacked.chunks_exact(size)).zip(scales) {
                let products = values.iter().zip(weights).map(|(&x, &w)| i32::from(x) * i32::from(w));
                sum += products.sum::<i32>() as f32 * (scale * x.scales[row]);
            }
            // SAFETY: `super::multiply` checked rows and columns; its caller promises that no other thread has them.
            unsafe { *y.at(row, column) = sum + bias.map_or(0.0, |bias| bias[column]) };
        }
    };
    match &operands.columns {
        Columns::Range(columns) => columns.clone().for_each(column),
        Columns::Listed(columns) => columns.iter().copied().for_each(&mut column),
    }
}
