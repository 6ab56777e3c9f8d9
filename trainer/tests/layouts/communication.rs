//! The bytes that a rank really sends in a step are those that the plan says, group by group.

use crate::harness::{BUCKET_BYTES, Meeting, batch_stage, config, num_ranks, on_ranks_of, step};
use collectives::Communicator;
use layout::communication::{Group, Step, communication};
use layout::{Communication, Mesh};
use parallel::Groups;
use run_config::RunConfig;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

/// Bytes by group; groups that sent none are left out.
type Sent = BTreeMap<Group, u64>;

fn bytes_sent(groups: &Groups) -> Sent {
    let world = Some(groups.world.clone());
    let all: [(Group, &Option<Arc<dyn Communicator>>); 9] = [
        (Group::Tensor, &groups.tensor),
        (Group::KvCopies, &groups.kv_copies),
        (Group::Context, &groups.context),
        (Group::Pipeline, &groups.pipeline),
        (Group::TiedStages, &groups.tied_stages),
        (Group::Shard, &groups.shard),
        (Group::Copies, &groups.copies),
        (Group::Data, &groups.data),
        (Group::World, &world),
    ];
    let sent = |(group, comm): (Group, &Option<Arc<dyn Communicator>>)| {
        Some((group, comm.as_ref()?.bytes_sent()))
    };
    all.into_iter().filter_map(sent).collect()
}

/// What each rank sends in its second step: the first gathers sharded weights once more.
fn measured(config: &RunConfig, meeting: &Meeting) -> Vec<Sent> {
    on_ranks_of(meeting, config, |member| {
        step(config, member, 0);
        let before = bytes_sent(&member.worker.groups);
        step(config, member, 1);
        let after = bytes_sent(&member.worker.groups);
        let differences = after.into_iter().map(|(group, sent)| (group, sent - before[&group]));
        differences.filter(|(_, sent)| *sent > 0).collect()
    })
}

fn planned(config: &RunConfig) -> Vec<Communication> {
    let mesh = Mesh::new(&config.parallelism, num_ranks(config)).unwrap();
    let step = Step { bucket_bytes: BUCKET_BYTES, ..Step::of(batch_stage(config)) };
    let of = |rank| communication(config, &mesh, rank, &step).unwrap();
    (0..mesh.size()).map(of).collect()
}

/// The groups in which a rank sends other than planned, with what was planned.
fn differences(rank: usize, sent: &Sent, plan: &Communication) -> String {
    let mut text = String::new();
    let planned = plan.sent_by_group();
    for group in sent.keys().chain(planned.keys()).collect::<std::collections::BTreeSet<_>>() {
        let of = |bytes: &Sent| bytes.get(group).copied().unwrap_or(0);
        if of(sent) == of(&planned) {
            continue;
        }
        let (found, expected) = (of(sent), of(&planned));
        let name = group.name();
        let _ = writeln!(text, "  rank {rank}, {name}: sent {found}, planned {expected}, of");
        for call in plan.calls.iter().filter(|call| call.group == *group) {
            let (operation, times, sent) = (call.operation.name(), call.times, call.sent);
            let _ = writeln!(text, "    {times} x {sent}: {operation}, {}", call.why);
        }
    }
    text
}

fn meeting() -> Meeting {
    Meeting::new(Duration::from_secs(30))
}

#[track_caller]
fn check(layouts: &[&[&str]]) {
    check_at(meeting, layouts);
}

/// Checks layouts whose ranks each time find each other at a new meeting.
#[track_caller]
fn check_at(meeting: fn() -> Meeting, layouts: &[&[&str]]) {
    let mut wrong = String::new();
    for sets in layouts {
        let config = config(sets);
        let (measured, planned) = (measured(&config, &meeting()), planned(&config));
        let pairs = measured.iter().zip(&planned).enumerate();
        let text: String =
            pairs.map(|(rank, (sent, plan))| differences(rank, sent, plan)).collect();
        if !text.is_empty() {
            let _ = writeln!(wrong, "{}:\n{text}", sets.join(" "));
        }
        assert!(planned.len() < 2 || planned.iter().all(|plan| plan.sent() > 0));
    }
    assert!(wrong.is_empty(), "bytes sent in a step\n{wrong}");
}

/// Sequences so long that messages go round the ring, and the loss takes several chunks of tokens.
const LONG: &str = "data.sequence_length=1280";
const TWO: &str = "training.global_batch=2";

#[test]
fn one_rank_sends_nothing() {
    check(&[&[]]);
}

#[test]
fn tensor_parallel() {
    check(&[
        &["parallelism.tensor=2"],
        &["parallelism.tensor=2", "parallelism.sequence=false"],
        &["parallelism.tensor=4"],
        &["parallelism.tensor=4", "parallelism.sequence=false"],
        &["parallelism.tensor=8"],
        &["parallelism.tensor=2", "training.micro_batch=2"],
        &["parallelism.tensor=4", LONG, TWO],
        &["parallelism.tensor=4", "parallelism.sequence=false", LONG, TWO],
        &["parallelism.tensor=2", "precision.compute=fp32"],
        &["parallelism.tensor=2", "precision.compute=bf16", LONG, TWO],
    ]);
}

