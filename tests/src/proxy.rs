//! A proxy before an HTTP server that fails on demand, and counts how often it did.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Longest head of a request.
const MAX_HEAD: usize = 64 << 10;

/// What happens to requests that change something (`PUT`, `POST`, `DELETE`) or, where it says so,
/// to all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// The answer is 503.
    Unavailable,
    /// The answer to any request is 503.
    UnavailableForAll,
    /// The answer to any request is 403, as to one whose key is not known.
    Forbidden,
    /// The answer comes so much later.
    Slow(Duration),
    /// No answer comes.
    Hang,
}

struct Shared {
    upstream: SocketAddr,
    fault: Mutex<Fault>,
    fired: AtomicU64,
}

/// The proxy; its threads end with the process.
pub struct Proxy {
    /// Where it listens.
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

impl Proxy {
    /// Before the server at `upstream`.
    ///
    /// # Panics
    /// Where there is no port for it.
    pub fn start(upstream: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
        let listener = listener.unwrap_or_else(|error| panic!("{error}"));
        let address = listener.local_addr().unwrap_or_else(|error| panic!("{error}"));
        let fault = Mutex::new(Fault::None);
        let shared = Arc::new(Shared { upstream, fault, fired: AtomicU64::new(0) });
        let accepting = shared.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let shared = accepting.clone();
                std::thread::spawn(move || {
                    // A client that goes away is none of a test's business.
                    let _ = serve(client, &shared);
                });
            }
        });
        Self { address, shared }
    }

    /// What happens from now on.
    pub fn set(&self, fault: Fault) {
        *self.shared.fault.lock().unwrap_or_else(PoisonError::into_inner) = fault;
    }

    /// How many requests a fault has hit.
    pub fn fired(&self) -> u64 {
        self.shared.fired.load(Ordering::SeqCst)
    }
}

/// One request: one connection here, one to the server.
fn serve(mut client: TcpStream, shared: &Shared) -> std::io::Result<()> {
    let (head, body) = request(&mut client)?;
    let method = head.split(' ').next().unwrap_or_default();
    let is_change = matches!(method, "PUT" | "POST" | "DELETE");
    let fault = *shared.fault.lock().unwrap_or_else(PoisonError::into_inner);
    let is_hit = match fault {
        Fault::None => false,
        Fault::UnavailableForAll | Fault::Forbidden => true,
        _ => is_change,
    };
    if is_hit {
        shared.fired.fetch_add(1, Ordering::SeqCst);
    }
    match fault {
        Fault::Unavailable | Fault::UnavailableForAll if is_hit => {
            let answer = "HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            return client.write_all(answer.as_bytes());
        }
        Fault::Forbidden => {
            let body = "<Error><Code>InvalidAccessKeyId</Code>\u{1b}[2J</Error>";
            let head = "HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Length:";
            let answer = format!("{head} {}\r\n\r\n{body}", body.len());
            return client.write_all(answer.as_bytes());
        }
        Fault::Hang if is_hit => {
            // Until the client has had enough.
            let _ = client.read(&mut [0; 1]);
            return Ok(());
        }
        Fault::Slow(pause) if is_hit => std::thread::sleep(pause),
        _ => {}
    }
    let mut server = TcpStream::connect(shared.upstream)?;
    server.write_all(head.as_bytes())?;
    server.write_all(&body)?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer)?;
    client.write_all(&answer)?;
    client.shutdown(Shutdown::Write)
}

/// The head, which asks for the connection to be closed, and the body.
fn request(client: &mut TcpStream) -> std::io::Result<(String, Vec<u8>)> {
    let mut bytes: Vec<u8> = Vec::new();
    let mut buffer = [0_u8; 16 << 10];
    let end = loop {
        if let Some(at) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break at + 4;
        }
        let read = client.read(&mut buffer)?;
        if read == 0 || bytes.len() > MAX_HEAD {
            return Err(std::io::ErrorKind::InvalidData.into());
        }
        bytes.extend_from_slice(&buffer[..read]);
    };
    let mut body = bytes.split_off(end);
    let text = String::from_utf8_lossy(&bytes);
    let is_of = |line: &&str, name: &str| {
        line.split_once(':').is_some_and(|(found, _)| found.eq_ignore_ascii_case(name))
    };
    let length = text.lines().find(|line| is_of(line, "content-length"));
    let length = length.and_then(|line| line.split_once(':')?.1.trim().parse().ok()).unwrap_or(0);
    while body.len() < length {
        let read = client.read(&mut buffer)?;
        if read == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        body.extend_from_slice(&buffer[..read]);
    }
    let kept = text.lines().filter(|line| !line.is_empty() && !is_of(line, "connection"));
    let lines: Vec<&str> = kept.chain(["Connection: close", "", ""]).collect();
    Ok((lines.join("\r\n"), body))
}
