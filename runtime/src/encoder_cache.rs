//! `EncoderCache`: what the encoder made of batches lately, within a number of bytes. Numbers alone: running the encoder for
//! what is not found is `Model`'s.
//!
//! # Design
//! Batches are kept whole, not row by row. How a row's states are rounded depends on how many rows and how much padding
//! stand beside it, so a row's states from another batch could change a result; those of the same batch cannot.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Hidden states of one batch, `rows · length · hidden_size` numbers.
pub(crate) type States = Arc<[f32]>;

/// Hidden states by the sources that they are of.
pub(crate) struct EncoderCache {
    most_bytes: usize,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    entries: HashMap<Sources, Entry>,
    bytes: usize,
    /// Counts uses; the entry of the least is the first to go.
    clock: u64,
}

/// The number of rows, their tokens, and their masks.
type Sources = (usize, Box<[i64]>, Box<[i64]>);

struct Entry {
    states: States,
    used: u64,
}

impl EncoderCache {
    /// An empty cache that never holds more than `most_bytes` of states and tokens.
    pub fn new(most_bytes: usize) -> EncoderCache {
        EncoderCache { most_bytes, kept: Mutex::default() }
    }

    /// What is known of a batch.
    pub fn get(&self, rows: usize, ids: &[i64], mask: &[i64]) -> Option<States> {
        let mut kept = self.kept();
        kept.clock += 1;
        let now = kept.clock;
        let entry = kept.entries.get_mut(&(rows, ids.into(), mask.into()))?;
        entry.used = now;
        Some(Arc::clone(&entry.states))
    }

    /// Keeps what the encoder made of a batch, in place of what was used longest ago.
    pub fn put(&self, rows: usize, ids: &[i64], mask: &[i64], states: &[f32]) {
        let bytes = size_of_val(ids) + size_of_val(mask) + size_of_val(states);
        if bytes > self.most_bytes {
            return;
        }
        let mut kept = self.kept();
        kept.clock += 1;
        let entry = Entry { states: states.into(), used: kept.clock };
        kept.bytes += bytes;
        if let Some(replaced) = kept.entries.insert((rows, ids.into(), mask.into()), entry) {
            kept.bytes -= size_of_val(ids) + size_of_val(mask) + size_of_val(&*replaced.states);
        }
        while kept.bytes > self.most_bytes {
            let oldest = kept.entries.iter().min_by_key(|(_, entry)| entry.used).map(|(sources, _)| sources.clone());
            let oldest = oldest.expect("bytes are of entries");
            if let Some(entry) = kept.entries.remove(&oldest) {
                kept.bytes -= size_of_val(&*oldest.1) + size_of_val(&*oldest.2) + size_of_val(&*entry.states);
            }
        }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // Nothing panics while it holds the lock, and what a lost entry costs is time.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of a source of one token with `numbers` states.
    fn bytes(numbers: usize) -> usize {
        2 * 8 + 4 * numbers
    }

    #[test]
    fn the_longest_unused_goes_first() {
        let cache = EncoderCache::new(2 * bytes(3));
        cache.put(1, &[1], &[1], &[1.0; 3]);
        cache.put(1, &[2], &[1], &[2.0; 3]);
        assert_eq!(cache.get(1, &[1], &[1]).as_deref(), Some([1.0; 3].as_slice()));
        cache.put(1, &[3], &[1], &[3.0; 3]);
        assert_eq!(cache.get(1, &[2], &[1]), None);
        assert!(cache.get(1, &[1], &[1]).is_some() && cache.get(1, &[3], &[1]).is_some());
    }

    #[test]
    fn no_more_is_kept_than_allowed() {
        let cache = EncoderCache::new(bytes(3));
        cache.put(1, &[1], &[1], &[1.0; 4]);
        assert_eq!(cache.get(1, &[1], &[1]), None, "larger than all of the cache");
        for _ in 0..3 {
            cache.put(1, &[1], &[1], &[1.0; 3]);
            assert_eq!(cache.kept().bytes, bytes(3), "the same again replaces itself");
        }
        cache.put(1, &[2], &[1], &[]);
        assert_eq!((cache.get(1, &[1], &[1]), cache.kept().bytes), (None, bytes(0)));
    }

    #[test]
    fn a_mask_or_a_shape_makes_another_batch() {
        let cache = EncoderCache::new(1000);
        cache.put(1, &[1, 2], &[1, 1], &[1.0]);
        assert_eq!(cache.get(1, &[1, 2], &[0, 1]), None);
        assert_eq!(cache.get(2, &[1, 2], &[1, 1]), None, "the same numbers in other rows");
    }
}
