//! Converts numbers between float types, chunk by chunk. Rounding is to nearest, ties to even; a finite number beyond
//! the range of the new type is an error, never an infinity.

use half::f16;
use half::slice::HalfFloatSliceExt;
use t5gemma_graphs::onnx::{Adjust, DType};

/// A finite number beyond the range of float16, the only type narrower than those of checkpoints.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Overflow(pub f32);

/// The conversion of a tensor's numbers for the weights file.
#[derive(Clone, Copy, Debug)]
pub struct Conversion {
    /// The type in the checkpoint.
    pub from: DType,
    /// The type in the weights file.
    pub to: DType,
    /// The arithmetic between them.
    pub adjust: Adjust,
}

impl Conversion {
    /// Writes the numbers in `bytes`, converted, to `out`, which has just enough room.
    ///
    /// `scratch` holds the float32 values between two conversions and is reused from call to call.
    ///
    /// # Errors
    /// A finite number beyond the range of the new type.
    pub fn apply(self, bytes: &[u8], scratch: &mut Vec<f32>, out: &mut [u8]) -> Result<(), Overflow> {
        let Conversion { from, to, adjust } = self;
        if from == to && adjust == Adjust::AsIs {
            out.copy_from_slice(bytes);
            return Ok(());
        }
        scratch.resize(bytes.len() / from.size(), 0.0);
        to_float32(bytes, from, scratch);
        if adjust == Adjust::OnePlus {
            scratch.iter_mut().for_each(|number| *number += 1.0);
        }
        round(scratch, to, out)
    }
}

/// Writes the numbers in `bytes` to `numbers`, which has just enough room.
pub fn to_float32(bytes: &[u8], from: DType, numbers: &mut [f32]) {
    match from {
        DType::Float32 => each(bytes, numbers, f32::from_le_bytes),
        DType::BFloat16 => each(bytes, numbers, |pair| f32::from_bits(u32::from(u16::from_le_bytes(pair)) << 16)),
        DType::Float16 => {
            let mut halves = vec![f16::ZERO; numbers.len()];
            each(bytes, &mut halves, f16::from_le_bytes);
            halves.convert_to_f32_slice(numbers);
        }
        _ => unreachable!("`Tensor::float` returns no {from}"),
    }
}

/// Counts the NaNs and infinities in `bytes`.
pub fn count_not_finite(bytes: &[u8], from: DType) -> u64 {
    match from {
        DType::Float32 => count(bytes, |four| u32::from_le_bytes(four) & 0x7f80_0000 == 0x7f80_0000),
        DType::BFloat16 => count(bytes, |two| u16::from_le_bytes(two) & 0x7f80 == 0x7f80),
        DType::Float16 => count(bytes, |two| u16::from_le_bytes(two) & 0x7c00 == 0x7c00),
        _ => 0,
    }
}

/// Writes `numbers`, rounded to `to`, to `out`, which has just enough room.
///
/// # Errors
/// A finite number beyond the range of float16.
pub fn round(numbers: &[f32], to: DType, out: &mut [u8]) -> Result<(), Overflow> {
    let overflows = |number: &f32| number.is_finite() && f16::from_f32(*number).is_infinite();
    match round_to_infinity(numbers, to, out) {
        1.. if to == DType::Float16 => Err(Overflow(numbers.iter().copied().find(overflows).expect("one was counted"))),
        _ => Ok(()),
    }
}

/// Writes `numbers`, rounded to `to`, to `out`, which has just enough room. A number beyond the range of `to` becomes infinite; returns
/// the count of those that were not infinite before. bfloat16 gets a single NaN.
pub fn round_to_infinity(numbers: &[f32], to: DType, out: &mut [u8]) -> u64 {
    match to {
        DType::Float32 => {
            write(out, numbers, f32::to_le_bytes);
            0
        }
        DType::Float16 => {
            let mut halves = vec![f16::ZERO; numbers.len()];
            halves.convert_from_f32_slice(numbers);
            write(out, &halves, f16::to_le_bytes);
            let pairs = numbers.iter().zip(&halves);
            pairs.filter(|(number, half)| half.is_infinite() && number.is_finite()).count() as u64
        }
        DType::BFloat16 => {
            write(out, numbers, |number| bfloat16(number).to_le_bytes());
            // From half a step behind the largest number on.
            let overflows = |number: &&f32| (0x7f7f_8000..0x7f80_0000).contains(&number.abs().to_bits());
            numbers.iter().filter(overflows).count() as u64
        }
        _ => unreachable!("unquantized weights are floats, not {to}"),
    }
}

/// The bits of the nearest bfloat16, of two the even one.
fn bfloat16(number: f32) -> u16 {
    let bits = number.to_bits();
    let odd = bits >> 16 & 1;
    if number.is_nan() { 0x7fc0 } else { (bits.wrapping_add(0x7fff + odd) >> 16) as u16 }
}

