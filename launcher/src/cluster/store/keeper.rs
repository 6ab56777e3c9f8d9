//! Holds a run for its coordinator: renews the lease and writes what a successor must know, on a
//! thread of its own, so that no silence of the store holds up the loop.
//!
//! A store that does not answer says nothing: the ranks go on, and what needs the store (a new
//! generation) waits. A lease that has ended is taken again where nobody else was at work
//! meanwhile; where somebody was, the keeper has *lost*, and the coordinator must do nothing any
//! more.

use super::tenure::Tenure;
use super::{Acquired, Away, Holder, Record, StateStore, TTL};
use crate::cluster::nodes::Address;
use crate::error::UserError;
use serde_json::Value;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Beyond a lease's time, the wait for that of a holder that may be gone.
const PATIENCE: Duration = Duration::from_millis(2500);
/// Longest wait for a store that does not answer, before the run is held.
const AWAY_PATIENCE: Duration = Duration::from_secs(10);
/// Time between two attempts.
const RETRY: Duration = Duration::from_millis(200);

/// How things stand with the store.
#[derive(Clone, Debug)]
pub struct Standing {
    /// Epoch of this holder.
    pub epoch: u64,
    /// Until when nobody else can hold the run.
    pub sure_until: Instant,
    /// The newest [`Keeper::claim`] that the store has taken in.
    pub written: u64,
    /// Why the store does not answer, while it does not.
    pub away: Option<String>,
    /// Who holds the run now, where that is another: nothing more may be done.
    pub lost: Option<String>,
}

/// What waits for the thread.
#[derive(Default)]
struct Desk {
    write: Option<(u64, Record)>,
    announce: Option<Holder>,
    is_over: bool,
}

#[derive(Default)]
struct Shared {
    desk: Mutex<Desk>,
    changed: Condvar,
}

impl Shared {
    /// No code panics while it holds the lock; what it guards is whole in any case.
    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// The sole right to coordinate a run; given up when dropped.
pub struct Keeper {
    shared: Arc<Shared>,
    standing: watch::Receiver<Standing>,
    thread: Option<JoinHandle<()>>,
    holder: Holder,
    record: Record,
    num_writes: u64,
}

/// The thread's side.
struct Worker {
    store: Box<dyn StateStore>,
    shared: Arc<Shared>,
    standing: watch::Sender<Standing>,
    tenure: Tenure,
    holder: Holder,
    /// Epochs in which nobody but this keeper can have written.
    own: Vec<u64>,
    /// After a write that got no answer.
    retry_at: Instant,
}

/// Becomes the holder; waits for the lease of one that may be gone. Gives what it left, too.
///
/// # Errors
/// Where another holds the run, which is named, or the store does not answer.
pub fn hold(
    mut store: Box<dyn StateStore>,
    holder: Holder,
    what: &str,
) -> Result<(Keeper, Option<Box<Record>>), UserError> {
    let begun = Instant::now();
    let mut has_told = false;
    loop {
        let asked = Instant::now();
        let waited = asked.saturating_duration_since(begun);
        match store.acquire(&holder) {
            Ok(Acquired::Yes { epoch, record }) => {
                let keeper = Keeper::start(store, holder, epoch, asked, record.as_deref())?;
                return Ok((keeper, record));
            }
            Ok(Acquired::Held(other)) if waited >= TTL + PATIENCE => {
                let error = UserError::usage(format!("{what} is held by {other}"));
                let hint = format!("`phalanx cancel` on {} ends it", other.host);
                return Err(error.hint(hint));
            }
            Ok(Acquired::Held(other)) => {
                if !std::mem::replace(&mut has_told, true) {
                    let seconds = (TTL + PATIENCE).as_secs_f64();
                    tracing::info!("waiting up to {seconds} s for the lease of {other} to end");
                }
            }
            Err(away) if waited >= AWAY_PATIENCE => {
                let seconds = AWAY_PATIENCE.as_secs();
                let message = format!("the store did not answer for {seconds} s: {away}");
                return Err(UserError::failed(message).hint("restart.store says where it is"));
            }
            Err(away) => {
                if !std::mem::replace(&mut has_told, true) {
                    tracing::info!("waiting for the store: {away}");
                }
            }
        }
        std::thread::sleep(RETRY);
    }
}

impl Keeper {
    /// Starts the thread, for a run that was asked for at `asked` and is held.
    fn start(
        store: Box<dyn StateStore>,
        holder: Holder,
        epoch: u64,
        asked: Instant,
        found: Option<&Record>,
    ) -> Result<Self, UserError> {
        let tenure = Tenure::new(TTL, asked);
        let sure_until = tenure.sure_until();
        let (sender, standing) =
            watch::channel(Standing { epoch, sure_until, written: 0, away: None, lost: None });
        let shared = Arc::new(Shared::default());
        let worker = Worker {
            store,
            shared: Arc::clone(&shared),
            standing: sender,
            tenure,
            holder: holder.clone(),
            own: vec![found.map_or(0, |record| record.epoch), epoch],
            retry_at: asked,
        };
        let thread = std::thread::Builder::new()
            .name("keeper".into())
            .spawn(move || worker.run())
            .map_err(|error| UserError::failed(format!("a thread cannot start: {error}")))?;
        let record = found.cloned().unwrap_or_default();
        Ok(Self { shared, standing, thread: Some(thread), holder, record, num_writes: 0 })
    }

