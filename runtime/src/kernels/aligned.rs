//! Memory that begins where a cache line does: to load a register takes twice as long where it lies across two lines.

use std::ops::{Deref, DerefMut};

use aligned_vec::{AVec, ConstAlign};

const LINE: usize = 64;

/// Numbers of which the first begins a cache line.
pub struct Aligned<T>(AVec<T, ConstAlign<LINE>>);

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
