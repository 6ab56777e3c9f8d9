//! A run that is held through a store: what is left of it there, and whether its folder is the one
//! that this machine sees.

use super::etcd::EtcdStore;
use super::keeper::{Keeper, hold};
use super::{Holder, Record};
use crate::cluster::nodes::host_name;
use crate::cluster::secrets::write_private;
use crate::error::UserError;
use crate::machine::Starter;
use crate::runs::{self, History};
use rank_protocol::{RunDir, env};
use run_config::{RestartStore, RunConfig};

/// A held run.
pub struct Held {
    /// Holds it.
    pub keeper: Keeper,
    /// What the last holder left; `None`: the store knows nothing of the run.
    pub record: Option<Box<Record>>,
    /// The run's keys, for messages.
    keys: String,
}

impl Held {
    /// Becomes the run's only coordinator, where its config has a store; `None`: it has none, and
    /// the folder's lock is what counts. `host` is the name by which others know this machine.
    ///
    /// # Errors
    /// Where another holds the run, the store does not answer, or nobody needs one here.
    pub fn take(
        config: &RunConfig,
        host: Option<&str>,
        starter: Starter,
    ) -> Result<Option<Self>, UserError> {
        let RestartStore::Etcd(address) = &config.restart.store else { return Ok(None) };
        if starter == Starter::Launcher {
            let message = format!("restart.store: {address} is for `phalanx coordinator`");
            return Err(UserError::usage(message).hint("`--set restart.store=file`"));
        }
        let name = &config.name;
        let store = EtcdStore::new(address, name)?;
        let holder = Holder {
            host: host.map_or_else(host_name, str::to_owned),
            pid: std::process::id(),
            since: crate::time::now(),
            run_id: String::new(),
            address: None,
        };
        let keys = format!("{}/{name}/", address.prefix);
        let (keeper, record) = hold(Box::new(store), holder, &format!("run {name}"))?;
        Ok(Some(Self { keeper, record, keys }))
    }

    /// The folder of a run that the store knows.
    ///
    /// # Errors
    /// Where this machine does not see it.
    pub fn find(&self, name: &str) -> Result<RunDir, UserError> {
        match runs::find(name) {
            Ok(run) => self.check(&run).map(|()| run),
            Err(error) => Err(self.elsewhere(name, &error.message)),
        }
    }

    /// What the store says of the run's past. The generation never goes back, whatever was lost.
    ///
    /// # Errors
    /// Where the folder is another run's, or cannot be read.
    pub fn history(&self, run: &RunDir) -> Result<History, UserError> {
        let in_folder = runs::history(run)?;
        let Some(record) = &self.record else { return Ok(in_folder) };
        self.check(run)?;
        let last_generation = record.history.last_generation.max(in_folder.last_generation);
        Ok(History { last_generation, ..record.history.clone() })
    }

    /// Goes on from here: a successor finds this run, in this folder, with this past.
    ///
    /// # Errors
    /// Where the folder cannot be written.
    pub fn begin(
        &mut self,
        run: &RunDir,
        run_id: &str,
        history: &History,
    ) -> Result<(), UserError> {
        let path = run.identity();
        std::fs::create_dir_all(run.cluster())
            .and_then(|()| write_private(&path, run_id.as_bytes()))
            .map_err(|error| {
                UserError::failed(format!("cannot write {}: {error}", path.display()))
            })?;
        let before = self.record.take().map(|record| *record).unwrap_or_default();
        let record = Record { history: history.clone(), ..before };
        self.keeper.begin(run.root(), run_id, record);
        Ok(())
    }

    fn check(&self, run: &RunDir) -> Result<(), UserError> {
        let expected = self.record.as_ref().and_then(|record| record.history.run_id.as_deref());
        let found = identity(run);
        match expected {
            Some(expected) if found.as_deref() != Some(expected) => {
                let here = run.root().display();
                let what = match found {
                    Some(other) => format!("{here} is the folder of {other}, not of {expected}"),
                    None => format!("{here} does not say that it is the folder of {expected}"),
                };
                Err(self.elsewhere(&runs::name_of(run), &what))
            }
            _ => Ok(()),
        }
    }

    fn elsewhere(&self, name: &str, why: &str) -> UserError {
        let Record { host, run_dir, .. } = self.record.as_deref().cloned().unwrap_or_default();
        let error = UserError::usage(format!(
            "run {name} was begun on {host} in {}, which this machine does not see: {why}",
            run_dir.display()
        ));
        error.hint(format!(
            "the run's folder must be on a file system that all coordinators and agents share ({} \
             says where runs are); `etcdctl del --prefix {}` forgets the run",
            env::RUNS,
            self.keys
        ))
    }
}

/// The identity of the run in a folder, where it has had a coordinator with a store.
pub fn identity(run: &RunDir) -> Option<String> {
    std::fs::read_to_string(run.identity()).ok().map(|text| text.trim().to_owned())
}
