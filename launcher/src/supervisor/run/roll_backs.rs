//! The executor's part in numeric trouble: samples that are left out from now on.

use super::Executor;
use rank_protocol::RollBack;
use serde_json::json;

impl Executor {
    /// The samples of these steps are left out too.
    pub(super) fn leave_out(&mut self, roll_backs: &[RollBack]) {
        for roll_back in roll_backs {
            if !self.plan.roll_backs.contains(roll_back) {
                self.plan.roll_backs.push(*roll_back);
            }
        }
    }

    /// Notes it where later launchers find it, before any rank knows.
    pub(super) fn record_roll_back(&mut self, roll_back: RollBack) {
        let (step, samples) = (roll_back.step, roll_back.samples);
        tracing::warn!(
            "going back behind step {step}, and on without its samples {} to {}",
            samples.first,
            samples.last
        );
        self.recorder.event("rolled_back", json!(roll_back));
        self.leave_out(&[roll_back]);
        self.forget_memory();
    }
}
