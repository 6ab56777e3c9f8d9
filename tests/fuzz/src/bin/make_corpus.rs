//! Writes each target's first inputs, which are valid, into the corpus; what is there stays.

use std::path::Path;

fn main() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for target in fuzz_targets::TARGETS {
        let folder = corpus.join(target.name);
        std::fs::create_dir_all(&folder).unwrap_or_else(|error| panic!("{error}"));
        for (number, bytes) in (target.seeds)().into_iter().enumerate() {
            let path = folder.join(format!("seed-{number}"));
            std::fs::write(&path, bytes).unwrap_or_else(|error| panic!("{error}"));
        }
    }
}
