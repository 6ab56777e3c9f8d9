//! An etcd of a test's own: on free ports of the loopback, in a folder that goes with it.

use crate::sandbox::PATIENCE;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A running etcd; killed when dropped.
pub struct Etcd {
    child: Option<Child>,
    folder: tempfile::TempDir,
    port: u16,
    peer_port: u16,
    /// PEM files of its certificate and key, where it is reached over TLS.
    tls: Option<(PathBuf, PathBuf)>,
}

/// Where etcd is: on the PATH, or where `ops/setup --etcd` put it.
fn binary() -> PathBuf {
    let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.etcd/usr/bin/etcd");
    if ours.is_file() { ours } else { "etcd".into() }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    let address = listener.and_then(|listener| listener.local_addr());
    address.unwrap_or_else(|error| panic!("{error}")).port()
}

impl Etcd {
    /// A new one, empty.
    ///
    /// # Panics
    /// Where it cannot be started: run `ops/setup --etcd`.
    pub fn start() -> Self {
        Self::start_with(None)
    }

    /// A new one that is reached over TLS, with these PEM files of its certificate and key.
    ///
    /// # Panics
    /// As [`Etcd::start`].
    pub fn start_with_tls(certificate: PathBuf, key: PathBuf) -> Self {
        Self::start_with(Some((certificate, key)))
    }

    fn start_with(tls: Option<(PathBuf, PathBuf)>) -> Self {
        let folder = tempfile::tempdir().unwrap_or_else(|error| panic!("{error}"));
        let (port, peer_port) = (free_port(), free_port());
        let mut etcd = Self { child: None, folder, port, peer_port, tls };
        etcd.restart();
        etcd
    }

    /// What `restart.store` says.
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "etcds" } else { "etcd" };
        format!("{scheme}://127.0.0.1:{}/tests/phalanx", self.port)
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts it again, with what it had written.
    ///
    /// # Panics
    /// Where it does not listen in time.
    pub fn restart(&mut self) {
        self.kill();
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let clients = format!("{scheme}://127.0.0.1:{}", self.port);
        let peers = format!("http://127.0.0.1:{}", self.peer_port);
        let mut command = Command::new(binary());
        command.arg("--data-dir").arg(self.folder.path().join("data"));
        command.args(["--listen-client-urls", &clients, "--advertise-client-urls", &clients]);
        command.args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers]);
        command.args(["--initial-cluster", &format!("default={peers}"), "--log-level", "error"]);
        if let Some((certificate, key)) = &self.tls {
            command.arg("--cert-file").arg(certificate).arg("--key-file").arg(key);
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = child.spawn();
        self.child = Some(child.unwrap_or_else(|error| {
            panic!("{}: {error}; run ops/setup --etcd", binary().display())
        }));
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).is_err() {
            assert!(Instant::now() < deadline, "etcd does not listen at port {}", self.port);
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}
