//! The launcher's rendezvous store, in the shape that Gloo asks for.

use rank_protocol::client::StoreClient;
use rank_protocol::store::StoreError;
use std::time::Duration;
use torch_shim::ShimError;
use torch_shim::gloo::StoreBackend;

/// A [`StoreClient`] as Gloo's store.
pub struct LauncherStore(pub StoreClient);

type Result<T> = std::result::Result<T, ShimError>;

fn told(error: StoreError) -> ShimError {
    ShimError::Store(error.to_string())
}

impl StoreBackend for LauncherStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        self.0.set(key, value).map_err(told)
    }

    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>> {
        self.0.get(key, timeout).map_err(told)
    }

    fn add(&self, key: &str, delta: i64) -> Result<i64> {
        self.0.add(key, delta).map_err(told)
    }

    fn wait(&self, keys: &[String], timeout: Duration) -> Result<()> {
        self.0.wait(keys, timeout).map_err(told)
    }

    fn check(&self, keys: &[String]) -> Result<bool> {
        self.0.check(keys).map_err(told)
    }

    fn delete(&self, key: &str) -> Result<bool> {
        self.0.delete(key).map_err(told)
    }
}
