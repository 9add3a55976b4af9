//! Parallel work: who runs the tasks, how work is divided into them, and buffers that tasks write disjoint parts of.
//!
//! No threads are created here: tasks run on ONNX Runtime's thread pool in a session, on the calling thread in a test.

use std::marker::PhantomData;
use std::ops::Range;

use crate::error::Error;

/// Runs the tasks `0..count`, each once, possibly on several threads.
pub type ParallelFor<'p> = &'p dyn Fn(usize, &(dyn Fn(usize) + Send + Sync)) -> Result<(), Error>;

/// A [`ParallelFor`] that runs all tasks on the calling thread.
#[cfg(test)]
pub fn sequential(count: usize, task: &(dyn Fn(usize) + Send + Sync)) -> Result<(), Error> {
    (0..count).for_each(task);
    Ok(())
}

/// The size of equal parts of `count` items, none above `most`; the last part may be smaller.
#[cfg(target_arch = "x86_64")]
pub fn even_part(count: usize, most: usize) -> usize {
    count.div_ceil(count.div_ceil(most).max(1)).max(1)
}

/// The range of task `task`, where each takes `size` of `count` items and the last takes the rest.
#[inline]
pub fn part(task: usize, size: usize, count: usize) -> Range<usize> {
    task * size..count.min((task + 1) * size)
}

/// A slice that several threads write different parts of. All accesses go through the one pointer that it was made
/// with.
pub struct SharedSlice<'s, T> {
    start: *mut T,
    length: usize,
    borrowed: PhantomData<&'s mut [T]>,
}

impl<T> Clone for SharedSlice<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for SharedSlice<'_, T> {}

// SAFETY: it is a slice that is borrowed mutably; the callers of its unsafe methods promise that no two threads race
// for an element.
unsafe impl<T: Send> Send for SharedSlice<'_, T> {}
// SAFETY: as for `Send`: elements are only reached through the unsafe methods.
unsafe impl<T: Send> Sync for SharedSlice<'_, T> {}

impl<'s, T> SharedSlice<'s, T> {
    pub fn new(slice: &'s mut [T]) -> SharedSlice<'s, T> {
        SharedSlice { start: slice.as_mut_ptr(), length: slice.len(), borrowed: PhantomData }
    }

    pub fn len(self) -> usize {
        self.length
    }

    /// The first element. Whoever writes through it follows the rules of [`SharedSlice::slice_mut`].
    #[inline]
    pub fn as_mut_ptr(self) -> *mut T {
        self.start
    }

    /// # Safety
    /// Nobody writes to this range as long as the result lives.
    #[inline]
    pub unsafe fn slice(self, range: Range<usize>) -> &'s [T] {
        self.check(&range);
        // SAFETY: within the slice, by the check; the caller promises that nobody writes to it.
        unsafe { std::slice::from_raw_parts(self.start.add(range.start), range.len()) }
    }

    /// # Safety
    /// Nobody else reads or writes this range as long as the result lives.
    #[inline]
    pub unsafe fn slice_mut(self, range: Range<usize>) -> &'s mut [T] {
        self.check(&range);
        // SAFETY: within the slice, by the check; the caller promises that nobody else uses it.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    #[inline]
    fn check(self, range: &Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.length, "{range:?} of a slice of {}", self.length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_every_item_once() {
        // count, size, the first item of each part and the end of the last
        let cases: &[(usize, usize, &[usize])] =
            &[(0, 4, &[0]), (1, 4, &[0, 1]), (4, 4, &[0, 4]), (9, 4, &[0, 4, 8, 9])];
        for (count, size, expected) in cases {
            let parts = (0..count.div_ceil(*size)).map(|task| part(task, *size, *count));
            let expected = expected.windows(2).map(|bounds| bounds[0]..bounds[1]);
            assert!(parts.eq(expected), "{count} items by {size}");
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn even_parts_differ_in_the_last_alone() {
        // count, most, size of a part
        let cases = [(0, 12, 1), (1, 12, 1), (12, 12, 12), (13, 12, 7), (24, 12, 12), (25, 12, 9), (513, 512, 257)];
        for (count, most, expected) in cases {
            assert_eq!(even_part(count, most), expected, "{count} items, at most {most} in a part");
        }
    }

    #[test]
    fn threads_write_their_own_parts() {
        let mut values = vec![0; 100];
        let shared = SharedSlice::new(&mut values);
        std::thread::scope(|scope| {
            for task in 0..7 {
                scope.spawn(move || {
                    let range = part(task, 15, 100);
                    // SAFETY: the ranges of tasks do not overlap.
                    let values = unsafe { shared.slice_mut(range.clone()) };
                    values.iter_mut().zip(range).for_each(|(value, at)| *value = at);
                });
            }
        });
        assert!(values.iter().copied().eq(0..100));
    }

    #[test]
    #[should_panic(expected = "90..101 of a slice of 100")]
    fn a_range_beyond_the_end_panics() {
        let mut values = vec![0; 100];
        // SAFETY: nobody else uses the values.
        unsafe { SharedSlice::new(&mut values).slice_mut(90..101) };
    }
}