    /// How things stand, to be waited for.
    pub fn watch(&self) -> watch::Receiver<Standing> {
        self.standing.clone()
    }

    /// How things stand now.
    pub fn standing(&self) -> Standing {
        self.standing.borrow().clone()
    }

    /// Whether nobody else can hold the run at this moment.
    pub fn is_sure(&self) -> bool {
        let standing = self.standing.borrow();
        standing.lost.is_none() && Instant::now() < standing.sure_until
    }

    /// Says what a successor shall know from now on.
    pub fn begin(&mut self, run_dir: &Path, run_id: &str, record: Record) {
        let host = match record.host.is_empty() {
            true => self.holder.host.clone(),
            false => record.host.clone(),
        };
        self.holder.run_id = run_id.to_owned();
        self.record = Record { run_dir: run_dir.to_owned(), host, ..record };
        self.record.history.run_id = Some(run_id.to_owned());
        self.write();
    }

    /// Tells agents where they reach this coordinator.
    pub fn announce(&mut self, address: Address) {
        self.holder.address = Some(address);
        self.shared.desk().announce = Some(self.holder.clone());
        self.shared.changed.notify_one();
    }

    /// Something happened; what a successor must know of it is written.
    pub fn note(&mut self, event: &Value) {
        if self.record.history.take(event) {
            self.write();
        }
    }

    /// Has the store take in that this generation may be begun. Wait until [`Standing::written`] is
    /// what this returns, and more.
    pub fn claim(&mut self, generation: u64) -> u64 {
        let last = &mut self.record.history.last_generation;
        *last = generation.max(*last);
        self.write()
    }

