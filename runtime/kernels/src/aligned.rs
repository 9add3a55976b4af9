//! `AlignedVec`: a vector aligned to a cache line, because a SIMD load that spans two lines takes twice as long.

use std::ops::{Deref, DerefMut};

use aligned_vec::{AVec, ConstAlign};

const CACHE_LINE: usize = 64;

/// A vector that begins at a cache line.
pub struct AlignedVec<T>(AVec<T, ConstAlign<CACHE_LINE>>);

impl<T: Copy> AlignedVec<T> {
    /// Resizes, filling new elements with `value`: [`AVec::resize`], which copies element by element, at the speed of a
    /// fill.
    pub fn resize(&mut self, length: usize, value: T) {
        let before = self.0.len();
        if length <= before {
            return self.0.truncate(length);
        }
        self.0.reserve(length - before);
        // SAFETY: the capacity is at least `length`, and the elements from `before` on are initialized before the
        // length includes them.
        unsafe {
            let first = self.0.as_mut_ptr();
            for at in before..length {
                first.add(at).write(value);
            }
            self.0.set_len(length);
        }
    }
}

impl<T> Default for AlignedVec<T> {
    fn default() -> Self {
        AlignedVec(AVec::new(CACHE_LINE))
    }
}

impl<T> Deref for AlignedVec<T> {
    type Target = AVec<T, ConstAlign<CACHE_LINE>>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl<T> DerefMut for AlignedVec<T> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resized_vector_keeps_its_elements_and_its_alignment() {
        let mut values = AlignedVec::default();
        for (length, value) in [(3, 1_u16), (70, 2), (5, 9), (6, 3)] {
            values.resize(length, value);
            assert_eq!((values.len(), values.as_ptr() as usize % CACHE_LINE), (length, 0));
        }
        assert_eq!(values[..], [1, 1, 1, 2, 2, 3]);
    }
}
