//! What `ops/fuzz` runs: libFuzzer, with the target that `$PHALANX_FUZZ` names.
#![no_main]

use fuzz_targets::{Target, find};
use std::sync::OnceLock;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    static TARGET: OnceLock<&Target> = OnceLock::new();
    let target = TARGET.get_or_init(|| {
        let name = std::env::var("PHALANX_FUZZ").unwrap_or_default();
        match find(&name) {
            Some(target) => target,
            None => panic!("PHALANX_FUZZ={name:?} names no target"),
        }
    });
    (target.run)(data);
});
