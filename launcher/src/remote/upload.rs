//! Carries out what [`super::uploads`] decides, on threads of its own: neither ranks nor the
//! supervisor wait for an object store.

use super::Place;
use super::access::{REQUEST_S, RemoteError};
use super::store::Remote;
use super::transfer::Width;
use super::uploads::{Action, Event, Job, News, Target, Uploads, pause};
use checkpoint_format::retention::is_milestone;
use checkpoint_format::{names, scan};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// After the run's end, the time for which an object store that fails is still tried.
const PATIENCE: Duration = Duration::from_secs(60);
/// An object store that does not answer for so long is told of. Requests over a network fail
/// before; those to a folder do not.
const SILENCE: Duration = Duration::from_secs(25);
/// Time between two looks at what is under way.
const LOOK: Duration = Duration::from_secs(1);
/// Time between two looks at nothing.
const REST: Duration = Duration::from_secs(60);
/// Orders and news that wait; a launcher that is told nothing for long has other worries.
const NUM_WAITING: usize = 1024;

/// What is to be copied.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where to.
    pub place: Place,
    /// The run's folder of checkpoints.
    pub checkpoints: PathBuf,
    /// Newest checkpoints kept there.
    pub keep_last: usize,
    /// Checkpoints of every so many steps are kept there for good; 0: none.
    pub keep_every_steps: u64,
}

/// To the thread that copies.
#[derive(Clone, Copy, Debug)]
enum Order {
    /// A checkpoint is committed on disk.
    Committed(Target),
    /// The run has ended: finish what there is, and end; by then at the latest.
    Finish { at_most: Option<Duration> },
}

/// The copying of one run's checkpoints, while its launcher lives.
#[derive(Debug)]
pub struct Uploader {
    orders: mpsc::Sender<Order>,
}

impl Uploader {
    /// Begins, with the newest checkpoint on disk. The news end once all is done after
    /// [`Uploader::finish`], or given up.
    ///
    /// # Errors
    /// Where there is no thread.
    pub fn start(plan: Plan) -> std::io::Result<(Uploader, mpsc::Receiver<News>)> {
        let (orders, ordered) = mpsc::channel(NUM_WAITING);
        let (news, told) = mpsc::channel(NUM_WAITING);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("upload")
            .enable_all()
            .build()?;
        let work = move || {
            runtime.block_on(work(plan, ordered, news));
            // A request that hangs is not waited for.
            runtime.shutdown_background();
        };
        std::thread::Builder::new().name("upload".into()).spawn(work)?;
        Ok((Uploader { orders }, told))
    }

    /// A checkpoint is committed on disk.
    pub fn committed(&self, target: Target) {
        // With so many waiting, a later one will do.
        let _ = self.orders.try_send(Order::Committed(target));
    }

    /// The run has ended. What is being copied is waited for, at most so long where that is given;
    /// an object store that fails for no more than a minute. `false`: it is not heard.
    pub fn finish(&self, at_most: Option<Duration>) -> bool {
        self.orders.try_send(Order::Finish { at_most }).is_ok()
    }
}

async fn work(plan: Plan, mut orders: mpsc::Receiver<Order>, news: mpsc::Sender<News>) {
    let Some(remote) = opened(&plan.place, &mut orders, &news).await else { return };
    let uploads = Uploads::new(plan.keep_every_steps);
    let silence = Silence { answered: 0, since: Instant::now(), is_told: false };
    let width = Width::FULL;
    let mut worker = Worker { plan, remote, uploads, job: None, width, silence, news };
    worker.take(Event::Tick).await;
    if let Some(newest) = worker.newest_on_disk() {
        worker.take(Event::Committed(newest)).await;
    }
    let mut ending: Option<Ending> = None;
    loop {
        let now = Instant::now();
        if ending.is_some_and(|ending| ending.is_over(&worker.uploads, now)) {
            return;
        }
        let wake = worker.wake(ending, now);
        let event = tokio::select! {
            order = orders.recv() => match order {
                Some(Order::Committed(target)) => Event::Committed(target),
                Some(Order::Finish { at_most }) => {
                    ending = Some(Ending::new(at_most));
                    Event::Tick
                }
                // The launcher is gone.
                None => return,
            },
            ended = ended(&mut worker.job) => worker.learned(ended),
            () = tokio::time::sleep_until(wake.into()) => worker.looked(),
        };
        worker.take(event).await;
    }
}

