//! Initial weights depend on the seed and the unfused tensor's name, not on fusion or format.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{small_config, small_model};
use model::llama::init::fill_normal;
use run_config::ComputeDtype;
use torch_shim::tch::{Kind, Tensor};

/// Compares every tensor with a fill of its own name, element for element.
fn check(compute: ComputeDtype) {
    let config = small_config();
    let (_, set) = small_model(&config, compute);
    for (spec, parameter) in model_spec::parameters(&config).iter().zip(set.iter()) {
        if spec.norm {
            assert!(parameter.master.eq(1.0).all().int64_value(&[]) == 1, "{}", spec.name);
            continue;
        }
        for part in &spec.parts {
            let rows = parameter.master.narrow(0, part.row_start as i64, part.row_count as i64);
            let mut expected = vec![0.0; rows.numel()];
            fill_normal(11, &part.hf_name, config.init_std, 0, &mut expected);
            let ours = Vec::<f32>::try_from(rows.to_kind(Kind::Float).contiguous().view([-1]));
            assert!(ours.unwrap() == expected, "{}", part.hf_name);
        }
    }
}

#[test]
fn fusion_changes_no_value() {
    check(ComputeDtype::Fp32);
    check(ComputeDtype::Fp64);
    check(ComputeDtype::Bf16);
}

#[test]
fn the_compute_copy_follows_the_master() {
    for compute in [ComputeDtype::Fp32, ComputeDtype::Fp64, ComputeDtype::Bf16] {
        let (_, set) = small_model(&small_config(), compute);
        for parameter in set.iter() {
            let expected = parameter.master.to_kind(parameter.compute.kind());
            let difference: Tensor = (&parameter.compute - expected).abs().max();
            assert_eq!(difference.double_value(&[]), 0.0, "{}", parameter.name);
        }
    }
}
