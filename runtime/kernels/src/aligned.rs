//! Memory that begins where a cache line does: to load a register takes twice as long where it lies across two lines.

use std::ops::{Deref, DerefMut};

use aligned_vec::{AVec, ConstAlign};

const LINE: usize = 64;

/// Numbers of which the first begins a cache line.
pub struct Aligned<T>(AVec<T, ConstAlign<LINE>>);

impl<T: Copy> Aligned<T> {
    /// Makes it so long, with this number where there was none: [`AVec::resize`], but as fast as memory is filled.
    pub fn resize(&mut self, length: usize, with: T) {
        let before = self.0.len();
        if length <= before {
            return self.0.truncate(length);
        }
        self.0.reserve(length - before);
        // SAFETY: room was made for so many, of which those from `before` on are written here.
        unsafe {
            let first = self.0.as_mut_ptr();
            for at in before..length {
                first.add(at).write(with);
            }
            self.0.set_len(length);
        }
    }
}

impl<T> Default for Aligned<T> {
    fn default() -> Self {
        Aligned(AVec::new(LINE))
    }
}

impl<T> Deref for Aligned<T> {
    type Target = AVec<T, ConstAlign<LINE>>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl<T> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}
