//! Where other agents are let in: TLS, then the door's key, each within a time limit. What they may
//! do: bring a whole bundle, whose files have their checksums, and read bundles that are here.

use super::{Shelf, id_of};
use crate::cluster::secrets::is_token;
use crate::cluster::wire;
use checkpoint_format::bundle::{Bundle, BundleArrival, BundleManifest};
use checkpoint_format::checksum::Checksum;
use rank_protocol::bundle::{Ask, BundleId, Knock, MAX_KNOCK_BYTES, MAX_RANGES, Reply};
use rank_protocol::frame::MAX_FRAME_BYTES;
use std::cell::Cell;
use std::fs::File;
use std::io::{Error, ErrorKind, Result, Write};
use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::spawn_local;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// Longest time from a connection to a good first message.
const DOOR_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time in which a guest may ask nothing.
const SILENCE: Duration = Duration::from_secs(60);
/// Longest time in which nothing moves of what is on its way.
pub(super) const STILL: Duration = Duration::from_secs(5);
/// Guests at once; others wait.
const MAX_GUESTS: usize = 256;
/// Visitors that may be at the door at once, who have not shown its key.
pub(super) const MAX_AT_THE_DOOR: usize = 256;
/// Time between two warnings of visitors.
const QUIET: Duration = Duration::from_secs(10);
/// Bytes that are read and written at a time.
pub(super) const PIECE: usize = 256 << 10;

/// Who is at the door, and behind it.
struct Visitors {
    room: Arc<Semaphore>,
    at_the_door: Cell<usize>,
    quiet_until: Cell<Option<Instant>>,
    num_unsaid: Cell<u64>,
}

impl Visitors {
    /// Tells of what a visitor does wrong; not of every one, who may come as often as they like.
    fn complain(&self, from: SocketAddr, what: &dyn std::fmt::Display) {
        let now = Instant::now();
        if self.quiet_until.get().is_some_and(|until| now < until) {
            self.num_unsaid.set(self.num_unsaid.get() + 1);
            tracing::debug!("{from} at the door of this node's memory: {what}");
            return;
        }
        self.quiet_until.set(Some(now + QUIET));
        let unsaid = self.num_unsaid.take();
        tracing::warn!(
            "{from} at the door of this node's memory: {what} ({unsaid} like it before)"
        );
    }
}

/// Lets in whoever has the key. Whoever has not shown it takes no guest's place.
pub(super) async fn serve(listener: TcpListener, shelf: Rc<Shelf>) {
    let visitors = Rc::new(Visitors {
        room: Arc::new(Semaphore::new(MAX_GUESTS)),
        at_the_door: Cell::new(0),
        quiet_until: Cell::new(None),
        num_unsaid: Cell::new(0),
    });
    loop {
        let (socket, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!("another node cannot connect: {error}");
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        if visitors.at_the_door.get() >= MAX_AT_THE_DOOR {
            visitors.complain(from, &"turned away: too many show no key");
            continue;
        }
        visitors.at_the_door.set(visitors.at_the_door.get() + 1);
        let (shelf, visitors) = (Rc::clone(&shelf), Rc::clone(&visitors));
        spawn_local(async move {
            let entered = timeout(DOOR_TIMEOUT, enter(socket, &shelf, &visitors.room)).await;
            visitors.at_the_door.set(visitors.at_the_door.get() - 1);
            let stayed = match entered.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into())) {
                Ok((stream, _place)) => stay(stream, &shelf).await,
                Err(error) => Err(error),
            };
            if let Err(error) = stayed {
                visitors.complain(from, &error);
            }
        });
    }
}

/// An error where nothing moves.
pub(super) async fn in_time<T>(moves: impl Future<Output = Result<T>>) -> Result<T> {
    timeout(STILL, moves).await.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()))
}

/// A visitor shows the key, and has a guest's place once there is one.
async fn enter(
    socket: TcpStream,
    shelf: &Shelf,
    room: &Arc<Semaphore>,
) -> Result<(TlsStream<TcpStream>, OwnedSemaphorePermit)> {
    let _ = socket.set_nodelay(true);
    let mut stream = TlsAcceptor::from(shelf.tls()?.server).accept(socket).await?;
    let knock: Knock = wire::read(&mut stream, MAX_KNOCK_BYTES).await?;
    if !is_token(&knock.key, &shelf.key) {
        let reason = "the key is not that of this door".to_owned();
        let _ = wire::write(&mut stream, &Reply::Refused { reason: reason.clone() }).await;
        return Err(Error::new(ErrorKind::PermissionDenied, reason));
    }
    let place = Arc::clone(room).acquire_owned().await.map_err(Error::other)?;
    wire::write(&mut stream, &Reply::Go).await?;
    Ok((stream, place))
}

/// A guest asks, until it has what it wants.
async fn stay(mut stream: TlsStream<TcpStream>, shelf: &Rc<Shelf>) -> Result<()> {
    loop {
        let asked = timeout(SILENCE, wire::read::<Ask>(&mut stream, MAX_FRAME_BYTES)).await;
        match asked {
            Ok(Ok(ask)) => answer(&mut stream, ask, shelf).await?,
            // It has what it wanted.
            Err(_) => return Ok(()),
            Ok(Err(error)) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            Ok(Err(error)) => return Err(error),
        }
    }
}

