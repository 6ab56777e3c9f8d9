//! One attempt to reach the coordinator.

use crate::cluster::nodes::Address;
use crate::cluster::store::Holder;
use crate::cluster::store::etcd::EtcdStore;
use crate::cluster::store::held::identity;
use crate::cluster::{secrets, wire};
use crate::error::UserError;
use rank_protocol::agent::{Answer, Join};
use rank_protocol::frame::MAX_FRAME_BYTES;
use rank_protocol::{RunDir, exit_code};
use run_config::{RestartStore, RunConfig};
use std::io::{self, Error, ErrorKind};
use std::sync::{Arc, Mutex};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Where the coordinator is found.
#[derive(Clone)]
pub enum Whereabouts {
    /// At this `HOST:PORT`.
    Given(String),
    /// Where the run's folder says.
    Folder,
    /// Where a store says.
    Store(Arc<Mutex<EtcdStore>>),
}

impl Whereabouts {
    /// As the agent was told, else as the run's config says.
    ///
    /// # Errors
    /// What is wrong in the environment.
    pub fn new(given: Option<String>, config: &RunConfig) -> Result<Self, UserError> {
        Ok(match (given, &config.restart.store) {
            (Some(given), _) => Self::Given(given),
            (None, RestartStore::File) => Self::Folder,
            (None, RestartStore::Etcd(address)) => {
                Self::Store(Arc::new(Mutex::new(EtcdStore::new(address, &config.name)?)))
            }
        })
    }

    /// Who holds the run, with its epoch, as a store says; `None` where there is none.
    ///
    /// # Errors
    /// Where the store does not answer.
    pub async fn holder(&self) -> io::Result<Option<(u64, Holder)>> {
        let Self::Store(store) = self else { return Ok(None) };
        let store = Arc::clone(store);
        let asked = tokio::task::spawn_blocking(move || {
            store.lock().unwrap_or_else(std::sync::PoisonError::into_inner).holder()
        });
        let answer = asked.await.map_err(|error| Error::other(error.to_string()))?;
        answer.map_err(|away| Error::other(format!("the store: {away}")))
    }

    /// `HOST:PORT`.
    async fn find(&self, run: &RunDir) -> io::Result<String> {
        let not_yet = |why: &str| Error::new(ErrorKind::NotFound, why.to_owned());
        match self {
            Self::Given(given) => Ok(given.clone()),
            Self::Folder => {
                let text = std::fs::read(run.coordinator())?;
                let Address { host, port, .. } = serde_json::from_slice(&text)?;
                Ok(format!("{host}:{port}"))
            }
            Self::Store(_) => {
                let found = self.holder().await?;
                let (_, holder) =
                    found.ok_or_else(|| not_yet("nobody coordinates the run, says the store"))?;
                let Some(Address { host, port, .. }) = &holder.address else {
                    return Err(not_yet("the coordinator does not listen yet, says the store"));
                };
                if identity(run).is_none_or(|found| found != holder.run_id) {
                    let here = run.root().display();
                    return Err(not_yet(&format!(
                        "{here} is not the folder of {}, which {holder} has: it must be shared",
                        holder.run_id
                    )));
                }
                Ok(format!("{host}:{port}"))
            }
        }
    }
}

/// What became of an attempt.
pub enum Attempt {
    /// This node belongs to the run.
    Connected(Box<Connected>),
    /// It does not, for good: exit code and reason.
    Refused(i32, String),
}

/// A connection over which this node belongs to the run.
pub struct Connected {
    /// The conversation that it goes on with, or begins.
    pub conversation: u64,
    /// Newest message that the coordinator has taken in.
    pub taken: u64,
    /// Epoch of the coordinator.
    pub epoch: u64,
    /// The connection.
    pub stream: TlsStream<TcpStream>,
}

/// Connects once. A coordinator of an earlier epoch than `least_epoch` is none any more.
///
/// # Errors
/// Where another attempt may succeed.
pub async fn attempt(
    run: RunDir,
    whereabouts: Whereabouts,
    least_epoch: u64,
    mut join: Join,
) -> io::Result<Attempt> {
    let address = whereabouts.find(&run).await?;
    let (tls, name, token) = secrets::read(&run)?;
    join.token = token;
    let socket = TcpStream::connect(&address)
        .await
        .map_err(|error| Error::new(error.kind(), format!("{address}: {error}")))?;
    let _ = socket.set_nodelay(true);
    if join.node.address.is_empty() {
        join.node.address = socket.local_addr()?.ip().to_string();
    }
    let mut stream = TlsConnector::from(tls).connect(name, socket).await?;
    wire::write(&mut stream, &join).await?;
    Ok(match wire::read(&mut stream, MAX_FRAME_BYTES).await? {
        Answer::Welcome { epoch, .. } if epoch < least_epoch => {
            let what = format!("{address} is a coordinator of the past: epoch {epoch}");
            return Err(Error::other(format!("{what}, and {least_epoch} was heard of")));
        }
        Answer::Welcome { conversation, taken, epoch } => {
            Attempt::Connected(Box::new(Connected { conversation, taken, epoch, stream }))
        }
        // A coordinator that has just begun anew has another token than was read.
        Answer::Refused { reason } if secrets::read(&run)?.2 != join.token => {
            return Err(Error::new(ErrorKind::PermissionDenied, reason));
        }
        Answer::Refused { reason } => Attempt::Refused(exit_code::CONFIG, reason),
        Answer::Unhealthy { reason } => Attempt::Refused(exit_code::NODE_UNHEALTHY, reason),
    })
}