    fn write(&mut self) -> u64 {
        self.num_writes += 1;
        self.shared.desk().write = Some((self.num_writes, self.record.clone()));
        self.shared.changed.notify_one();
        self.num_writes
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.shared.desk().is_over = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Worker {
    fn run(mut self) {
        while self.standing.borrow().lost.is_none() {
            let Desk { write, announce, is_over } = self.next();
            if is_over {
                if let Some((_, record)) = write {
                    let _ = self.write(&record);
                }
                return self.store.release();
            }
            if Instant::now() >= self.tenure.next_renewal() {
                self.renew();
            }
            if let Some(holder) = announce {
                self.holder = holder;
                let done = self.store.announce(&self.holder);
                if !self.heed(done) {
                    let holder = self.holder.clone();
                    self.shared.desk().announce.get_or_insert(holder);
                }
            }
            if let Some((number, record)) = write {
                let done = self.write(&record);
                if self.heed(done) {
                    self.standing.send_modify(|standing| standing.written = number);
                } else {
                    self.shared.desk().write.get_or_insert((number, record));
                }
            }
        }
    }

    /// Waits until something is to be done, and takes it.
    fn next(&self) -> Desk {
        let mut desk = self.shared.desk();
        loop {
            let now = Instant::now();
            let has_work = desk.write.is_some() || desk.announce.is_some();
            let renewal = self.tenure.next_renewal();
            let wake = if has_work { renewal.min(self.retry_at) } else { renewal };
            if desk.is_over || now >= wake {
                let is_over = desk.is_over;
                return match is_over || now >= self.retry_at {
                    true => Desk { is_over, ..std::mem::take(&mut desk) },
                    false => Desk::default(),
                };
            }
            let waited = self.shared.changed.wait_timeout(desk, wake - now);
            desk = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
    }

    fn write(&mut self, record: &Record) -> Result<bool, Away> {
        let epoch = self.standing.borrow().epoch;
        self.store.write(&Record { epoch, ..record.clone() })
    }

    fn renew(&mut self) {
        let asked = Instant::now();
        match self.store.renew() {
            Ok(true) => {
                self.tenure.renewed(asked);
                self.answered();
            }
            Ok(false) => self.regain(),
            Err(away) => self.unanswered(away),
        }
    }

    /// What came of a write.
    fn heed(&mut self, done: Result<bool, Away>) -> bool {
        match done {
            Ok(true) => {
                self.answered();
                return true;
            }
            Ok(false) => self.regain(),
            Err(away) => self.unanswered(away),
        }
        self.retry_at = Instant::now() + RETRY;
        false
    }

    /// The lease has ended: takes it again, where nobody has been at work since.
    fn regain(&mut self) {
        let asked = Instant::now();
        match self.store.acquire(&self.holder) {
            Ok(Acquired::Yes { epoch, record }) => {
                let last = record.map_or(0, |record| record.epoch);
                if !self.own.contains(&last) {
                    self.store.release();
                    return self.lose("another coordinator was at work meanwhile".to_owned());
                }
                tracing::warn!("the lease had ended and was taken again: epoch {epoch}");
                self.own.push(epoch);
                self.tenure = Tenure::new(TTL, asked);
                self.standing.send_modify(|standing| standing.epoch = epoch);
                self.answered();
            }
            Ok(Acquired::Held(other)) => self.lose(format!("{other} holds it now")),
            Err(away) => self.unanswered(away),
        }
    }

    fn lose(&mut self, who: String) {
        self.standing.send_modify(|standing| standing.lost = Some(who));
    }

    fn answered(&mut self) {
        let sure_until = self.tenure.sure_until();
        self.standing.send_modify(|standing| {
            standing.sure_until = sure_until;
            standing.away = None;
        });
    }

    fn unanswered(&mut self, away: Away) {
        self.tenure.unanswered(Instant::now());
        self.standing.send_modify(|standing| standing.away = Some(away.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// One store for several holders, whose leases end when a test says so.
    #[derive(Default)]
    struct Memory {
        epoch: u64,
        holder: Option<(u64, Holder)>,
        record: Option<Record>,
    }

    #[derive(Clone, Default)]
    struct Fake {
        memory: Arc<Mutex<Memory>>,
        is_away: Arc<AtomicBool>,
        epoch: u64,
    }

    impl Fake {
        fn memory(&self) -> Result<MutexGuard<'_, Memory>, Away> {
            match self.is_away.load(Ordering::Relaxed) {
                true => Err(Away("no answer".into())),
                false => Ok(self.memory.lock().unwrap()),
            }
        }
    }

    impl StateStore for Fake {
        fn acquire(&mut self, holder: &Holder) -> Result<Acquired, Away> {
            let mut memory = self.memory()?;
            if let Some((_, other)) = &memory.holder {
                return Ok(Acquired::Held(Box::new(other.clone())));
            }
            memory.epoch += 1;
            let epoch = memory.epoch;
            memory.holder = Some((epoch, holder.clone()));
            let record = memory.record.clone().map(Box::new);
            drop(memory);
            self.epoch = epoch;
            Ok(Acquired::Yes { epoch, record })
        }
        fn renew(&mut self) -> Result<bool, Away> {
            Ok(self.memory()?.holder.as_ref().is_some_and(|(epoch, _)| *epoch == self.epoch))
        }
        fn write(&mut self, record: &Record) -> Result<bool, Away> {
            let is_ours = self.renew()?;
            if is_ours {
                self.memory()?.record = Some(record.clone());
            }
            Ok(is_ours)
        }
        fn announce(&mut self, _: &Holder) -> Result<bool, Away> {
            self.renew()
        }
        fn release(&mut self) {
            let epoch = self.epoch;
            if let Ok(mut memory) = self.memory() {
                memory.holder.take_if(|(holder, _)| *holder == epoch);
            }
        }
    }

    fn holder(host: &str) -> Holder {
        let (host, since) = (host.to_owned(), "now".to_owned());
        Holder { host, pid: 1, since, run_id: String::new(), address: None }
    }

    fn hold_by(fake: &Fake, host: &str) -> Keeper {
        hold(Box::new(fake.clone()), holder(host), "run r").unwrap().0
    }

    fn wait_until(keeper: &Keeper, is_right: impl Fn(&Standing) -> bool) -> Standing {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let standing = keeper.standing();
            if is_right(&standing) {
                return standing;
            }
            assert!(Instant::now() < deadline, "{standing:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_claim_is_written_and_found_by_the_next() {
        let fake = Fake::default();
        let mut keeper = hold_by(&fake, "a");
        keeper.begin(Path::new("runs/r"), "r-1", Record::default());
        let ticket = keeper.claim(3);
        wait_until(&keeper, |standing| standing.written >= ticket);
        assert!(keeper.is_sure());
        drop(keeper);
        let (keeper, record) = hold(Box::new(fake), holder("b"), "run r").unwrap();
        let record = record.unwrap();
        assert_eq!((record.history.last_generation, &*record.host), (3, "a"));
        assert_eq!((record.epoch, keeper.standing().epoch), (1, 2));
    }

    #[test]
    fn a_store_that_is_away_is_told_of_and_waited_for() {
        let fake = Fake::default();
        let mut keeper = hold_by(&fake, "a");
        fake.is_away.store(true, Ordering::Relaxed);
        let ticket = keeper.claim(1);
        let standing = wait_until(&keeper, |standing| standing.away.is_some());
        assert_eq!((standing.away.as_deref(), standing.written), (Some("no answer"), 0));
        assert_eq!(standing.lost, None, "silence is no failure");
        fake.is_away.store(false, Ordering::Relaxed);
        let standing = wait_until(&keeper, |standing| standing.written >= ticket);
        assert_eq!((standing.away, standing.epoch), (None, 1));
    }

    #[test]
    fn a_lease_that_ended_is_taken_again_only_where_nobody_was_at_work() {
        let fake = Fake::default();
        let mut keeper = hold_by(&fake, "a");
        let ticket = keeper.claim(1);
        wait_until(&keeper, |standing| standing.written >= ticket);
        fake.memory.lock().unwrap().holder = None;
        let ticket = keeper.claim(2);
        let standing = wait_until(&keeper, |standing| standing.written >= ticket);
        assert_eq!(standing.epoch, 2);
        // Another comes and goes, and has written.
        fake.memory.lock().unwrap().holder = None;
        let mut other = hold_by(&fake, "b");
        let ticket = other.claim(7);
        wait_until(&other, |standing| standing.written >= ticket);
        drop(other);
        keeper.claim(3);
        let lost = wait_until(&keeper, |standing| standing.lost.is_some()).lost;
        assert_eq!(lost.as_deref(), Some("another coordinator was at work meanwhile"));
        assert!(!keeper.is_sure());
        let memory = fake.memory.lock().unwrap();
        assert_eq!(memory.record.as_ref().unwrap().history.last_generation, 7);
        assert_eq!(memory.holder, None, "what it took to look, it gave back");
    }

    #[test]
    fn a_holder_whose_place_is_taken_writes_nothing() {
        let fake = Fake::default();
        let mut keeper = hold_by(&fake, "a");
        fake.memory.lock().unwrap().holder = None;
        let _other = hold_by(&fake, "b");
        keeper.claim(9);
        let lost = wait_until(&keeper, |standing| standing.lost.is_some()).lost.unwrap();
        assert!(lost.starts_with("the coordinator on b (process 1"), "{lost}");
        assert_eq!(fake.memory.lock().unwrap().record, None);
    }
}