/// The object store, once it can be opened; `None` where the run has ended before. What is
/// committed in the meantime is found on disk.
async fn opened(
    place: &Place,
    orders: &mut mpsc::Receiver<Order>,
    news: &mpsc::Sender<News>,
) -> Option<Remote> {
    let limit = Duration::from_secs(REQUEST_S);
    let mut failures: u32 = 0;
    loop {
        let place = place.clone();
        let open = tokio::task::spawn_blocking(move || Remote::open(&place));
        let reason = match tokio::time::timeout(limit, open).await {
            Ok(Ok(Ok(remote))) => {
                if failures > 0 {
                    let _ = news.send(News::Recovered).await;
                }
                return Some(remote);
            }
            Ok(Ok(Err(error))) => error.to_string(),
            Ok(Err(error)) => format!("internal error: {error}"),
            Err(_) => format!("no answer for {REQUEST_S} s"),
        };
        failures += 1;
        if failures.is_power_of_two() {
            let _ = news.send(News::Failing { target: None, reason, failures }).await;
        }
        let again = tokio::time::sleep(pause(failures));
        tokio::pin!(again);
        loop {
            tokio::select! {
                order = orders.recv() => match order {
                    Some(Order::Committed(_)) => {}
                    Some(Order::Finish { .. }) | None => return None,
                },
                () = &mut again => break,
            }
        }
    }
}

/// How long nothing has been heard of the object store.
struct Silence {
    answered: u64,
    since: Instant,
    is_told: bool,
}

/// How long the work goes on after the run's end.
#[derive(Clone, Copy, Debug)]
struct Ending {
    /// Then an object store that fails is given up.
    patience: Instant,
    /// Then all is given up.
    latest: Option<Instant>,
}

impl Ending {
    fn new(at_most: Option<Duration>) -> Self {
        let now = Instant::now();
        Self { patience: now + PATIENCE, latest: at_most.map(|time| now + time) }
    }

    /// Whether nothing is left to do, or it fails or takes too long.
    fn is_over(self, uploads: &Uploads, now: Instant) -> bool {
        let is_failing = uploads.failures() > 0 && now >= self.patience;
        uploads.is_idle() || is_failing || self.latest.is_some_and(|latest| now >= latest)
    }
}

/// Whether something was done, and was not before.
type Outcome = Result<bool, RemoteError>;

/// The end of the job that is under way; never, where there is none.
async fn ended(job: &mut Option<(Job, JoinHandle<Outcome>)>) -> (Job, Outcome) {
    let Some((which, handle)) = job else { return std::future::pending().await };
    let internal = |error| Err(RemoteError::Remote(format!("internal error: {error}")));
    let outcome = handle.await.unwrap_or_else(internal);
    let which = *which;
    *job = None;
    (which, outcome)
}

struct Worker {
    plan: Plan,
    remote: Remote,
    uploads: Uploads,
    job: Option<(Job, JoinHandle<Outcome>)>,
    width: Width,
    silence: Silence,
    news: mpsc::Sender<News>,
}

impl Worker {
    /// What an earlier launcher may not have come to.
    fn newest_on_disk(&self) -> Option<Target> {
        let found = scan::scan(&self.plan.checkpoints).unwrap_or_default().committed;
        found.iter().map(|f| Target { generation: f.generation, step: f.step }).max()
    }

    /// When there is something to look at, whatever happens.
    fn wake(&self, ending: Option<Ending>, now: Instant) -> Instant {
        let look = now + if self.job.is_some() { LOOK } else { REST };
        let deadlines = ending.map_or([None, None], |end| [Some(end.patience), end.latest]);
        let deadlines = deadlines.into_iter().flatten().filter(|at| *at > now);
        deadlines.chain(self.uploads.next_tick()).fold(look, Instant::min)
    }

    /// Some time has passed.
    fn looked(&mut self) -> Event {
        let (answered, now) = (self.remote.answered(), Instant::now());
        if self.job.is_none() || answered != self.silence.answered {
            self.silence = Silence { answered, since: now, is_told: false };
        }
        let time = now.duration_since(self.silence.since);
        if time < SILENCE || self.silence.is_told {
            return Event::Tick;
        }
        self.silence.is_told = true;
        Event::Silent(time)
    }

