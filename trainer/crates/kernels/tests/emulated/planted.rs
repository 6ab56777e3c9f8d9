//! Errors planted in the kernels' texts, one at a time: the suite finds each. An index that is off
//! by one, a barrier that is missing, a term that is left out.

use std::panic::catch_unwind;

use kernels::Kernels;

use super::emulator::{self, Planted};
use super::suite::{self, Extent};

type Check = fn(&Kernels);

const SMALL: Extent = Extent::Small;

/// Plants each and runs what should find it.
fn all_are_found(planted: &[Planted], check: Check) {
    for &(old, new) in planted {
        let holds = kernels::ops::PROGRAMS.iter().any(|program| {
            let variant = kernels::Variant::all(program)[0];
            variant.text().contains(old)
        });
        assert!(holds, "no kernel holds {old:?} any more");
        let outcome = catch_unwind(|| check(&emulator::kernels(Some((old, new)))));
        let Err(text) = outcome else { panic!("{new:?} in place of {old:?} was not found") };
        let text = text.downcast_ref::<String>().map_or("an assertion", String::as_str);
        // That would be no finding.
        assert!(!text.contains("host compiler"), "{new:?} in place of {old:?}: {text}");
        println!("found: {old:?} -> {new:?}: {text}");
    }
}

#[test]
fn in_reductions_and_rms_norm() {
    let planted = [
        ("if (at < width) body(at, item);", "if (at + kStep < width) body(at, item);"),
        ("if (at < width) body(at, item);", "if (at <= width) body(at, item);"),
        ("  __syncthreads();  // the scratch may still be read by the reduction before\n", ""),
        ("  __syncthreads();\n  return warp_sum(", "  return warp_sum("),
        (
            "for (int distance = kWarp / 2; distance > 0;",
            "for (int distance = kWarp / 4; distance > 0;",
        ),
        ("row < rows; row += kWarps) sum", "row + 1 < rows; row += kWarps) sum"),
        ("  sums[warp][lane] = sum;\n  __syncthreads();", "  sums[warp][lane] = sum;"),
        ("reciprocal[row] = scale;", "reciprocal[row + 1] = scale;"),
        ("- unit[item + lane] * projection", "+ unit[item + lane] * projection"),
    ];
    all_are_found(&planted, |kernels| {
        suite::rms_norm::check(kernels, SMALL);
    });
}

#[test]
fn in_rope() {
    let planted = [
        ("turned = sign * s[lane]", "turned = s[lane]"),
        ("load<kVector>(from + half, second);", "load<kVector>(from + half + 1, second);"),
        ("(has_rows ? token : position) * head_dim;", "position * head_dim;"),
        ("(head - heads) * at_k.head", "head * at_k.head"),
        ("position * at_q.token + head", "token * at_q.token + head"),
    ];
    all_are_found(&planted, |kernels| {
        suite::rope::check(kernels, SMALL);
    });
}

#[test]
fn in_swiglu() {
    let planted = [
        ("(s + silu * ((Wide)1 - s))", "s"),
        ("gate_up + (2 * row + 1) * width + at, up);", "gate_up + 2 * row * width + at, up);"),
        ("at < width; at += (i64)gridDim.x", "at + kStep < width; at += (i64)gridDim.x"),
    ];
    all_are_found(&planted, |kernels| {
        suite::swiglu::check(kernels, SMALL);
    });
}

#[test]
fn in_cross_entropy() {
    let planted = [
        ("sum = sum * exponential(maximum - most) + more;", "sum = sum + more;"),
        ("if (at + lane == target)", "if (at + lane + 1 == target)"),
        ("if (at == target) x -=", "if (at + 1 == target) x -="),
        ("int first = off == 0 ? 0 : kLanes - off;", "int first = off;"),
        (
            "at < width; at += (int)blockDim.x) element(at);",
            "at + 1 < width; at += (int)blockDim.x) element(at);",
        ),
        ("target == -100 ? (Wide)0 : (Wide)__uint_as_float(0x7fc00000u)", "(Wide)0"),
    ];
    all_are_found(&planted, |kernels| {
        suite::cross_entropy::check(kernels, SMALL);
    });
}

