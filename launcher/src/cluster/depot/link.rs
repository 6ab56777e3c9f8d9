//! A connection to another agent's door.

use super::door::{PIECE, in_time, send};
use crate::cluster::wire;
use checkpoint_format::bundle::Bundle;
use rank_protocol::bundle::{Ask, BundleId, Door, Knock, Reply};
use rank_protocol::frame::MAX_FRAME_BYTES;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use std::io::{Error, ErrorKind, Result};
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// What is trusted at a door, and the name to ask for.
pub(super) type Trusts = (Arc<ClientConfig>, ServerName<'static>);

/// One that is open.
pub(super) struct Link {
    stream: TlsStream<TcpStream>,
}

impl Link {
    /// Goes to a door.
    ///
    /// # Errors
    /// Where it cannot be reached in time, or does not open.
    pub(super) async fn open((tls, name): Trusts, door: &Door) -> Result<Link> {
        let opened = async {
            let socket = TcpStream::connect((door.host.as_str(), door.port)).await?;
            let _ = socket.set_nodelay(true);
            let stream = TlsConnector::from(tls).connect(name, socket).await?;
            let mut link = Link { stream };
            wire::write(&mut link.stream, &Knock { key: door.key.clone() }).await?;
            match link.reply().await? {
                Reply::Go => Ok(link),
                other => Err(unexpected(&other)),
            }
        };
        in_time(opened).await
    }

    async fn reply(&mut self) -> Result<Reply> {
        match in_time(wire::read(&mut self.stream, MAX_FRAME_BYTES)).await? {
            Reply::Refused { reason } => Err(Error::other(reason)),
            reply => Ok(reply),
        }
    }

    /// Has it take a bundle in.
    ///
    /// # Errors
    /// Why it does not.
    pub(super) async fn send(&mut self, bundle: &Bundle) -> Result<()> {
        let (commit, manifest) = bundle.seal().map_err(Error::other)?;
        let text = |bytes| String::from_utf8(bytes).map_err(Error::other);
        let ask = Ask::Take { commit: text(commit)?, manifest: text(manifest)? };
        in_time(wire::write(&mut self.stream, &ask)).await?;
        match self.reply().await? {
            Reply::Go => {}
            // It has it.
            Reply::Taken => return Ok(()),
            other => return Err(unexpected(&other)),
        }
        let sent = self.send_files(bundle).await;
        match (sent, self.reply().await) {
            (Ok(()), Ok(Reply::Taken)) => Ok(()),
            // What it says goes before what its closed connection looks like from here.
            (_, Err(error)) if error.kind() == ErrorKind::Other => Err(error),
            (Err(error), _) | (Ok(()), Err(error)) => Err(error),
            (Ok(()), Ok(other)) => Err(unexpected(&other)),
        }
    }

    async fn send_files(&mut self, bundle: &Bundle) -> Result<()> {
        for (name, entry) in &bundle.manifest().files {
            let file = bundle.open_file(name).map_err(Error::other)?;
            send(&mut self.stream, &file, 0, entry.size).await?;
        }
        in_time(self.stream.flush()).await
    }

    /// `COMMIT` and the manifest of a bundle.
    ///
    /// # Errors
    /// Why they do not come.
    pub(super) async fn seal(&mut self, id: BundleId) -> Result<(String, String)> {
        in_time(wire::write(&mut self.stream, &Ask::Seal(id))).await?;
        match self.reply().await? {
            Reply::Seal { commit, manifest } => Ok((commit, manifest)),
            other => Err(unexpected(&other)),
        }
    }

    /// Passes ranges of a file on to `take`, piece by piece: `expected` bytes in all.
    ///
    /// # Errors
    /// Why they do not come, or what `take` says.
    pub(super) async fn read(
        &mut self,
        (bundle, file): (BundleId, &str),
        ranges: Vec<[u64; 2]>,
        expected: u64,
        mut take: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let ask = Ask::Give { bundle, file: file.to_owned(), ranges };
        in_time(wire::write(&mut self.stream, &ask)).await?;
        match self.reply().await? {
            Reply::Bytes(bytes) if bytes == expected => {}
            other => return Err(unexpected(&other)),
        }
        let mut piece = vec![0; PIECE];
        let mut left = expected;
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
            let count = in_time(self.stream.read(&mut piece[..most])).await?;
            if count == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            take(&piece[..count])?;
            left -= count as u64;
        }
        Ok(())
    }
}

fn unexpected(reply: &Reply) -> Error {
    let what = match reply {
        Reply::Seal { .. } => "a seal".to_owned(),
        other => format!("{other:?}"),
    };
    Error::new(ErrorKind::InvalidData, format!("{what} is no answer to what was asked"))
}
