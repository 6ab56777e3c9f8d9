//! Buffers that go back where they came from: memory fresh from the kernel costs a page fault for
//! every 4 KiB, which is more than it takes to decode the tokens that go there.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

/// A new buffer is larger than asked for by this part, so that it fits the next, similar one too.
const SPARE: usize = 16;

#[derive(Debug)]
struct Shelf<T> {
    /// Buffers that came back, the oldest first.
    free: Vec<Vec<T>>,
    /// Items that the buffers out and on the shelf have room for.
    room: usize,
    limit: usize,
}

/// Lends buffers, and keeps those that come back. Clones share the buffers.
#[derive(Debug)]
pub struct Pool<T> {
    shelf: Arc<Mutex<Shelf<T>>>,
}

impl<T> Clone for Pool<T> {
    fn clone(&self) -> Self {
        Pool { shelf: self.shelf.clone() }
    }
}

impl<T> Pool<T> {
    /// A pool that keeps no buffer while all of them, those in use included, have room for more
    /// than `limit` items.
    pub fn new(limit: usize) -> Self {
        Pool { shelf: Arc::new(Mutex::new(Shelf { free: Vec::new(), room: 0, limit })) }
    }

    /// An empty buffer for `count` items, which comes back when it is dropped. Of those on the
    /// shelf it is the smallest that fits, and never one of twice the size or more: small ones
    /// would hold the memory of large ones otherwise.
    pub fn lend(&self, count: usize) -> Recycled<T> {
        let mut shelf = self.shelf.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |items: &Vec<T>| (count..count.max(1) * 2).contains(&items.capacity());
        let fitting = (0..shelf.free.len()).filter(|&at| fits(&shelf.free[at]));
        let items = match fitting.min_by_key(|&at| shelf.free[at].capacity()) {
            Some(at) => shelf.free.swap_remove(at),
            None => {
                let items = Vec::with_capacity(count + count / SPARE);
                shelf.room += items.capacity();
                shelf.keep_within_limit();
                items
            }
        };
        Recycled { lent_room: items.capacity(), items, home: Some(self.shelf.clone()) }
    }
}

impl<T> Shelf<T> {
    fn keep_within_limit(&mut self) {
        while self.room > self.limit && !self.free.is_empty() {
            self.room -= self.free.remove(0).capacity();
        }
    }
}

/// A vector that goes back to its [`Pool`], where it has one, when it is dropped.
#[derive(Debug)]
pub struct Recycled<T> {
    items: Vec<T>,
    /// Its room when it was lent: it may have grown since.
    lent_room: usize,
    home: Option<Arc<Mutex<Shelf<T>>>>,
}

impl<T> Default for Recycled<T> {
    fn default() -> Self {
        Recycled { items: Vec::new(), lent_room: 0, home: None }
    }
}

impl<T: Clone> Clone for Recycled<T> {
    fn clone(&self) -> Self {
        Recycled { items: self.items.clone(), lent_room: 0, home: None }
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
        shelf.room = shelf.room - self.lent_room + items.capacity();
        shelf.free.push(items);
        shelf.keep_within_limit();
    }
}

#[cfg(test)]
mod tests {
    use super::Pool;

    #[test]
    fn a_buffer_comes_back_empty_with_its_memory() {
        let pool = Pool::new(10_000);
        let mut first = pool.lend(1000);
        first.extend(0..1000);
        let (at, copy) = (first.as_ptr(), first.clone());
        drop(first);
        let second = pool.lend(990);
        assert_eq!((second.len(), second.as_ptr()), (0, at));
        drop(copy);
        assert_ne!(pool.lend(1000).as_ptr(), at, "it is in use");
    }

    #[test]
    fn small_and_many_buffers_do_not_hold_more_than_the_limit() {
        let pool = Pool::<i32>::new(5000);
        drop(pool.lend(2000));
        assert!(pool.lend(10).capacity() < 20, "a large buffer is not for a few items");
        let held: Vec<_> = (0..4).map(|_| pool.lend(1000)).collect();
        let room = || pool.shelf.lock().unwrap().room;
        assert!(room() <= 5000, "the large one made way: {}", room());
        let more: Vec<_> = (0..4).map(|_| pool.lend(1000)).collect();
        assert!(room() > 5000, "what is in use is lent all the same");
        drop((held, more));
        assert!((3000..=5000).contains(&room()), "{}", room());
        let mut grown = pool.lend(1000);
        grown.resize(6000, 0);
        drop(grown);
        assert!(room() <= 5000, "{}", room());
    }
}