#[test]
fn context_parallel() {
    check(&[
        &["parallelism.context=2"],
        &["parallelism.context=4"],
        &["parallelism.context=2", "data.document_mask=false"],
        &["parallelism.context=2", "parallelism.recompute=full"],
        &["parallelism.context=2", "parallelism.recompute=selective"],
        &["parallelism.context=2", "precision.compute=bf16"],
    ]);
}

#[test]
fn pipeline_parallel() {
    let stages = |schedule: &str| format!("parallelism.pipeline={{{schedule}}}");
    for schedule in [
        "stages: 2, schedule: gpipe",
        "stages: 2, schedule: 1f1b",
        "stages: 4, schedule: 1f1b",
        "stages: 2, schedule: interleaved-1f1b, virtual_stages: 2",
        "stages: 2, schedule: zero-bubble",
        "stages: 2, schedule: zero-bubble, virtual_stages: 2",
    ] {
        check(&[&[&stages(schedule)], &[&stages(schedule), "model.tied_embeddings=true"]]);
    }
    let tensor = "parallelism.tensor=2";
    check(&[&[&stages("stages: 2"), tensor], &[&stages("stages: 2"), tensor, "model.layers=6"]]);
}

#[test]
fn replicas() {
    check(&[
        &["parallelism.replicate=2"],
        &["parallelism.replicate=4"],
        // Three does not divide the buckets evenly, of which one is long enough for the ring.
        &["parallelism.replicate=3", "training.global_batch=6", "model.vocab_size=67"],
        &["parallelism.replicate=2", "precision.compute=bf16"],
    ]);
}

#[test]
fn sharded_data_parallel() {
    for level in [
        "optimizer",
        "gradients",
        "gradients, reshard_after_forward: true",
        "parameters",
        "parameters, reshard_after_forward: true",
    ] {
        let shard = |ranks: usize| format!("parallelism.shard={{ranks: {ranks}, level: {level}}}");
        let (two, four) = (shard(2), shard(4));
        check(&[
            &[&two],
            &[&four],
            &[&two, "parallelism.replicate=2"],
            &[&two, "parallelism.recompute=full"],
            &[&two, "parallelism.recompute=selective"],
            &[&two, "model.tied_embeddings=true"],
            &[&two, "precision.compute=bf16"],
        ]);
    }
}

#[test]
fn shards_in_a_pipeline() {
    for level in ["optimizer", "gradients", "parameters"] {
        let shard = format!("parallelism.shard={{ranks: 2, level: {level}}}");
        for schedule in [
            "stages: 2, schedule: gpipe",
            "stages: 2, schedule: 1f1b",
            "stages: 2, schedule: interleaved-1f1b, virtual_stages: 2",
            "stages: 2, schedule: zero-bubble",
        ] {
            let pipeline = format!("parallelism.pipeline={{{schedule}}}");
            check(&[
                &[&shard, &pipeline],
                &[&shard, &pipeline, "parallelism.recompute=full"],
                &[&shard, &pipeline, "model.tied_embeddings=true"],
            ]);
        }
    }
}

#[test]
fn recomputation() {
    for recompute in ["selective", "full"] {
        let recompute = format!("parallelism.recompute={recompute}");
        check(&[
            &["parallelism.tensor=2", &recompute],
            &["parallelism.tensor=2", "parallelism.sequence=false", &recompute],
            &["parallelism.replicate=2", &recompute],
        ]);
    }
}

#[test]
fn combined() {
    check(&[
        &["parallelism={tensor: 2, context: 2, shard: {ranks: 2, level: parameters}, \
           recompute: full}"],
        &["parallelism={tensor: 2, pipeline: {stages: 2, schedule: zero-bubble}, replicate: 2}"],
        &[
            "parallelism={tensor: 4, pipeline: {stages: 2}, recompute: selective}",
            "model.tied_embeddings=true",
        ],
        &["parallelism={context: 2, pipeline: {stages: 2, schedule: interleaved-1f1b, \
           virtual_stages: 2}, shard: {ranks: 2, level: gradients}}"],
    ]);
}

/// Gloo's connections are given the bytes that the threads' memory is.
#[test]
fn over_gloo() {
    check_at(
        || meeting().over_gloo(),
        &[
            &["parallelism={tensor: 2, pipeline: {stages: 2, schedule: interleaved-1f1b, \
               virtual_stages: 2}, shard: {ranks: 2, level: parameters}}"],
            &["parallelism={context: 2, replicate: 2}", "precision.compute=bf16"],
        ],
    );
}
