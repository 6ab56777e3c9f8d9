//! Whether the memory that ranks are predicted to take is there: this machine's, or its GPUs'. A
//! warning and no error, for the prediction is one.

use crate::check::gibibytes;
use crate::health;
use crate::machine::num_gpus;
use layout::communication::LayoutError;
use layout::memory::memory_of_stage;
use layout::{Axis, Mesh};
use run_config::{DeviceKind, Note, NoteLevel, Place, Recompute, RunConfig};
use std::path::Path;

/// Memory that there is.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Room {
    bytes: u64,
    /// Whose it is, before the bytes.
    of: &'static str,
}

/// A warning where the ranks of a node of `config` do not fit this machine, by the prediction.
///
/// # Errors
/// Where the layout cannot be; a checked config's can.
pub fn notes(config: &RunConfig, mesh: &Mesh) -> Result<Option<Note>, LayoutError> {
    let gpus = match config.cluster.device {
        DeviceKind::Cpu => 0,
        DeviceKind::Auto | DeviceKind::Cuda => num_gpus(),
    };
    let room = match (gpus, config.cluster.device) {
        (0, DeviceKind::Cuda) => None,
        (0, _) => of_machine(Path::new("/")),
        _ => health::gpus::least_memory().map(|bytes| Room { bytes, of: "a GPU here has" }),
    };
    let Some(room) = room else { return Ok(None) };
    let of_stage = |stage| Ok(memory_of_stage(config, mesh, stage)?.total());
    let stages: Vec<u64> =
        (0..mesh.degree(Axis::Pipeline)).map(of_stage).collect::<Result<_, LayoutError>>()?;
    let on_node = mesh.size() / config.cluster.nodes.max(1);
    // Where there are fewer GPUs than ranks, neighbours share one.
    let together = if gpus == 0 { on_node } else { on_node.div_ceil(gpus) };
    let bytes = |rank| stages.get(mesh.coordinate(rank, Axis::Pipeline)).copied().unwrap_or(0);
    let ranks: Vec<u64> = (0..mesh.size()).map(bytes).collect();
    let fullest = ranks.chunks(together.max(1)).max_by_key(|ranks| total(ranks));
    Ok(fullest.and_then(|ranks| compare(config, mesh, ranks, &room)))
}

fn total(ranks: &[u64]) -> u64 {
    ranks.iter().fold(0, |sum, bytes| sum.saturating_add(*bytes))
}

/// Ranks, by their bytes, against the room that they have together.
fn compare(config: &RunConfig, mesh: &Mesh, ranks: &[u64], room: &Room) -> Option<Note> {
    let all = total(ranks);
    if all <= room.bytes {
        return None;
    }
    let (least, most) = (ranks.iter().min()?, ranks.iter().max()?);
    let each = match least == most {
        true => gibibytes(*most),
        false => format!("{} to {}", gibibytes(*least), gibibytes(*most)),
    };
    let sum = match ranks.len() {
        1 => format!("a rank takes about {}", gibibytes(all)),
        count => format!("{count} ranks x {each} are about {}", gibibytes(all)),
    };
    let message = format!(
        "{sum}, and {} {}: less is taken with {}",
        room.of,
        gibibytes(room.bytes),
        less(config, mesh)
    );
    let (level, place) = (NoteLevel::Warning, Place::Default);
    Some(Note { level, place, key: "cluster.ranks_per_node".to_owned(), message })
}

