//! The executor's part for checkpoints: what ranks tell of them, the search for the newest one, and
//! the copies in an object store.

use super::signals::Signals;
use super::{Event, Executor, changed};
use crate::cluster::store::keeper::Standing;
use crate::remote::upload::{self, Uploader};
use crate::remote::uploads::{News, Target};
use crate::supervisor::policy::RankState;
use crate::supervisor::record::Resumed;
use crate::supervisor::restore::{self, Kept, READ_UP_TO, Reads, Restored, Search, Tier};
use rank_protocol::exit_code;
use serde_json::{Value, json};
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// After a stop that was asked for, the longest wait for a copy: whoever asked waits too, and the
/// next launcher begins with that copy.
const COPY_AFTER_STOP: Duration = Duration::from_secs(20);

/// The next news of the copying: `None` when it ends; never, where there is none.
pub async fn next_of_copies(copied: &mut Option<mpsc::Receiver<News>>) -> Option<News> {
    let Some(receiver) = copied else { return std::future::pending().await };
    let news = receiver.recv().await;
    if news.is_none() {
        *copied = None;
    }
    news
}

impl Executor {
    /// Rank 0 says that a checkpoint is committed.
    pub(super) fn committed(&mut self, step: u64) {
        self.recorder.status.alarm = None;
        self.recorder.event("checkpoint_committed", json!({ "step": step }));
        if let Some(copies) = &self.copies {
            copies.committed(Target { generation: self.state.generation(), step });
        }
        if let Some(elsewhere) = &self.elsewhere {
            let num_ranks = elsewhere.nodes.room();
            self.handle(Event::Room { num_ranks });
        }
        self.handle(Event::Committed { step });
    }

    /// A rank tells something for `events.jsonl`.
    pub(super) fn hear_event(&mut self, rank: usize, event: rank_protocol::Event) {
        let mut fields = event.fields;
        let reason = fields.get("reason").and_then(|reason| reason.as_str());
        let reason = reason.unwrap_or_default().to_owned();
        let status = &mut self.recorder.status;
        match event.kind.as_str() {
            "checkpoint_failed" => {
                tracing::error!("rank {rank} could not save: {reason}");
                status.alarm = Some(reason);
            }
            "metrics_failed" => {
                tracing::error!("training goes on without metrics: {reason}");
                status.alarm = Some(reason);
            }
            "metrics_recovered" => {
                tracing::info!("the metrics are written again, and those that waited");
                status.alarm = None;
            }
            // As often as once a step: no line for each.
            "checkpoint_kept" => {
                status.memory_alarm = None;
                status.memory_checkpoint = fields.get("step").and_then(Value::as_u64);
                // The copies of the step before are forgotten with it.
                status.memory_copied = None;
                if fields.get("is_copied") == Some(&Value::Bool(true)) {
                    status.memory_copy_alarm = None;
                    status.memory_copied = status.memory_checkpoint;
                }
                return;
            }
            "checkpoint_not_copied" => {
                tracing::error!("rank {rank}: what its node keeps is not copied: {reason}");
                status.memory_copy_alarm = Some(reason);
            }
            "checkpoint_not_kept" => {
                tracing::error!("rank {rank} could not keep a checkpoint in memory: {reason}");
                status.memory_alarm = Some(reason);
            }
            "checkpoint_interval" => {
                status.checkpoint_interval = serde_json::from_value(fields.clone().into()).ok();
            }
            _ => {}
        }
        fields.insert("rank".into(), rank.into());
        self.recorder.event(&event.kind, fields.into());
    }

    /// Reading all of a checkpoint takes long, fetching it longer: another thread does it, for
    /// which nobody waits who is asked to end.
    pub(super) fn search(&mut self) {
        // What the ranks of the last generation hold must not outlive it, but for the processes
        // that wait for the next.
        if !self.state.ranks().any(|(state, ..)| state == RankState::Released) {
            self.ranks.clear();
        }
        self.forget_what_is_damaged();
        // What was committed and is not here may be in the object store, also where nobody could
        // say so when the run was resumed.
        let ever = self.plan.ever_committed.filter(|_| self.is_first_search);
        let generation = self.state.generation();
        let search = Search {
            dir: self.plan.run.checkpoints(),
            memory: self.plan.memory.clone(),
            kept: self.newest_kept(),
            branches: self.plan.branches.clone(),
            only: self.plan.first_step.filter(|_| self.is_first_search),
            committed: self.state.committed().max(ever),
            reads: match self.has_failed_to_load {
                true => Reads::All,
                false => Reads::UpTo(READ_UP_TO),
            },
            generation,
            remote: self.plan.remote.clone(),
        };
        self.is_first_search = false;
        let searches = self.searches.clone();
        // Ranks on a node that was given up may still run: from here on they save nothing.
        let fence = self.elsewhere.is_some().then_some(generation + 1);
        let work = move || {
            if let Some(next) = fence
                && let Err(error) = restore::raise_fence(&search.dir, next)
            {
                let _ = searches.blocking_send(Err(error));
                return;
            }
            restore::remove_unfinished(&search.dir, generation);
            if let Some(memory) = &search.memory {
                restore::remove_unfinished(memory, generation);
            }
            let _ = searches.blocking_send(restore::newest(&search));
        };
        let thread = std::thread::Builder::new().name("search".into()).spawn(work);
        if let Err(error) = thread {
            let reason = format!("no thread for the search for a checkpoint: {error}");
            self.handle(Event::Broken { code: exit_code::FAILED, reason });
        }
    }

