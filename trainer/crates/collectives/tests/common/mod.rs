//! What the tests on processes share: a store of files, by which the processes of one machine meet.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use torch_shim::ShimError;
use torch_shim::gloo::StoreBackend;

/// This process stops altogether, and runs again after so many seconds.
#[allow(dead_code, reason = "not each test that shares this file stops a process")]
pub fn stop_for(seconds: u32) {
    let own = std::process::id();
    let again = format!("sleep {seconds}; kill -CONT {own}");
    let mut waker = Command::new("sh").args(["-c", &again]).spawn().unwrap();
    Command::new("kill").args(["-STOP", &own.to_string()]).status().unwrap();
    waker.wait().unwrap();
}

/// A store of files, one a key.
pub struct Files(pub PathBuf);

impl Files {
    fn path(&self, key: &str) -> PathBuf {
        let name: String = key.bytes().map(|byte| format!("{byte:02x}")).collect();
        // Gloo's keys are long; a file's name is not.
        self.0.join(
            name.as_bytes()
                .chunks(200)
                .map(|c| String::from_utf8_lossy(c).into_owned())
                .collect::<PathBuf>(),
        )
    }
}

fn failed(error: &std::io::Error) -> ShimError {
    ShimError::Store(error.to_string())
}

fn write(path: &Path, value: &[u8]) -> std::io::Result<()> {
    let path = path.with_extension("value");
    let temporary =
        path.with_extension(format!("{}-{:?}", std::process::id(), std::thread::current().id()));
    std::fs::create_dir_all(path.parent().unwrap())?;
    std::fs::write(&temporary, value)?;
    std::fs::rename(temporary, path)
}

impl StoreBackend for Files {
    fn set(&self, key: &str, value: &[u8]) -> torch_shim::Result<()> {
        write(&self.path(key), value).map_err(|error| failed(&error))
    }

    fn get(&self, key: &str, timeout: Duration) -> torch_shim::Result<Vec<u8>> {
        self.wait(&[key.to_string()], timeout)?;
        std::fs::read(self.path(key).with_extension("value")).map_err(|error| failed(&error))
    }

    fn add(&self, key: &str, _delta: i64) -> torch_shim::Result<i64> {
        Err(ShimError::Store(format!("{key}: this store does not count")))
    }

    fn wait(&self, keys: &[String], timeout: Duration) -> torch_shim::Result<()> {
        let end = Instant::now() + timeout;
        while !self.check(keys)? {
            if Instant::now() > end {
                return Err(ShimError::Store(format!("{keys:?} did not come")));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn check(&self, keys: &[String]) -> torch_shim::Result<bool> {
        Ok(keys.iter().all(|key| self.path(key).with_extension("value").exists()))
    }

    fn delete(&self, key: &str) -> torch_shim::Result<bool> {
        Ok(std::fs::remove_file(self.path(key).with_extension("value")).is_ok())
    }
}