    /// What the end of a job means for those that follow.
    fn learned(&mut self, (job, outcome): (Job, Outcome)) -> Event {
        match outcome {
            Ok(is_new) => {
                self.width = self.width.wider();
                match job {
                    Job::Upload(target) if !is_new => Event::There(target),
                    job => Event::Done(job),
                }
            }
            Err(RemoteError::Gone(why)) => {
                tracing::debug!("not copied: {why}");
                Event::Gone(job)
            }
            Err(error) => {
                let is_final = !matches!(error, RemoteError::Remote(_));
                if !is_final {
                    self.width = self.width.narrower();
                }
                Event::Failed { job, reason: error.to_string(), is_final }
            }
        }
    }

    async fn take(&mut self, event: Event) {
        for action in self.uploads.handle(event, Instant::now()) {
            match action {
                Action::Start(job) => {
                    let (answered, since) = (self.remote.answered(), Instant::now());
                    self.silence = Silence { answered, since, is_told: false };
                    self.job = Some((job, self.start(job)));
                }
                // Without a listener there is nobody to tell.
                Action::Tell(news) => drop(self.news.send(news).await),
            }
        }
    }

    fn start(&self, job: Job) -> JoinHandle<Outcome> {
        let (remote, plan, width) = (self.remote.clone(), self.plan.clone(), self.width);
        tokio::spawn(async move {
            match job {
                Job::Own => remote.own().await.map(|()| true),
                Job::Upload(target) => {
                    let folder = plan.checkpoints.join(names::step_folder(target.step));
                    Ok(remote.upload(&folder, target, width).await?.is_some())
                }
                Job::Tidy => {
                    tidy(&remote, plan.keep_last, plan.keep_every_steps).await.map(|()| true)
                }
            }
        })
    }
}

/// Removes what is old: as on disk, and what is incomplete and older than the newest. Only one job
/// runs at a time, so that none is being copied.
async fn tidy(remote: &Remote, keep_last: usize, keep_every: u64) -> Result<(), RemoteError> {
    let stored = remote.list().await?;
    let complete: Vec<Target> =
        stored.iter().filter(|stored| stored.is_complete).map(|stored| stored.target).collect();
    let Some(newest) = complete.last().copied() else { return Ok(()) };
    for stored in &stored {
        let is_left_over = !stored.is_complete && stored.target < newest;
        if is_left_over || is_old(stored.target, &complete, keep_last, keep_every) {
            remote.remove(stored.target).await?;
        }
    }
    Ok(())
}

/// Whether a complete checkpoint is one to remove, of all complete ones in the order of their
/// commits. By place and not by step: a run that went back has two of one step.
fn is_old(target: Target, complete: &[Target], keep_last: usize, keep_every: u64) -> bool {
    let Ok(at) = complete.binary_search(&target) else { return false };
    let newer = complete.len() - 1 - at;
    newer >= keep_last.max(1) && !is_milestone(target.step, keep_every)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(complete: &[(u64, u64)], keep_last: usize, keep_every: u64, expected: &[(u64, u64)]) {
        let target = |&(generation, step): &(u64, u64)| Target { generation, step };
        let complete: Vec<Target> = complete.iter().map(target).collect();
        let old = complete.iter().filter(|t| is_old(**t, &complete, keep_last, keep_every));
        let old: Vec<Target> = old.copied().collect();
        assert_eq!(old, expected.iter().map(target).collect::<Vec<_>>());
    }

    #[test]
    fn the_newest_and_the_milestones_stay() {
        let all = [(1, 10), (1, 20), (1, 30), (2, 40)];
        check(&all, 2, 0, &[(1, 10), (1, 20)]);
        check(&all, 2, 20, &[(1, 10)]);
        check(&all, 0, 0, &all[..3]);
        check(&all, 9, 0, &[]);
        check(&[], 1, 0, &[]);
        // Gone back from 30 to 10, and on to 20 and 30 again.
        check(&[(1, 20), (1, 30), (2, 20), (2, 30)], 2, 0, &[(1, 20), (1, 30)]);
        check(&[(1, 20), (1, 30), (2, 20), (2, 30)], 3, 0, &[(1, 20)]);
    }
}