    pub(super) fn take_search(&mut self, search: Result<Restored, String>) {
        let restored = match search {
            Ok(restored) => restored,
            Err(reason) => {
                return self.handle(Event::Broken { code: exit_code::FAILED, reason });
            }
        };
        for damaged in &restored.damaged {
            let (step, reason) = (damaged.step, &damaged.reason);
            tracing::warn!("the checkpoint of step {step} is damaged and passed over: {reason}");
            let fields = json!({ "step": step, "reason": reason });
            self.recorder.event("checkpoint_damaged", fields);
        }
        for reason in &restored.troubles {
            tracing::warn!("reading from the object store: {reason}");
            self.recorder.event("fetch_failed", json!({ "reason": reason }));
        }
        let tier = restored.tier;
        if let (Some(fetched), Some(found)) = (&restored.fetched, &restored.found) {
            let (step, bytes, seconds) = (found.step, found.bytes, fetched.as_secs_f64());
            tracing::info!("the checkpoint of step {step} came from the object store");
            let fields = json!({ "step": step, "bytes": bytes, "seconds": seconds });
            self.recorder.event("checkpoint_fetched", fields);
        }
        // Its ranks may have ended before they could tell of it.
        if let (Some(found), Some(copies), Some(Tier::Local)) =
            (&restored.found, &self.copies, tier)
        {
            copies.committed(Target { generation: found.generation, step: found.step });
        }
        self.leave_out(&restored.roll_backs);
        if let Some(elsewhere) = &mut self.elsewhere {
            let found = restored.found.as_ref().filter(|_| tier == Some(Tier::Memory));
            elsewhere.kept =
                found.map(|found| Kept { step: found.step, generation: found.generation });
        }
        let step = restored.found.map(|found| found.step);
        let resumed = step.zip(tier).map(|(step, tier)| Resumed { step, tier });
        self.recorder.status.resumed = resumed;
        self.handle(Event::Found { step, is_committed: tier != Some(Tier::Memory) });
    }

    /// Begins to copy checkpoints, where that is asked for; its news.
    pub(super) fn start_copies(&mut self) -> std::io::Result<Option<mpsc::Receiver<News>>> {
        let Some(place) = self.plan.remote.clone() else { return Ok(None) };
        self.recorder.status.remote = Some(place.describe());
        let (uploader, news) = Uploader::start(upload::Plan {
            place,
            checkpoints: self.plan.run.checkpoints(),
            keep_last: self.plan.config.checkpoint.keep_last,
            keep_every_steps: self.plan.config.checkpoint.keep_every_steps,
        })?;
        self.copies = Some(uploader);
        Ok(Some(news))
    }

    /// The copying has news, or (`None`) has ended.
    pub(super) fn copied(&mut self, news: Option<News>) {
        let status = &mut self.recorder.status;
        match news {
            Some(News::Uploaded(Target { generation, step })) => {
                (status.remote_checkpoint, status.remote_alarm) = (Some(step), None);
                let fields = json!({ "step": step, "written_by": generation });
                self.recorder.event("checkpoint_copied", fields);
            }
            Some(News::There(Target { step, .. })) => {
                (status.remote_checkpoint, status.remote_alarm) = (Some(step), None);
            }
            Some(News::Failing { target, reason, failures }) => {
                tracing::error!("copying to the object store fails: {reason}");
                status.remote_alarm = Some(reason.clone());
                let step = target.map(|target| target.step);
                let fields = json!({ "step": step, "reason": reason, "failures": failures });
                self.recorder.event("copy_failed", fields);
            }
            Some(News::Recovered) => status.remote_alarm = None,
            None => self.copies = None,
        }
        self.update_status();
    }

    /// The ranks are gone, and the agents know: what is still being copied is waited for, but not
    /// after a stop at once, and by nobody who sends a signal. An object store that fails is given
    /// a minute.
    pub(super) async fn outlast_copies(
        &mut self,
        copied: &mut Option<mpsc::Receiver<News>>,
        signals: &mut Signals,
        standing: &mut Option<watch::Receiver<Standing>>,
    ) {
        let at_most = match self.finish {
            Some((exit_code::INTERRUPTED, _)) => Some(Duration::ZERO),
            Some((exit_code::PREEMPTED, _)) => Some(COPY_AFTER_STOP),
            _ => None,
        };
        let is_told = self.copies.as_ref().is_some_and(|copies| copies.finish(at_most));
        while is_told && self.copies.is_some() && self.superseded.is_none() {
            let wake = self.recorder.wake();
            tokio::select! {
                news = next_of_copies(copied) => self.copied(news),
                () = changed(standing) => self.store_changed(),
                signal = signals.next() => {
                    // A scheduler's warning that time is nearly up is no wish to end at once.
                    if signal != "SIGUSR2" {
                        self.copies = None;
                    }
                }
                () = tokio::time::sleep_until(wake.into()) => self.update_status(),
            }
        }
        self.copies = None;
    }
}
