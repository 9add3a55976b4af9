//! `EncoderCache`: what the encoder made of sources lately, within a number of bytes. Rows are kept one by one and without
//! the padding that a batch gave them, so that a source is found again whatever stands beside it. Numbers alone: running the
//! encoder for what is not found is `Model`'s.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Hidden states of one source, `length · hidden_size` numbers.
pub(crate) type States = Arc<[f32]>;

/// Hidden states by the sources that they are of.
pub(crate) struct EncoderCache {
    most_bytes: usize,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    entries: HashMap<Source, Entry>,
    bytes: usize,
    /// Counts uses; the entry of the least is the first to go.
    clock: u64,
}

/// Tokens and mask of one source as it was given.
type Source = (Box<[i64]>, Box<[i64]>);

struct Entry {
    states: States,
    used: u64,
}

impl EncoderCache {
    /// An empty cache that never holds more than `most_bytes` of states and tokens.
    pub fn new(most_bytes: usize) -> EncoderCache {
        EncoderCache { most_bytes, kept: Mutex::default() }
    }

    /// What is known of a source.
    pub fn get(&self, ids: &[i64], mask: &[i64]) -> Option<States> {
        let mut kept = self.kept();
        kept.clock += 1;
        let now = kept.clock;
        let entry = kept.entries.get_mut(&(ids.into(), mask.into()))?;
        entry.used = now;
        Some(Arc::clone(&entry.states))
    }

    /// Keeps what the encoder made of a source, in place of what was used longest ago.
    pub fn put(&self, ids: &[i64], mask: &[i64], states: &[f32]) {
        let bytes = size_of_val(ids) + size_of_val(mask) + size_of_val(states);
        if bytes > self.most_bytes {
            return;
        }
        let mut kept = self.kept();
        kept.clock += 1;
        let entry = Entry { states: states.into(), used: kept.clock };
        kept.bytes += bytes;
        if let Some(replaced) = kept.entries.insert((ids.into(), mask.into()), entry) {
            kept.bytes -= size_of_val(ids) + size_of_val(mask) + size_of_val(&*replaced.states);
        }
        while kept.bytes > self.most_bytes {
            let oldest = kept.entries.iter().min_by_key(|(_, entry)| entry.used).map(|(source, _)| source.clone());
            let oldest = oldest.expect("bytes are of entries");
            if let Some(entry) = kept.entries.remove(&oldest) {
                kept.bytes -= size_of_val(&*oldest.0) + size_of_val(&*oldest.1) + size_of_val(&*entry.states);
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
        cache.put(&[1], &[1], &[1.0; 3]);
        cache.put(&[2], &[1], &[2.0; 3]);
        assert_eq!(cache.get(&[1], &[1]).as_deref(), Some([1.0; 3].as_slice()));
        cache.put(&[3], &[1], &[3.0; 3]);
        assert_eq!(cache.get(&[2], &[1]), None);
        assert!(cache.get(&[1], &[1]).is_some() && cache.get(&[3], &[1]).is_some());
    }

    #[test]
    fn no_more_is_kept_than_allowed() {
        let cache = EncoderCache::new(bytes(3));
        cache.put(&[1], &[1], &[1.0; 4]);
        assert_eq!(cache.get(&[1], &[1]), None, "larger than all of the cache");
        for _ in 0..3 {
            cache.put(&[1], &[1], &[1.0; 3]);
            assert_eq!(cache.kept().bytes, bytes(3), "the same again replaces itself");
        }
        cache.put(&[2], &[1], &[]);
        assert_eq!((cache.get(&[1], &[1]), cache.kept().bytes), (None, bytes(0)));
    }

    #[test]
    fn a_mask_makes_another_source() {
        let cache = EncoderCache::new(1000);
        cache.put(&[1, 2], &[1, 1], &[1.0]);
        assert_eq!(cache.get(&[1, 2], &[0, 1]), None);
    }
}
