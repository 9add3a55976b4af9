//! `EncoderCache`: an LRU cache of the hidden states of encoded batches and of the features of images, limited in bytes.
//! `Model` runs the encoder and the vision tower for what is not in it.
//!
//! # Design
//! Batches are kept whole, not row by row. How a row's states are rounded depends on the number of rows and the padding
//! beside it, so a row's states from another batch could change a result; those of the same batch cannot.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::adapter::Adapter;
use crate::batch::Batch;
use crate::images::PixelValues;

/// Hidden states of one batch, `rows · length · hidden_size` numbers, or features of one image.
pub(crate) type States = Arc<[f32]>;

/// Hidden states by batch, and features by image.
pub(crate) struct EncoderCache {
    max_bytes: usize,
    entries: Mutex<Entries>,
}

#[derive(Default)]
struct Entries {
    by_key: HashMap<Key, Entry>,
    bytes: usize,
    /// Counts uses; the least recently used entry is evicted first.
    clock: u64,
}

#[derive(Clone, PartialEq, Eq, Hash)]
enum Key {
    Batch {
        /// The adapter that the states were computed with.
        adapter: Option<u64>,
        rows: usize,
        ids: Box<[i64]>,
        mask: Box<[i64]>,
        /// The images of all rows.
        images: Box<[[u8; 32]]>,
    },
    Image([u8; 32]),
}

impl Key {
    /// Of a batch whose sources have the same adapter or none.
    fn new(batch: &Batch) -> Key {
        Key::Batch {
            adapter: batch.adapters()[0].as_ref().map(Adapter::id),
            rows: batch.rows(),
            ids: batch.ids().into(),
            mask: batch.mask().into(),
            // The tokens say which row an image is of.
            images: batch.images().iter().flatten().map(PixelValues::digest).collect(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Key::Batch { ids, mask, images, .. } => size_of_val(&**ids) + size_of_val(&**mask) + size_of_val(&**images),
            Key::Image(digest) => size_of_val(digest),
        }
    }
}

struct Entry {
    states: States,
    used: u64,
}

impl EncoderCache {
    /// An empty cache that never holds more than `max_bytes` of states and tokens.
    pub fn new(max_bytes: usize) -> EncoderCache {
        EncoderCache { max_bytes, entries: Mutex::default() }
    }

    /// The hidden states of a batch, if they are cached.
    pub fn get(&self, batch: &Batch) -> Option<States> {
        self.find(&Key::new(batch))
    }

    /// Caches the hidden states of a batch, in place of the least recently used entries.
    pub fn put(&self, batch: &Batch, states: &[f32]) {
        self.insert(Key::new(batch), || states.into(), size_of_val(states));
    }

    /// The features of an image, if they are cached.
    pub fn features(&self, image: &PixelValues) -> Option<States> {
        self.find(&Key::Image(image.digest()))
    }

    /// Caches the features of an image, in place of the least recently used entries.
    pub fn put_features(&self, image: &PixelValues, features: &States) {
        self.insert(Key::Image(image.digest()), || features.clone(), size_of_val(&**features));
    }

    fn find(&self, key: &Key) -> Option<States> {
        let mut entries = self.entries();
        entries.clock += 1;
        let now = entries.clock;
        let entry = entries.by_key.get_mut(key)?;
        entry.used = now;
        Some(Arc::clone(&entry.states))
    }

    fn insert(&self, key: Key, states: impl FnOnce() -> States, bytes: usize) {
        let key_bytes = key.bytes();
        if key_bytes + bytes > self.max_bytes {
            return;
        }
        let mut entries = self.entries();
        entries.clock += 1;
        let entry = Entry { states: states(), used: entries.clock };
        entries.bytes += key_bytes + bytes;
        if let Some(replaced) = entries.by_key.insert(key, entry) {
            entries.bytes -= key_bytes + size_of_val(&*replaced.states);
        }
        while entries.bytes > self.max_bytes {
            let oldest = entries.by_key.iter().min_by_key(|(_, entry)| entry.used).map(|(key, _)| key.clone());
            let oldest = oldest.expect("bytes are of entries");
            if let Some(entry) = entries.by_key.remove(&oldest) {
                entries.bytes -= oldest.bytes() + size_of_val(&*entry.states);
            }
        }
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        // Nothing panics while it holds the lock, and a lost entry costs only time.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of a source of one token with `numbers` states.
    fn bytes(numbers: usize) -> usize {
        2 * 8 + 4 * numbers
    }

    fn batch(rows: usize, ids: &[i64], mask: &[i64]) -> Batch {
        Batch::flat(rows, ids.to_vec(), mask.to_vec()).expect("a rectangle")
    }

    #[test]
    fn the_least_recently_used_entry_goes_first() {
        let cache = EncoderCache::new(2 * bytes(3));
        cache.put(&batch(1, &[1], &[1]), &[1.0; 3]);
        cache.put(&batch(1, &[2], &[1]), &[2.0; 3]);
        assert_eq!(cache.get(&batch(1, &[1], &[1])).as_deref(), Some([1.0; 3].as_slice()));
        cache.put(&batch(1, &[3], &[1]), &[3.0; 3]);
        assert_eq!(cache.get(&batch(1, &[2], &[1])), None);
        assert!(cache.get(&batch(1, &[1], &[1])).is_some() && cache.get(&batch(1, &[3], &[1])).is_some());
    }

    #[test]
    fn the_cache_stays_within_its_bytes() {
        let cache = EncoderCache::new(bytes(3));
        cache.put(&batch(1, &[1], &[1]), &[1.0; 4]);
        assert_eq!(cache.get(&batch(1, &[1], &[1])), None, "larger than the whole cache");
        for _ in 0..3 {
            cache.put(&batch(1, &[1], &[1]), &[1.0; 3]);
            assert_eq!(cache.entries().bytes, bytes(3), "the same again replaces itself");
        }
        cache.put(&batch(1, &[2], &[1]), &[]);
        assert_eq!((cache.get(&batch(1, &[1], &[1])), cache.entries().bytes), (None, bytes(0)));
    }

    #[test]
    fn images_are_kept_and_tell_batches_apart() {
        let image = |value: f32| PixelValues::new(1, vec![value; 3]).expect("three values");
        let with = |value: f32| batch(1, &[7], &[1]).with_images(vec![vec![image(value)]]).expect("one row");
        let cache = EncoderCache::new(1000);
        cache.put(&with(1.0), &[1.0]);
        assert_eq!(cache.get(&with(1.0)).as_deref(), Some([1.0].as_slice()));
        assert!(cache.get(&with(2.0)).is_none() && cache.get(&batch(1, &[7], &[1])).is_none());
        cache.put_features(&image(1.0), &[5.0, 6.0].into());
        assert_eq!(cache.features(&image(1.0)).as_deref(), Some([5.0, 6.0].as_slice()));
        assert_eq!(cache.features(&image(2.0)), None);
    }

    #[test]
    fn a_mask_or_a_shape_makes_another_batch() {
        let cache = EncoderCache::new(1000);
        cache.put(&batch(1, &[1, 2], &[1, 1]), &[1.0]);
        assert_eq!(cache.get(&batch(1, &[1, 2], &[0, 1])), None);
        assert_eq!(cache.get(&batch(2, &[1, 2], &[1, 1])), None, "the same numbers in other rows");
    }
}
