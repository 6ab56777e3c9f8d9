//! An object store for tests: moto's S3 server, out of `.python-tests`, behind a proxy that fails
//! on demand.

use crate::proxy::{Fault, Proxy};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// The bucket that is there.
pub const BUCKET: &str = "checkpoints";

/// The server and the proxy; the server ends when dropped.
pub struct ObjectStore {
    server: Child,
    upstream: SocketAddr,
    proxy: Proxy,
}

impl ObjectStore {
    /// Starts both, and makes the bucket.
    ///
    /// # Panics
    /// Where the server is not installed or does not start.
    pub fn start() -> Self {
        let packages = concat!(env!("CARGO_MANIFEST_DIR"), "/../.python-tests");
        assert!(Path::new(packages).is_dir(), "{packages} is missing: ops/setup --python-tests");
        let mut server = Command::new("python3")
            .args(["-m", "moto.server", "-H", "127.0.0.1", "-p", "0"])
            .env("PYTHONPATH", packages)
            .env("PYTHONUNBUFFERED", "1")
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("python3: {error}"));
        let Some(stderr) = server.stderr.take() else { panic!("no standard error") };
        let mut lines = BufReader::new(stderr).lines().map_while(Result::ok);
        let port = lines.find_map(|line| line.split_once("http://127.0.0.1:")?.1.parse().ok());
        let Some(port) = port else { panic!("moto does not say where it listens") };
        // It says something for each request.
        std::thread::spawn(move || lines.for_each(drop));
        let upstream = SocketAddr::from(([127, 0, 0, 1], port));
        let store = Self { server, upstream, proxy: Proxy::start(upstream) };
        let made = store.request("PUT", &format!("/{BUCKET}"));
        assert!(made.starts_with("HTTP/1.1 200") || made.starts_with("HTTP/1.0 200"), "{made}");
        store
    }

    /// What a process needs in its environment to reach the store.
    pub fn env(&self) -> [(&'static str, String); 5] {
        [
            ("AWS_ENDPOINT_URL", format!("http://{}", self.proxy.address)),
            ("AWS_ALLOW_HTTP", "true".to_owned()),
            ("AWS_ACCESS_KEY_ID", "test".to_owned()),
            ("AWS_SECRET_ACCESS_KEY", "test".to_owned()),
            ("AWS_REGION", "us-east-1".to_owned()),
        ]
    }

    /// What happens to requests from now on.
    pub fn set(&self, fault: Fault) {
        self.proxy.set(fault);
    }

    /// How many requests a fault has hit.
    pub fn fired(&self) -> u64 {
        self.proxy.fired()
    }

    /// The keys of all objects, in order.
    pub fn keys(&self) -> Vec<String> {
        let listing = self.request("GET", &format!("/{BUCKET}?list-type=2&max-keys=1000"));
        let parts = listing.split("<Key>").skip(1);
        let keys = parts.filter_map(|part| Some(part.split_once("</Key>")?.0.to_owned()));
        let mut keys: Vec<String> = keys.collect();
        keys.sort();
        keys
    }

    /// A request to the server itself; its answer as text.
    fn request(&self, method: &str, path: &str) -> String {
        let ask = || -> std::io::Result<String> {
            let mut server = TcpStream::connect(self.upstream)?;
            let head = "Host: 127.0.0.1\r\nContent-Length: 0\r\nConnection: close";
            write!(server, "{method} {path} HTTP/1.1\r\n{head}\r\n\r\n")?;
            let mut answer = Vec::new();
            server.read_to_end(&mut answer)?;
            Ok(String::from_utf8_lossy(&answer).into_owned())
        };
        ask().unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }
}

impl Drop for ObjectStore {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}
