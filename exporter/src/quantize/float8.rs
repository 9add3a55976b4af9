//! Quantization to float8e4m3fn: 4 exponent bits, 3 mantissa bits, no infinities, one scale a matrix.
//!
//! # Design
//! The scale is the smallest power of two with which the largest element fits. Since elements keep 4 significant bits
//! under any scale, no other scale is more accurate, and a power of two is exact in every type that it is stored in.

use super::QuantizedRows;

/// The largest finite value.
const LARGEST: f32 = 448.0;
/// The smallest scale: float16's smallest normal number, whose inverse is finite in float16 too.
const SMALLEST_SCALE: f32 = 1.0 / 16384.0;

/// The code of the nearest value, ties to even; values beyond the largest saturate.
pub fn float8_code(x: f32) -> u8 {
    let sign = (x.to_bits() >> 24) as u8 & 0x80;
    if x.is_nan() {
        return sign | 0x7f;
    }
    let magnitude = x.abs().min(LARGEST);
    // Values from 2^e on, and all subnormals below 2^-6, are multiples of 2^(e-3).
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
    let steps = (magnitude * power_of_two(3 - exponent)).round_ties_even() as u8;
    // The implicit leading bit is the eighth step and carries into the code's exponent, which is 0 for subnormals.
    let code = (exponent + 6) as u8 * 8 + steps;
    sign | code
}

/// The scale of a matrix whose largest magnitude is `largest`.
pub fn float8_scale(largest: f32) -> f32 {
    let mut scale = SMALLEST_SCALE;
    while largest > LARGEST * scale {
        scale *= 2.0;
    }
    scale
}

/// Quantizes `rows` with one scale.
pub fn quantize_float8(rows: &[f32], scale: f32) -> QuantizedRows {
    QuantizedRows { codes: rows.iter().map(|&x| float8_code(x / scale)).collect(), ..QuantizedRows::default() }
}

/// 2 to the power of an exponent in float32's normal range.
fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits(((exponent + 127) as u32) << 23)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The values of the codes from 0 on, from Python's `ml_dtypes`.
    #[rustfmt::skip]
    const NUMBERS: [f32; 127] = [
        0.0, 0.001953125, 0.00390625, 0.005859375, 0.0078125, 0.009765625, 0.01171875, 0.013671875,
        0.015625, 0.017578125, 0.01953125, 0.021484375, 0.0234375, 0.025390625, 0.02734375, 0.029296875,
        0.03125, 0.03515625, 0.0390625, 0.04296875, 0.046875, 0.05078125, 0.0546875, 0.05859375,
        0.0625, 0.0703125, 0.078125, 0.0859375, 0.09375, 0.1015625, 0.109375, 0.1171875,
        0.125, 0.140625, 0.15625, 0.171875, 0.1875, 0.203125, 0.21875, 0.234375,
        0.25, 0.28125, 0.3125, 0.34375, 0.375, 0.40625, 0.4375, 0.46875,
        0.5, 0.5625, 0.625, 0.6875, 0.75, 0.8125, 0.875, 0.9375,
        1.0, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875,
        2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75,
        4.0, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5,
        8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0,
        16.0, 18.0, 20.0, 22.0, 24.0, 26.0, 28.0, 30.0,
        32.0, 36.0, 40.0, 44.0, 48.0, 52.0, 56.0, 60.0,
        64.0, 72.0, 80.0, 88.0, 96.0, 104.0, 112.0, 120.0,
        128.0, 144.0, 160.0, 176.0, 192.0, 208.0, 224.0, 240.0,
        256.0, 288.0, 320.0, 352.0, 384.0, 416.0, 448.0,
    ];

    #[test]
    fn every_value_has_its_code() {
        for (at, &number) in NUMBERS.iter().enumerate() {
            assert_eq!((float8_code(number), float8_code(-number)), (at as u8, at as u8 | 0x80), "{number}");
        }
        assert_eq!((float8_code(f32::NAN), float8_code(-f32::NAN)), (0x7f, 0xff));
    }

    #[test]
    fn rounding_is_to_nearest_even() {
        for (at, pair) in NUMBERS.windows(2).enumerate() {
            let (middle, at) = ((pair[0] + pair[1]) / 2.0, at as u8);
            let even = at + at % 2;
            let cases = [(middle.next_down(), at), (middle, even), (middle.next_up(), at + 1), (pair[0].next_up(), at)];
            for (number, expected) in cases {
                assert_eq!((float8_code(number), float8_code(-number)), (expected, expected | 0x80), "{number}");
            }
        }
    }

    #[test]
    fn values_beyond_the_range_saturate_or_become_zero() {
        for number in [448.0, 449.0, 464.0, 480.0, 1e9, f32::MAX, f32::INFINITY] {
            assert_eq!((float8_code(number), float8_code(-number)), (0x7e, 0xfe), "{number}");
        }
        for number in [0.0, f32::MIN_POSITIVE, 1e-42, 9.7e-4] {
            assert_eq!(float8_code(number), 0, "{number}");
        }
    }

    #[test]
    fn the_scale_is_the_smallest_that_fits_the_largest_number() {
        let cases: [(f32, f32); 8] = [
            (448.0, 1.0),
            (448.0_f32.next_up(), 2.0),
            (449.0, 2.0),
            (1.0, 1.0 / 256.0),
            (0.1, 1.0 / 4096.0),
            (0.0, SMALLEST_SCALE),
            (1e-9, SMALLEST_SCALE),
            (f32::MAX, 2.0_f32.powi(120)),
        ];
        for (largest, expected) in cases {
            assert_eq!(float8_scale(largest), expected, "{largest}");
        }
    }

    #[test]
    fn values_keep_four_significant_bits() {
        let rows: Vec<f32> = (0..4096).map(|at| ((at * 7919 % 4096) as f32 / 2048.0 - 1.0) * 0.37).collect();
        let scale = float8_scale(0.37);
        let quantized = quantize_float8(&rows, scale);
        let value = |code: u8| NUMBERS[usize::from(code & 0x7f)] * if code & 0x80 == 0 { 1.0 } else { -1.0 };
        for (&x, &code) in rows.iter().zip(&quantized.codes) {
            let (found, least) = (value(code) * scale, scale / 1024.0);
            assert!((found - x).abs() <= (x.abs() / 16.0).max(least), "{found} for {x}");
        }
    }
}
