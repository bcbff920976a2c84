//! Handles of one file: small numbers for objects, the lowest free one first, as the kernel gives them.

use pvgpu_protocol::Errno;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;

/// Handles for objects of one kind. Zero is none.
pub(super) struct Handles<T> {
    objects: BTreeMap<u32, Arc<T>>,
    /// Handles below `next` that were given back.
    free: BinaryHeap<Reverse<u32>>,
    /// Highest handle ever given out.
    last: u32,
}

impl<T> Default for Handles<T> {
    fn default() -> Self {
        Self {
            objects: BTreeMap::new(),
            free: BinaryHeap::new(),
            last: 0,
        }
    }
}

impl<T> Handles<T> {
    pub(super) fn get(&self, handle: u32) -> Option<Arc<T>> {
        self.objects.get(&handle).cloned()
    }

    /// The first object for which it holds.
    pub(super) fn find(&self, holds: impl Fn(&T) -> bool) -> Option<Arc<T>> {
        self.objects.values().find(|object| holds(object)).cloned()
    }

    /// A new handle: `ENOMEM` when all numbers are taken.
    pub(super) fn add(&mut self, object: Arc<T>) -> Result<u32, Errno> {
        let handle = match self.free.pop() {
            Some(Reverse(handle)) => handle,
            None => self.last.checked_add(1).ok_or(Errno::ENOMEM)?,
        };
        self.last = self.last.max(handle);
        self.objects.insert(handle, object);
        Ok(handle)
    }

    /// The handle that the object already has, or a new one.
    pub(super) fn find_or_add(&mut self, object: &Arc<T>) -> Result<u32, Errno> {
        let mut objects = self.objects.iter();
        match objects.find(|(_, other)| Arc::ptr_eq(other, object)) {
            Some((handle, _)) => Ok(*handle),
            None => self.add(object.clone()),
        }
    }

    pub(super) fn remove(&mut self, handle: u32) -> Option<Arc<T>> {
        let object = self.objects.remove(&handle)?;
        self.free.push(Reverse(handle));
        Some(object)
    }
}