// Chunks of a constant size let the compiler vectorize these loops.

fn each<T, const N: usize>(bytes: &[u8], numbers: &mut [T], number: impl Fn([u8; N]) -> T) {
    for (place, bytes) in numbers.iter_mut().zip(bytes.as_chunks().0) {
        *place = number(*bytes);
    }
}

fn count<const N: usize>(bytes: &[u8], is_counted: impl Fn([u8; N]) -> bool) -> u64 {
    // 32-bit sums over parts too short to overflow them.
    let parts = bytes.as_chunks().0.chunks(1 << 20);
    parts.map(|part| u64::from(part.iter().map(|number| u32::from(is_counted(*number))).sum::<u32>())).sum()
}

fn write<T: Copy, const N: usize>(out: &mut [u8], numbers: &[T], bytes: impl Fn(T) -> [u8; N]) {
    for (place, &number) in out.as_chunks_mut().0.iter_mut().zip(numbers) {
        *place = bytes(number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn converted(numbers: &[f32], path: &[DType], adjust: Adjust) -> Result<Vec<f32>, Overflow> {
        let mut bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        let mut from = DType::Float32;
        for &to in path {
            let mut out = vec![0; numbers.len() * to.size()];
            Conversion { from, to, adjust }.apply(&bytes, &mut Vec::new(), &mut out)?;
            (bytes, from) = (out, to);
        }
        let mut out = vec![0; numbers.len() * 4];
        let back = Conversion { from, to: DType::Float32, adjust: Adjust::AsIs };
        back.apply(&bytes, &mut Vec::new(), &mut out)?;
        Ok(out.chunks_exact(4).map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]])).collect())
    }

    #[test]
    fn rounding_is_to_nearest_even() {
        let cases: &[(&str, f32, DType, f32)] = &[
            ("bf16 tie to even, down", 1.0 + 1.0 / 256.0, DType::BFloat16, 1.0),
            ("bf16 tie to even, up", 1.0 + 3.0 / 256.0, DType::BFloat16, 1.0 + 4.0 / 256.0),
            ("bf16 exact", -2.5, DType::BFloat16, -2.5),
            ("f16 tie to even", 2049.0, DType::Float16, 2048.0),
            ("f16 subnormal", 6e-8, DType::Float16, 5.960_464_5e-8),
        ];
        for &(name, number, dtype, expected) in cases {
            assert_eq!(converted(&[number], &[dtype], Adjust::AsIs).expect(name), [expected], "{name}");
        }
    }

    #[test]
    fn numbers_beyond_float16_are_refused() {
        assert_eq!(converted(&[1.0, 70000.0], &[DType::Float16], Adjust::AsIs), Err(Overflow(70000.0)));
    }

    #[test]
    fn numbers_out_of_range_become_infinite_and_are_counted() {
        let numbers =
            [70000.0, -65520.0, 65519.0, f32::INFINITY, f32::NAN, f32::MAX, f32::from_bits(0x7f7f_7fff), -f32::NAN];
        for (to, expected, count) in [
            (DType::Float16, [0x7c00_u16, 0xfc00, 0x7bff, 0x7c00, 0x7e00, 0x7c00, 0x7c00, 0xfe00], 4),
            (DType::BFloat16, [0x4789, 0xc780, 0x4780, 0x7f80, 0x7fc0, 0x7f80, 0x7f7f, 0x7fc0], 1),
        ] {
            let mut out = [0; 16];
            let found = round_to_infinity(&numbers, to, &mut out);
            assert_eq!((out.as_chunks().0, found), (&expected.map(u16::to_le_bytes)[..], count), "{to}");
        }
    }

    #[test]
    fn nans_and_infinities_are_counted() {
        let numbers = [1.0, f32::NAN, f32::MAX, f32::INFINITY, -0.0, f32::NEG_INFINITY, f32::MIN_POSITIVE];
        let halves = [0x7bff_u16, 0x7c00, 0xfc00, 0x7e01, 0, 0x03ff].map(u16::to_le_bytes).concat();
        let brains = [0x7f7f_u16, 0x7f80, 0xff80, 0x7fc1, 0, 0x7c00].map(u16::to_le_bytes).concat();
        assert_eq!(count_not_finite(&numbers.map(f32::to_le_bytes).concat(), DType::Float32), 3);
        assert_eq!(count_not_finite(&halves, DType::Float16), 3);
        assert_eq!(count_not_finite(&brains, DType::BFloat16), 3);
    }

    #[test]
    fn one_plus_is_added_in_float32() {
        let tiny = 1e-4;
        let path = [DType::Float32];
        assert_eq!(converted(&[tiny], &path, Adjust::OnePlus).expect("fits"), [1.0 + tiny]);
    }
}
