//! `Shared`: what the nodes of a session share.
//!
//! Scratch buffers grow with the tokens of a run. If each node had its own, a long source would need them once for every
//! layer, although ONNX Runtime computes one node at a time.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What nodes with the same parameters `K` share.
pub struct Shared<K, T>(Arc<Mutex<BTreeMap<K, OfNode<T>>>>);

/// What a node shares with others.
pub struct OfNode<T>(Arc<Mutex<T>>);

impl<K: Ord, T> Shared<K, T> {
    /// What the nodes with the parameters `key` share, made by `new` for the first of them.
    pub fn of(&self, key: K, new: impl FnOnce() -> T) -> OfNode<T> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(key).or_insert_with(|| OfNode(Arc::new(Mutex::new(new())))).clone()
    }
}

impl<T> OfNode<T> {
    pub fn lock(&self) -> MutexGuard<'_, T> {
        // Every run sizes the buffers anew, whatever a panic has left in them.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K, T> Default for Shared<K, T> {
    fn default() -> Self {
        Shared(Arc::default())
    }
}

impl<K, T> Clone for Shared<K, T> {
    fn clone(&self) -> Self {
        Shared(self.0.clone())
    }
}

impl<T> Clone for OfNode<T> {
    fn clone(&self) -> Self {
        OfNode(self.0.clone())
    }
}
