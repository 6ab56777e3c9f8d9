//! What end-to-end tests share: a sandbox in which real `phalanx` processes run, a text to learn
//! from, an etcd of one's own, an object store that fails on demand, comparisons of what was
//! learned, and what ranks say that lose one.

pub mod etcd;
pub mod losses;
pub mod object_store;
pub mod proxy;
pub mod random;
pub mod sandbox;
pub mod survivors;
pub mod text;
