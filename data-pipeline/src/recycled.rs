//! Buffers that go back where they came from: memory fresh from the kernel costs a page fault for
//! every 4 KiB, which is more than it takes to decode the tokens that go there.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

/// Buffers that are kept for the next user, at the most.
const KEPT: usize = 64;

/// A new buffer is larger than asked for by this part, so that it fits the next, similar one too.
const SPARE: usize = 16;

type Shelf<T> = Arc<Mutex<Vec<Vec<T>>>>;

/// Lends buffers, and keeps those that come back. Clones share the buffers.
#[derive(Debug)]
pub struct Pool<T> {
    shelf: Shelf<T>,
}

impl<T> Clone for Pool<T> {
    fn clone(&self) -> Self {
        Pool { shelf: self.shelf.clone() }
    }
}

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Pool { shelf: Shelf::default() }
    }
}

impl<T> Pool<T> {
    /// An empty buffer, which comes back when it is dropped.
    pub fn lend(&self) -> Recycled<T> {
        let items = self.shelf.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Recycled { items: items.unwrap_or_default(), home: Some(self.shelf.clone()) }
    }
}

impl<T> Recycled<T> {
    /// Makes room for `count` items in all. A buffer that is too small is empty, so nothing of it
    /// is copied.
    pub fn make_room(&mut self, count: usize) {
        if self.items.capacity() < count && self.items.is_empty() {
            self.items = Vec::with_capacity(count + count / SPARE);
        }
    }
}

/// A vector that goes back to its [`Pool`], where it has one, when it is dropped.
#[derive(Debug)]
pub struct Recycled<T> {
    items: Vec<T>,
    home: Option<Shelf<T>>,
}

impl<T> Default for Recycled<T> {
    fn default() -> Self {
        Recycled { items: Vec::new(), home: None }
    }
}

impl<T: Clone> Clone for Recycled<T> {
    fn clone(&self) -> Self {
        Recycled { items: self.items.clone(), home: None }
    }
}

impl<T: PartialEq> PartialEq for Recycled<T> {
    fn eq(&self, other: &Self) -> bool {
        self.items == other.items
    }
}

impl<T: Eq> Eq for Recycled<T> {}

impl<T> Deref for Recycled<T> {
    type Target = Vec<T>;

    fn deref(&self) -> &Vec<T> {
        &self.items
    }
}

impl<T> DerefMut for Recycled<T> {
    fn deref_mut(&mut self) -> &mut Vec<T> {
        &mut self.items
    }
}

impl<T> AsRef<[T]> for Recycled<T> {
    fn as_ref(&self) -> &[T] {
        &self.items
    }
}

impl<T> Drop for Recycled<T> {
    fn drop(&mut self) {
        let Some(home) = &self.home else { return };
        let mut items = std::mem::take(&mut self.items);
        items.clear();
        let mut shelf = home.lock().unwrap_or_else(PoisonError::into_inner);
        if shelf.len() < KEPT {
            shelf.push(items);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Pool;

    #[test]
    fn a_buffer_comes_back_empty_with_its_memory() {
        let pool = Pool::default();
        let mut first = pool.lend();
        first.extend(0..1000);
        let (at, copy) = (first.as_ptr(), first.clone());
        drop(first);
        let second = pool.lend();
        assert_eq!((second.len(), second.as_ptr()), (0, at));
        assert!(second.capacity() >= 1000);
        drop(copy);
        assert_eq!(pool.lend().capacity(), 0, "a copy belongs to no pool");
    }
}
