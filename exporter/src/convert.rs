//! Numbers of one float type as another, chunk by chunk. Rounding is to nearest, ties to even; a number that the new type
//! cannot hold is an error, never an infinity.

use anyhow::{Result, bail};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use t5gemma_graphs::onnx::{Adjust, DType};

/// Appends to `out` the numbers in `bytes`, adjusted and rounded to `to`.
///
/// `scratch` holds the float32 form between two conversions and is reused from call to call.
///
/// # Errors
/// A finite number beyond the range of `to`.
pub fn convert(
    bytes: &[u8],
    (from, to): (DType, DType),
    adjust: Adjust,
    scratch: &mut Vec<f32>,
    out: &mut Vec<u8>,
) -> Result<()> {
    if from == to && adjust == Adjust::AsIs {
        out.extend_from_slice(bytes);
        return Ok(());
    }
    scratch.resize(bytes.len() / from.size(), 0.0);
    let pairs = || bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
    match from {
        DType::Float32 => {
            for (number, four) in scratch.iter_mut().zip(bytes.chunks_exact(4)) {
                *number = f32::from_le_bytes([four[0], four[1], four[2], four[3]]);
            }
        }
        DType::BFloat16 => {
            for (number, bits) in scratch.iter_mut().zip(pairs()) {
                *number = f32::from_bits(u32::from(bits) << 16);
            }
        }
        DType::Float16 => {
            let halves: Vec<f16> = pairs().map(f16::from_bits).collect();
            halves.convert_to_f32_slice(scratch);
        }
        DType::Int64 | DType::Bool => bail!("weights of {from} cannot be converted"),
    }
    if adjust == Adjust::OnePlus {
        scratch.iter_mut().for_each(|number| *number += 1.0);
    }
    round(scratch, to, out)
}

/// Appends `numbers` to `out`, rounded to `to`.
///
/// # Errors
/// A finite number beyond the range of `to`.
pub fn round(numbers: &[f32], to: DType, out: &mut Vec<u8>) -> Result<()> {
    match to {
        DType::Float32 => out.extend(numbers.iter().flat_map(|number| number.to_le_bytes())),
        DType::Float16 => {
            let mut halves = vec![f16::ZERO; numbers.len()];
            halves.convert_from_f32_slice(numbers);
            for (&number, half) in numbers.iter().zip(&halves) {
                if number.is_finite() && half.is_infinite() {
                    bail!("{number} does not fit float16 (largest 65504); use float32 or bfloat16");
                }
            }
            out.extend(halves.iter().flat_map(|half| half.to_le_bytes()));
        }
        DType::BFloat16 => out.extend(numbers.iter().flat_map(|&number| bf16::from_f32(number).to_le_bytes())),
        DType::Int64 | DType::Bool => bail!("weights cannot be {to}"),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn converted(numbers: &[f32], path: &[DType], adjust: Adjust) -> Result<Vec<f32>> {
        let mut bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        let mut from = DType::Float32;
        for &to in path {
            let mut out = Vec::new();
            convert(&bytes, (from, to), adjust, &mut Vec::new(), &mut out)?;
            (bytes, from) = (out, to);
        }
        let mut out = Vec::new();
        convert(&bytes, (from, DType::Float32), Adjust::AsIs, &mut Vec::new(), &mut out)?;
        Ok(out.chunks_exact(4).map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]])).collect())
    }

    #[test]
    fn rounding_is_to_nearest_even() {
        let cases: &[(&str, f32, DType, f32)] = &[
            ("bf16 tie to even, down", 1.0 + 1.0 / 256.0, DType::BFloat16, 1.0),
            ("bf16 tie to even, up", 1.0 + 3.0 / 256.0, DType::BFloat16, 1.0 + 4.0 / 256.0),
            ("bf16 keeps its own", -2.5, DType::BFloat16, -2.5),
            ("f16 tie to even", 2049.0, DType::Float16, 2048.0),
            ("f16 subnormal", 6e-8, DType::Float16, 5.960_464_5e-8),
        ];
        for &(name, number, dtype, expected) in cases {
            assert_eq!(converted(&[number], &[dtype], Adjust::AsIs).expect(name), [expected], "{name}");
        }
    }

    #[test]
    fn what_float16_cannot_hold_is_refused() {
        let error = converted(&[1.0, 70000.0], &[DType::Float16], Adjust::AsIs).expect_err("beyond 65504");
        assert!(error.to_string().contains("70000"), "{error}");
    }

    #[test]
    fn one_plus_is_added_in_float32() {
        let tiny = 1e-4;
        let path = [DType::Float32];
        assert_eq!(converted(&[tiny], &path, Adjust::OnePlus).expect("fits"), [1.0 + tiny]);
    }
}
