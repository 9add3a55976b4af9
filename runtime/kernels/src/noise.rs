//! Reproducible numbers for tests and benchmarks.

/// A linear congruential generator (Numerical Recipes' constants).
pub struct Noise(u32);

impl Noise {
    pub fn new(seed: u32) -> Noise {
        Noise(seed)
    }

    /// 24 bits, of which the upper are the more random.
    pub fn next_bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.0 >> 8
    }

    /// A number between −1 and 1.
    pub fn next_f32(&mut self) -> f32 {
        self.next_bits() as f32 / 8_388_608.0 - 1.0
    }
}

/// `count` numbers between −1 and 1.
pub fn noise(count: usize, seed: u32) -> Vec<f32> {
    let mut noise = Noise::new(seed);
    (0..count).map(|_| noise.next_f32()).collect()
}

/// `count` numbers distributed about as a model's activations are: most small, some large.
#[cfg(test)]
pub fn long_tailed_noise(count: usize, seed: u32) -> Vec<f32> {
    let mut noise = Noise::new(seed);
    (0..count).map(|_| noise.next_f32() * noise.next_f32() * noise.next_f32()).collect()
}
