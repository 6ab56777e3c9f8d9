//! Names of the files and folders of checkpoints: one registry.

/// Index of boxes.
pub const INDEX: &str = "index.json";
/// State that is not a tensor.
pub const STATE: &str = "state.json";
/// Every file, with size and checksum.
pub const MANIFEST: &str = "MANIFEST.json";
/// SHA-256 of the manifest, in hexadecimal; written last.
pub const COMMIT: &str = "COMMIT";
/// In the folder of checkpoints: the newest generation that wrote here.
pub const FENCE: &str = ".generation";
/// In the folder of checkpoints: locked while a commit is checked against the fence.
pub const LOCK: &str = ".lock";

/// Folder of a run that holds its checkpoints.
pub const CHECKPOINTS: &str = "checkpoints";

/// Prefix of the FP32 or FP64 master copy of a weight that is computed with in another type.
pub const MASTER: &str = "master/";
/// Prefix of AdamW's first moment.
pub const FIRST_MOMENT: &str = "m/";
/// Prefix of AdamW's second moment.
pub const SECOND_MOMENT: &str = "v/";

/// A checkpoint's folder: `step-0001200`.
pub fn step_folder(step: u64) -> String {
    format!("step-{step:07}")
}

/// The step of a checkpoint's folder, where it is one.
pub fn parse_step_folder(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (step_folder(step) == name).then_some(step)
}

/// The folder a checkpoint is written in: `.step-0001200.g0003.tmp`.
pub fn temporary_folder(step: u64, generation: u64) -> String {
    format!(".{}.g{generation:04}.tmp", step_folder(step))
}

/// A folder on its way out, which once was a checkpoint.
pub fn retired_folder(step: u64, generation: u64) -> String {
    format!(".{}.g{generation:04}.old.tmp", step_folder(step))
}

/// The generation in the name of a temporary or retired folder, where it is one.
pub fn parse_temporary_folder(name: &str) -> Option<u64> {
    let rest = name.strip_prefix(".step-")?.strip_suffix(".tmp")?;
    let rest = rest.strip_suffix(".old").unwrap_or(rest);
    let (step, generation) = rest.split_once(".g")?;
    step.parse::<u64>().ok()?;
    generation.parse().ok()
}

/// A checkpoint's folder in an object store, where nothing can be renamed and so nothing is ever
/// written twice: `step-0001200.g0003`.
pub fn remote_folder(step: u64, generation: u64) -> String {
    format!("{}.g{generation:04}", step_folder(step))
}

/// The step and the generation of a checkpoint's folder in an object store, where it is one.
pub fn parse_remote_folder(name: &str) -> Option<(u64, u64)> {
    let (folder, generation) = name.split_once(".g")?;
    let found = (parse_step_folder(folder)?, generation.parse().ok()?);
    (remote_folder(found.0, found.1) == name).then_some(found)
}

/// The folder of what one node's ranks wrote of a checkpoint, in memory, by the node's place:
/// `step-0001200.g0003.p00002`.
pub fn bundle_folder(step: u64, generation: u64, place: usize) -> String {
    format!("{}.p{place:05}", remote_folder(step, generation))
}

/// The step, generation and place of such a folder, where it is one.
pub fn parse_bundle_folder(name: &str) -> Option<(u64, u64, usize)> {
    let (folder, place) = name.rsplit_once(".p")?;
    let (step, generation) = parse_remote_folder(folder)?;
    let found = (step, generation, place.parse().ok()?);
    (bundle_folder(found.0, found.1, found.2) == name).then_some(found)
}

/// A tensor file of a rank: `rank-00000-000.safetensors`.
pub fn tensor_file(rank: usize, number: usize) -> String {
    format!("rank-{rank:05}-{number:03}.safetensors")
}

/// The rank and the number of a tensor file, where it is one.
pub fn parse_tensor_file(name: &str) -> Option<(usize, usize)> {
    let rest = name.strip_prefix("rank-")?.strip_suffix(".safetensors")?;
    let (rank, number) = rest.split_once('-')?;
    let found = (rank.parse().ok()?, number.parse().ok()?);
    (tensor_file(found.0, found.1) == name).then_some(found)
}

/// A rank's part of the index, which exists until rank 0 has merged it.
pub fn part_file(rank: usize) -> String {
    format!("rank-{rank:05}.part.json")
}

/// Why a rank failed to write its share.
pub fn failure_file(rank: usize) -> String {
    format!("rank-{rank:05}.failed")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_read_back() {
        for step in [0, 1, 1_200, 9_999_999, 10_000_000, u64::MAX] {
            assert_eq!(parse_step_folder(&step_folder(step)), Some(step));
            assert_eq!(parse_temporary_folder(&temporary_folder(step, 3)), Some(3));
            assert_eq!(parse_temporary_folder(&retired_folder(step, 12_345)), Some(12_345));
            assert_eq!(parse_remote_folder(&remote_folder(step, 12_345)), Some((step, 12_345)));
            let bundle = bundle_folder(step, 3, 70_000);
            assert_eq!(parse_bundle_folder(&bundle), Some((step, 3, 70_000)));
            assert_eq!(parse_remote_folder(&bundle), None);
        }
        for name in ["step-0000120.g0001", "step-0000120.g0001.p1", "step-0000120.p00001"] {
            assert_eq!(parse_bundle_folder(name), None, "{name}");
        }
        for name in ["step-0000120", "step-120.g0001", "step-0000120.g1", "step-0000120.g+001"] {
            assert_eq!(parse_remote_folder(name), None, "{name}");
        }
        for name in
            ["step-120", "step-+000120", "step-00000120", ".step-0000120.g0001.tmp", "step-"]
        {
            assert_eq!(parse_step_folder(name), None, "{name}");
        }
        assert_eq!(parse_temporary_folder("step-0000120"), None);
    }

    #[test]
    fn tensor_files_read_back() {
        for (rank, number) in [(0, 0), (7, 12), (123_456, 1_000)] {
            assert_eq!(parse_tensor_file(&tensor_file(rank, number)), Some((rank, number)));
        }
        for name in ["rank-1-0.safetensors", "rank-00001-000", "rank-00001.part.json", "../x"] {
            assert_eq!(parse_tensor_file(name), None, "{name}");
        }
    }
}
