//! Carries out what [`super::uploads`] decides, on threads of its own: neither ranks nor the
//! supervisor wait for an object store.

use super::Place;
use super::store::{Remote, RemoteError};
use super::uploads::{Action, Event, Job, News, Target, Uploads};
use checkpoint_format::retention::is_milestone;
use checkpoint_format::{names, scan};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// After the run's end, the time for which an object store that fails is still tried.
const PATIENCE: Duration = Duration::from_secs(60);
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
    /// The run has ended: finish what there is, and end.
    Finish,
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

    /// The run has ended.
    pub fn finish(&self) {
        let _ = self.orders.try_send(Order::Finish);
    }
}

async fn work(plan: Plan, mut orders: mpsc::Receiver<Order>, news: mpsc::Sender<News>) {
    let remote = match Remote::open(&plan.place) {
        Ok(remote) => remote,
        Err(error) => {
            let reason = error.to_string();
            let _ = news.send(News::Failing { target: None, reason, failures: 1 }).await;
            return;
        }
    };
    let uploads = Uploads::new(plan.keep_every_steps);
    let mut worker = Worker { plan, remote, uploads, job: None, news };
    if let Some(newest) = worker.newest_on_disk() {
        worker.take(Event::Committed(newest)).await;
    }
    let mut finish_by: Option<Instant> = None;
    loop {
        if finish_by.is_some_and(|by| worker.is_over(by)) {
            return;
        }
        let tick = worker.uploads.next_tick();
        let later = Instant::now() + PATIENCE;
        let finish_by_then = finish_by.filter(|by| *by > Instant::now());
        let wake = [tick, finish_by_then].into_iter().flatten().fold(later, Instant::min);
        let event = tokio::select! {
            order = orders.recv() => match order {
                Some(Order::Committed(target)) => Event::Committed(target),
                Some(Order::Finish) => {
                    finish_by = Some(Instant::now() + PATIENCE);
                    Event::Tick
                }
                // The launcher is gone.
                None => return,
            },
            ended = ended(&mut worker.job) => ended,
            () = tokio::time::sleep_until(wake.into()) => Event::Tick,
        };
        worker.take(event).await;
    }
}

type Outcome = (Job, Result<(), RemoteError>);

/// The end of the job that is under way; never, where there is none.
async fn ended(job: &mut Option<(Job, JoinHandle<Outcome>)>) -> Event {
    let Some((which, handle)) = job else { return std::future::pending().await };
    let outcome = match handle.await {
        Ok((_, outcome)) => outcome,
        Err(error) => Err(RemoteError::Remote(format!("internal error: {error}"))),
    };
    let which = *which;
    *job = None;
    match outcome {
        Ok(()) => Event::Done(which),
        Err(error) => {
            let is_final = !matches!(error, RemoteError::Remote(_));
            Event::Failed { job: which, reason: error.to_string(), is_final }
        }
    }
}

struct Worker {
    plan: Plan,
    remote: Remote,
    uploads: Uploads,
    job: Option<(Job, JoinHandle<Outcome>)>,
    news: mpsc::Sender<News>,
}

impl Worker {
    /// What an earlier launcher may not have come to.
    fn newest_on_disk(&self) -> Option<Target> {
        let found = scan::scan(&self.plan.checkpoints).unwrap_or_default().committed;
        found.iter().map(|f| Target { generation: f.generation, step: f.step }).max()
    }

    /// Whether nothing is left to do after the run's end, or it fails for too long.
    fn is_over(&self, by: Instant) -> bool {
        self.uploads.is_idle() || (self.uploads.failures() > 0 && Instant::now() >= by)
    }

    async fn take(&mut self, event: Event) {
        for action in self.uploads.handle(event, Instant::now()) {
            match action {
                Action::Start(job) => self.job = Some((job, self.start(job))),
                // Without a listener there is nobody to tell.
                Action::Tell(news) => drop(self.news.send(news).await),
            }
        }
    }

    fn start(&self, job: Job) -> JoinHandle<Outcome> {
        let (remote, plan) = (self.remote.clone(), self.plan.clone());
        tokio::spawn(async move {
            let outcome = match job {
                Job::Own => remote.own().await,
                Job::Upload(target) => {
                    let folder = plan.checkpoints.join(names::step_folder(target.step));
                    remote.upload(&folder, target).await.map(|_| ())
                }
                Job::Tidy => tidy(&remote, plan.keep_last, plan.keep_every_steps).await,
            };
            (job, outcome)
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