async fn answer(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    ask: Ask,
    shelf: &Rc<Shelf>,
) -> Result<()> {
    let answered = match ask {
        Ask::Take { commit, manifest } => take(stream, (&commit, &manifest), shelf).await,
        Ask::Seal(id) => match seal(shelf, id) {
            Ok(reply) => return in_time(wire::write(stream, &reply)).await,
            Err(error) => Err(error),
        },
        Ask::Give { bundle, file, ranges } => give(stream, shelf, bundle, &file, &ranges).await,
    };
    if let Err(error) = &answered {
        let reason = error.to_string();
        let _ = in_time(wire::write(stream, &Reply::Refused { reason })).await;
    }
    answered
}

fn seal(shelf: &Shelf, id: BundleId) -> Result<Reply> {
    let (commit, manifest) = open(shelf, id)?.seal().map_err(Error::other)?;
    let text = |bytes| String::from_utf8(bytes).map_err(Error::other);
    Ok(Reply::Seal { commit: text(commit)?, manifest: text(manifest)? })
}

/// A bundle that is here.
fn open(shelf: &Shelf, id: BundleId) -> Result<Bundle> {
    if !shelf.has(id) {
        let what = format!("step {} of place {} is not here", id.step, id.place);
        return Err(Error::new(ErrorKind::NotFound, what));
    }
    Bundle::open(&shelf.path(id)).map_err(Error::other)
}

/// Takes a bundle in.
async fn take(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    (commit, manifest): (&str, &str),
    shelf: &Rc<Shelf>,
) -> Result<()> {
    let (commit, manifest) = (commit.as_bytes(), manifest.as_bytes());
    let checked =
        BundleManifest::sealed(&shelf.arriving, commit, manifest).map_err(Error::other)?;
    shelf.check_run(&checked)?;
    let id = id_of(&checked);
    if shelf.has(id) {
        return in_time(wire::write(stream, &Reply::Taken)).await;
    }
    // Before a folder is made for it: one of its name may be somebody else's.
    let _expected = shelf.expecting(id).map_err(Error::other)?;
    let mut arrival = BundleArrival::begin(&shelf.arriving, &shelf.bundles, commit, manifest)
        .map_err(Error::other)?;
    in_time(wire::write(stream, &Reply::Go)).await?;
    let files: Vec<(String, u64)> =
        arrival.manifest().files.iter().map(|(name, file)| (name.clone(), file.size)).collect();
    for (name, size) in files {
        let file = arrival.create(&name).map_err(Error::other)?;
        let checksum = receive(stream, &file, size).await?;
        arrival.wrote(&name, checksum).map_err(Error::other)?;
    }
    arrival.finish().map_err(Error::other)?;
    shelf.add(id);
    in_time(wire::write(stream, &Reply::Taken)).await
}

/// Writes what comes into a file, and returns its checksum.
async fn receive(
    stream: &mut (impl AsyncRead + Unpin),
    mut file: &File,
    size: u64,
) -> Result<Checksum> {
    let (mut checksum, mut left) = (Checksum::default(), size);
    let mut piece = vec![0; PIECE];
    while left > 0 {
        let most = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
        let count = in_time(stream.read(&mut piece[..most])).await?;
        if count == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        checksum = checksum.append(&piece[..count]);
        file.write_all(&piece[..count])?;
        left -= count as u64;
    }
    Ok(checksum)
}

/// Gives ranges of a file.
async fn give(
    stream: &mut (impl AsyncWrite + Unpin),
    shelf: &Shelf,
    id: BundleId,
    name: &str,
    ranges: &[[u64; 2]],
) -> Result<()> {
    let file = open(shelf, id)?.open_file(name).map_err(Error::other)?;
    let size = file.metadata()?.len();
    let whole = [[0, size]];
    let ranges = if ranges.is_empty() { &whole[..] } else { ranges };
    let are_there = ranges.iter().all(|[start, end]| start <= end && *end <= size);
    if ranges.len() > MAX_RANGES || !are_there {
        let what = format!("{} ranges, which are not all of {name}", ranges.len());
        return Err(Error::new(ErrorKind::InvalidInput, what));
    }
    let bytes = ranges.iter().fold(0u64, |sum, [start, end]| sum.saturating_add(end - start));
    in_time(wire::write(stream, &Reply::Bytes(bytes))).await?;
    for [start, end] in ranges {
        send(stream, &file, *start, *end).await?;
    }
    in_time(stream.flush()).await
}

/// Sends the bytes of a file from `start` to `end`.
pub(super) async fn send(
    stream: &mut (impl AsyncWrite + Unpin),
    file: &File,
    start: u64,
    end: u64,
) -> Result<()> {
    let mut piece = vec![0; PIECE];
    let mut at = start;
    while at < end {
        let count = usize::try_from(end - at).unwrap_or(PIECE).min(PIECE);
        file.read_exact_at(&mut piece[..count], at)?;
        in_time(stream.write_all(&piece[..count])).await?;
        at += count as u64;
    }
    Ok(())
}