/// What would take less of it.
fn less(config: &RunConfig, mesh: &Mesh) -> String {
    let p = &config.parallelism;
    let replicas = mesh.degree(Axis::Replicate);
    let shards = replicas * p.shard.ranks;
    let ways = [
        (replicas > 1).then(|| {
            format!("replicas as shards (parallelism.shard={{ranks: {shards}, level: parameters}})")
        }),
        (p.recompute != Recompute::Full).then(|| "parallelism.recompute=full".to_owned()),
        (config.training.micro_batch > 1).then(|| "a smaller training.micro_batch".to_owned()),
        Some("more nodes, or a smaller model".to_owned()),
    ];
    ways.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// The memory of this machine, or what its control group allows this process of it. Files are
/// under `root`.
fn of_machine(root: &Path) -> Option<Room> {
    let read = |path: &str| std::fs::read_to_string(root.join(path)).ok();
    let info = read("proc/meminfo")?;
    let kib = info.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = kib.trim().strip_suffix("kB")?.trim().parse().ok()?;
    let machine = Room { bytes: kib.saturating_mul(1 << 10), of: "this machine has" };
    let groups = read("proc/self/cgroup").unwrap_or_default();
    let limits = groups.lines().filter_map(|line| {
        let (_, controllers_and_path) = line.split_once(':')?;
        let (controllers, path) = controllers_and_path.split_once(':')?;
        let is_of_memory = controllers.split(',').any(|controller| controller == "memory");
        let (folder, file) = match (controllers, is_of_memory) {
            ("", _) => ("sys/fs/cgroup", "memory.max"),
            (_, true) => ("sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            _ => return None,
        };
        // A group has at most what those above it have; in a container they are not all seen.
        let all = Path::new(path.trim_start_matches('/')).ancestors();
        let limit = |group: &Path| {
            let file = root.join(folder).join(group).join(file);
            std::fs::read_to_string(file).ok()?.trim().parse::<u64>().ok()
        };
        all.filter_map(limit).min()
    });
    let limit = limits.min().filter(|limit| *limit < machine.bytes);
    Some(limit.map_or(machine, |bytes| Room { bytes, of: "this control group allows" }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(sets: &[&str]) -> RunConfig {
        let text = "name: x\nmodel: {preset: llama3-405b}\n\
                    data: {tokenizer: t, sources: [{name: a, path: b}]}\n\
                    training: {steps: 10, global_batch: 64}\n\
                    cluster: {ranks_per_node: 2, device: cpu}\n";
        let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
        RunConfig::from_yaml_str(text, Path::new("/"), &sets).unwrap().config
    }

    /// What is said of ranks of so many GiB where there are so many.
    fn said(sets: &[&str], ranks: &[u64], room: u64) -> Option<String> {
        let config = config(sets);
        let mesh = Mesh::new(&config.parallelism, config.num_ranks().unwrap()).unwrap();
        let ranks: Vec<u64> = ranks.iter().map(|gib| gib << 30).collect();
        let room = Room { bytes: room << 30, of: "this machine has" };
        compare(&config, &mesh, &ranks, &room).map(|note| note.to_string())
    }

    #[test]
    fn what_fits_is_not_told_of_and_what_does_not_is() {
        assert_eq!(said(&[], &[3, 3], 6), None);
        assert_eq!(
            said(&[], &[3, 3], 5).unwrap(),
            "warning: cluster.ranks_per_node: 2 ranks x 3.00 GiB are about 6.00 GiB, and this \
             machine has 5.00 GiB: less is taken with replicas as shards (parallelism.shard=\
             {ranks: 2, level: parameters}), parallelism.recompute=full, more nodes, or a smaller \
             model"
        );
        let sets = [
            "parallelism={tensor: 2, recompute: full}",
            "training.micro_batch=4",
            "data.sequence_length=64",
        ];
        assert_eq!(
            said(&sets, &[3, 4], 6).unwrap(),
            "warning: cluster.ranks_per_node: 2 ranks x 3.00 GiB to 4.00 GiB are about 7.00 GiB, \
             and this machine has 6.00 GiB: less is taken with a smaller training.micro_batch, \
             more nodes, or a smaller model"
        );
        let one = said(&sets, &[7], 6).unwrap();
        assert!(one.contains("a rank takes about 7.00 GiB, and this machine has 6.00"), "{one}");
    }

    /// The 405B needs thousands of GiB, which no machine of these tests has.
    #[test]
    fn this_machine_is_asked() {
        let check = |sets: &[&str]| {
            let config = config(sets);
            let mesh = Mesh::new(&config.parallelism, config.num_ranks().unwrap()).unwrap();
            notes(&config, &mesh).unwrap().map(|note| note.message)
        };
        let note = check(&[]).unwrap();
        assert!(note.starts_with("2 ranks x 7"), "{note}");
        let small = "model={dim: 64, layers: 2, heads: 4, kv_heads: 2, ffn_dim: 172, \
                     vocab_size: 512}";
        assert_eq!(check(&[small]), None);
        // Of two nodes, each has half of the stages, and of the ranks.
        let note = check(&["cluster.nodes=2", "parallelism.pipeline.stages=4"]).unwrap();
        assert!(note.starts_with("2 ranks x "), "{note}");
    }

    #[test]
    fn a_control_group_may_allow_less() {
        let folder = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let check = |mib: u64, of: &'static str| {
            let expected = Some(Room { bytes: mib << 20, of });
            assert_eq!(of_machine(folder.path()), expected);
        };
        assert_eq!(of_machine(folder.path()), None);
        write("proc/meminfo", "MemTotal:        8388608 kB\nMemFree:         1048576 kB\n");
        check(8192, "this machine has");
        write("proc/self/cgroup", "0::/a/b\n");
        write("sys/fs/cgroup/a/b/memory.max", "max\n");
        check(8192, "this machine has");
        write("sys/fs/cgroup/a/memory.max", "2147483648\n");
        check(2048, "this control group allows");
        write("sys/fs/cgroup/a/b/memory.max", "1073741824\n");
        check(1024, "this control group allows");
        // The first version of control groups; its word for no limit is a large number.
        write("proc/self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/c\n0::/\n");
        write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
        check(8192, "this machine has");
        write("sys/fs/cgroup/memory/c/memory.limit_in_bytes", "536870912\n");
        check(512, "this control group allows");
    }
}
