//! Bilinear resizing with anti-aliasing, bit for bit as Pillow 13's `resize(…, BILINEAR)` does it: weights of 22 bits,
//! two passes, each rounded to bytes.

/// Bits of a weight behind the binary point.
const PRECISION_BITS: u32 = 32 - 8 - 2;
/// Half of the last bit of a byte.
const HALF: i32 = 1 << (PRECISION_BITS - 1);

/// A part of a picture.
#[derive(Clone, Copy)]
pub(super) struct Part<'p> {
    /// Rows of RGB.
    pub rgb: &'p [u8],
    /// Pixels of a whole row.
    pub stride: usize,
    pub left: usize,
    pub top: usize,
    pub width: usize,
    pub height: usize,
}

impl<'p> Part<'p> {
    fn row(&self, row: usize) -> &'p [u8] {
        &self.rgb[3 * ((self.top + row) * self.stride + self.left)..][..3 * self.width]
    }

    /// All of a picture with these rows.
    fn whole(rgb: &'p [u8], width: usize) -> Part<'p> {
        Part { rgb, stride: width, left: 0, top: 0, width, height: rgb.len() / (3 * width) }
    }
}

/// The part in another size.
pub(super) fn resize(part: Part, width: usize, height: usize) -> Vec<u8> {
    // As in Pillow: first the pass that leaves less to do for the second, where it is much less.
    let [fewer_rows, fewer_columns] =
        [(part.height, height), (part.width, width)].map(|(from, to)| from as i64 - to as i64);
    if fewer_rows > 0 && fewer_rows > 2 * fewer_columns {
        let rows = vertical(part, height);
        horizontal(Part::whole(&rows, part.width), width)
    } else {
        let columns = horizontal(part, width);
        vertical(Part::whole(&columns, width), height)
    }
}

/// What a pixel of the result is made of: consecutive pixels from `first` on, with these weights.
struct Taps {
    first: usize,
    weights: Vec<i32>,
}

/// The triangle filter, as wide as a pixel of the result where that is larger.
fn taps(from: usize, to: usize) -> Vec<Taps> {
    let scale = from as f64 / to as f64;
    let support = scale.max(1.0);
    let inverse = 1.0 / support;
    let of_pixel = |pixel: usize| {
        let center = (pixel as f64 + 0.5) * scale;
        // Converted towards zero.
        let first = (center - support + 0.5).max(0.0) as usize;
        let end = ((center + support + 0.5) as usize).min(from);
        let weight = |at: usize| (1.0 - ((at as f64 - center + 0.5) * inverse).abs()).max(0.0);
        let weights: Vec<f64> = (first..end).map(weight).collect();
        let sum: f64 = weights.iter().sum();
        let fixed = |weight: &f64| (0.5 + weight / sum * f64::from(1u32 << PRECISION_BITS)) as i32;
        Taps { first, weights: weights.iter().map(fixed).collect() }
    };
    (0..to).map(of_pixel).collect()
}

fn byte(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

fn horizontal(part: Part, width: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(3 * width * part.height);
    if part.width == width {
        (0..part.height).for_each(|row| out.extend_from_slice(part.row(row)));
        return out;
    }
    let taps = taps(part.width, width);
    for row in 0..part.height {
        let pixels = part.row(row);
        for Taps { first, weights } in &taps {
            let mut sums = [HALF; 3];
            for (pixel, weight) in pixels[3 * first..].chunks_exact(3).zip(weights) {
                for (sum, value) in sums.iter_mut().zip(pixel) {
                    *sum += i32::from(*value) * weight;
                }
            }
            out.extend(sums.map(byte));
        }
    }
    out
}

fn vertical(part: Part, height: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(3 * part.width * height);
    if part.height == height {
        (0..height).for_each(|row| out.extend_from_slice(part.row(row)));
        return out;
    }
    let mut sums = vec![0; 3 * part.width];
    for Taps { first, weights } in taps(part.height, height) {
        sums.fill(HALF);
        for (row, weight) in (first..).zip(weights) {
            for (sum, value) in sums.iter_mut().zip(part.row(row)) {
                *sum += i32::from(*value) * weight;
            }
        }
        out.extend(sums.iter().map(|sum| byte(*sum)));
    }
    out
}
