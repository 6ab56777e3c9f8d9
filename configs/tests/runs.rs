//! Every ready config loads.

use run_config::RunConfig;
use std::path::Path;

#[test]
fn every_ready_config_loads() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("runs");
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let loaded = RunConfig::load(&path, &[]).unwrap_or_else(|e| panic!("{e}"));
        assert!(loaded.config.training.steps > 0);
    }
}