#[test]
fn in_cut_cross_entropy() {
    let planted = [
        ("if (at >= 0 && at < width) at_target", "if (at > 0 && at < width) at_target"),
        ("if (at >= 0 && at < width) at_target", "if (at >= 0 && at <= width) at_target"),
        ("sums[row] *= exponential(maxima[row] - largest[row]);", ""),
        ("width, target - first, most,", "width, target, most,"),
        ("sums[rows + row] = at_target;", "sums[rows + row] = at_target - most;"),
        (
            "logarithm(sum) + most - sums[rows + row] : untargeted(target);",
            "logarithm(sum) + most - sums[rows + row] : (Wide)0;",
        ),
        (
            "bool is_target = target >= 0 && target < vocabulary;",
            "bool is_target = target != -100;",
        ),
        (
            "row < rows; row += gridDim.x * (i64)blockDim.x)",
            "row + 1 < rows; row += gridDim.x * (i64)blockDim.x)",
        ),
    ];
    all_are_found(&planted, |kernels| {
        suite::cut_cross_entropy::check(kernels, SMALL);
    });
}

#[test]
fn in_embedding() {
    let planted = [
        ("while (end < count && tokens[end] == token) end++;", ""),
        ("(begin > 0 && tokens[begin - 1] == token)", "false"),
        ("while (end < count && tokens", "while (tokens"),
    ];
    all_are_found(&planted, |kernels| {
        suite::embedding::check(kernels, SMALL);
    });
}

#[test]
fn in_adamw() {
    let planted = [
        ("chunks[3 * chunk + 2] ? c.decay : (Wide)0", "c.decay"),
        ("if (!(magnitude(scale) <= (Wide)3.0e38f)) return;", ""),
        ("root(second) * c.correction + c.eps", "root(second) + c.eps"),
        (
            "begin + (end - begin) / kLanes * kLanes : begin;",
            "begin + (end - begin) / kLanes * kLanes - kLanes : begin;",
        ),
        ("i64 whole = begin % kLanes == 0 ?", "i64 whole = true ?"),
    ];
    all_are_found(&planted, |kernels| {
        suite::optimizer::check_adamw(kernels, SMALL);
    });
}

#[test]
fn in_the_gradient_norm() {
    let planted = [
        (
            "at < end; at += (i64)blockDim.x) sum += gradients[at]",
            "at < whole; at += (i64)blockDim.x) sum += gradients[at]",
        ),
        (
            "at < count; at += blockDim.x) sum += partial[at];",
            "at + 1 < count; at += blockDim.x) sum += partial[at];",
        ),
        ("is_finite ? (float)factor : __uint_as_float(0x7fc00000u)", "(float)factor"),
    ];
    all_are_found(&planted, |kernels| {
        suite::optimizer::check_norm(kernels, SMALL);
    });
}

#[test]
fn in_fp8() {
    let planted = [
        ("  __syncthreads();\n  if (rows % 16 == 0", "  if (rows % 16 == 0"),
        ("    __syncthreads();  // the maxima before may still be read\n", ""),
        ("(size + 0x7ffffu + (size >> 20 & 1u)) >> 20", "(size + 0x80000u) >> 20"),
        ("if (size < 0x3c800000u)", "if (size < 0x3d800000u)"),
        ("kTileStride = kTileRows + 4", "kTileStride = kTileRows - 4"),
        ("first + kBand < rows ? first + kBand : rows", "first + kBand"),
    ];
    all_are_found(&planted, |kernels| suite::fp8::check(kernels, SMALL));
}

#[test]
fn in_sums() {
    let planted = [
        ("at < count; at += threads) sum[at]", "at + 1 < count; at += threads) sum[at]"),
        ("? count / kLanes * kLanes : 0;", "? (count + 1) / kLanes * kLanes : 0;"),
    ];
    all_are_found(&planted, |kernels| suite::accumulate::check(kernels, SMALL));
}
