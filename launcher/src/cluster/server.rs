//! Lets agents in: TLS, then the run's token, each within a time limit.

use super::members::NodeId;
use super::nodes::Happening;
use super::secrets::{Secrets, is_token};
use super::wire;
use rank_protocol::agent::{Answer, Join, MAX_JOIN_BYTES, ToAgent};
use rank_protocol::session::Numbered;
use std::cell::Cell;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::spawn_local;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// Longest time from a connection to a good first message.
const DOOR_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections that may be at the door at once.
const MAX_AT_THE_DOOR: usize = 1024;

/// An agent that has shown the token and waits for an answer.
pub struct Arrival {
    /// What it said.
    pub join: Join,
    /// Where it came from.
    pub from: SocketAddr,
    /// The connection.
    pub door: Box<dyn Door>,
}

/// The connection of an agent that waits for an answer.
pub trait Door {
    /// Lets it in with this answer, sends again what was not taken in, and then what the returned
    /// queue is given; the connection ends when that is dropped. What comes is told as of this
    /// member and connection.
    fn open(
        self: Box<Self>,
        first: (Answer, Vec<Numbered<ToAgent>>),
        which: (NodeId, u64),
        happenings: mpsc::Sender<Happening>,
    ) -> mpsc::Sender<Numbered<ToAgent>>;

    /// This machine's address, as the agent reaches it.
    fn local_address(&self) -> Option<IpAddr>;

    /// Turns the agent away with this answer.
    fn close(self: Box<Self>, answer: Answer);
}

impl Door for TlsStream<TcpStream> {
    fn open(
        self: Box<Self>,
        (answer, again): (Answer, Vec<Numbered<ToAgent>>),
        (node, connection): (NodeId, u64),
        happenings: mpsc::Sender<Happening>,
    ) -> mpsc::Sender<Numbered<ToAgent>> {
        let said = move |frame| {
            let at = Instant::now();
            Happening::Said { node, connection, at, frame: Box::new(frame) }
        };
        let ended = move |why| Happening::Ended { node, connection, why };
        wire::talk(*self, (Some(answer), again), happenings, said, ended)
    }

    fn local_address(&self) -> Option<IpAddr> {
        self.get_ref().0.local_addr().ok().map(|local| local.ip())
    }

    fn close(mut self: Box<Self>, answer: Answer) {
        spawn_local(async move { wire::write(&mut *self, &answer).await });
    }
}

/// As many descriptors as this process may have: one a node, or one for each that reads here.
pub fn raise_limit() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = rustix::process::setrlimit(rustix::process::Resource::Nofile, raised) {
        tracing::debug!("the limit of descriptors stays {:?}: {error}", limit.current);
    }
}

/// Takes connections for as long as the receiver of `arrivals` lives.
pub async fn serve(listener: TcpListener, secrets: Secrets, arrivals: mpsc::Sender<Happening>) {
    raise_limit();
    let acceptor = TlsAcceptor::from(secrets.tls);
    let token: Rc<str> = secrets.token.into();
    let at_the_door = Rc::new(Cell::new(0_usize));
    while !arrivals.is_closed() {
        let (socket, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!("an agent cannot connect: {error}");
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        if at_the_door.get() >= MAX_AT_THE_DOOR {
            tracing::warn!("{from} was turned away: {MAX_AT_THE_DOOR} connections show no token");
            continue;
        }
        at_the_door.set(at_the_door.get() + 1);
        let (acceptor, token, arrivals) = (acceptor.clone(), Rc::clone(&token), arrivals.clone());
        let at_the_door = Rc::clone(&at_the_door);
        spawn_local(async move {
            let met =
                tokio::time::timeout(DOOR_TIMEOUT, meet(socket, from, acceptor, &token)).await;
            at_the_door.set(at_the_door.get() - 1);
            match met {
                Ok(Ok(arrival)) => drop(arrivals.send(Happening::Arrived(Box::new(arrival))).await),
                Ok(Err(why)) => tracing::warn!("{from} was refused: {why}"),
                Err(_) => tracing::warn!("{from} said nothing for {} s", DOOR_TIMEOUT.as_secs()),
            }
        });
    }
}

async fn meet(
    socket: TcpStream,
    from: SocketAddr,
    acceptor: TlsAcceptor,
    token: &str,
) -> Result<Arrival, String> {
    let _ = socket.set_nodelay(true);
    let mut stream = acceptor.accept(socket).await.map_err(|error| format!("no TLS: {error}"))?;
    let join: Join = wire::read(&mut stream, MAX_JOIN_BYTES)
        .await
        .map_err(|error| format!("its first message: {error}"))?;
    if !is_token(&join.token, token) {
        let reason = "the token is not that of this run".to_owned();
        let _ = wire::write(&mut stream, &Answer::Refused { reason: reason.clone() }).await;
        return Err(reason);
    }
    Ok(Arrival { join, from, door: Box::new(stream) })
}
