//! One attempt to reach the coordinator.

use crate::cluster::nodes::Address;
use crate::cluster::{secrets, wire};
use rank_protocol::RunDir;
use rank_protocol::agent::{Answer, Join};
use rank_protocol::frame::MAX_FRAME_BYTES;
use std::io::{Error, ErrorKind};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// A connection over which this node belongs to the run.
pub struct Connected {
    /// The conversation that it goes on with, or begins.
    pub conversation: u64,
    /// Newest message that the coordinator has taken in.
    pub taken: u64,
    /// The connection.
    pub stream: TlsStream<TcpStream>,
}

/// Connects once: `Err` within `Ok` where the coordinator refuses, for good.
pub async fn attempt(
    run: RunDir,
    given: Option<String>,
    mut join: Join,
) -> std::io::Result<Result<Connected, String>> {
    let (tls, name, token) = secrets::read(&run)?;
    join.token = token;
    let (address, connected) = match given {
        Some(given) => (given.clone(), TcpStream::connect(given).await),
        None => {
            let text = std::fs::read(run.coordinator())?;
            let Address { host, port, .. } = serde_json::from_slice(&text)?;
            (format!("{host}:{port}"), TcpStream::connect((host, port)).await)
        }
    };
    let socket =
        connected.map_err(|error| Error::new(error.kind(), format!("{address}: {error}")))?;
    let _ = socket.set_nodelay(true);
    if join.node.address.is_empty() {
        join.node.address = socket.local_addr()?.ip().to_string();
    }
    let mut stream = TlsConnector::from(tls).connect(name, socket).await?;
    wire::write(&mut stream, &join).await?;
    match wire::read(&mut stream, MAX_FRAME_BYTES).await? {
        Answer::Welcome { conversation, taken } => {
            Ok(Ok(Connected { conversation, taken, stream }))
        }
        // A coordinator that has just begun anew has another token than was read.
        Answer::Refused { reason } if secrets::read(&run)?.2 != join.token => {
            Err(Error::new(ErrorKind::PermissionDenied, reason))
        }
        Answer::Refused { reason } => Ok(Err(reason)),
    }
}
