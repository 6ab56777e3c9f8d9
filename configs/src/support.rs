//! What a config may say and this version cannot do yet: refused, never ignored. A line goes when
//! the feature comes.

use crate::problem::ProblemKind;
use crate::resolved::*;
use crate::rules::Rules;

/// Refuses each feature that is asked for and not there.
pub(crate) fn check(rules: &mut Rules) {
    let c = &rules.config.cluster;
    let asked: [(bool, &str, &str, &str); 3] = [
        (
            rules.config.checkpoint.memory.every_steps > 0 && c.nodes > 1,
            "checkpoint.memory.every_steps",
            "checkpoints in the memory of more than one node",
            "0",
        ),
        (
            !matches!(c.kind, ClusterKind::Local | ClusterKind::Mpi),
            "cluster.kind",
            "a cluster other than this machine",
            "local or mpi",
        ),
        (
            c.nodes > 1 && c.kind == ClusterKind::Mpi,
            "cluster.nodes",
            "more than one node under MPI",
            "1",
        ),
    ];
    for (_, key, what, only) in asked.into_iter().filter(|(asked, ..)| *asked) {
        refuse(rules, key, what, only);
    }
    for (index, source) in rules.config.data.sources.iter().enumerate() {
        if source.path.starts_with("s3://") {
            let key = format!("data.sources[{index}].path");
            refuse(rules, &key, "reading from S3", "a path on this machine");
        }
    }
}

fn refuse(rules: &mut Rules, key: &str, what: &str, only: &str) {
    let message = format!("not yet supported in this version: {what}");
    rules.report(ProblemKind::Unsupported, &[key], message, only, "");
}
