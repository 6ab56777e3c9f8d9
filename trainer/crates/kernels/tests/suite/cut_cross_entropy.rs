//! Cross-entropy over a vocabulary that is cut over ranks, which are tried one after another: what
//! goes over them is reduced here.

use kernels::ops::cross_entropy;
use kernels::ops::cross_entropy::NO_TARGET;
use kernels::ops::cut_cross_entropy::{Gauged, Part, cross_entropy as cut, gauge, rescale};
use kernels::{Kernels, Storage};
use torch_shim::tch::{Kind, Tensor};

use super::cross_entropy::{SCALE, judge, problem, sums};
use super::{Extent, exact, random, same, shifted};

/// Rows and tokens of a rank: no whole vectors, more rows than blocks, more than a block takes at
/// once.
const SHAPES: [[i64; 2]; 5] = [[3, 1], [4, 7], [40, 37], [9, 512], [2, 4501]];
/// Llama 3's vocabulary, on eight ranks.
const LLAMA: i64 = 16_032;

/// All shapes and formats, 1, 2 and 4 ranks; the largest share of the tolerance that was used.
pub fn check(kernels: &Kernels, extent: Extent) -> f64 {
    let mut worst: f64 = 0.0;
    for &storage in Storage::ALL {
        for ranks in [1, 2, 4] {
            for shape in SHAPES {
                worst = worst.max(case(kernels, storage, ranks, shape, 0));
            }
            worst = worst.max(case(kernels, storage, ranks, [3, 64], 1));
        }
        if extent == Extent::Full {
            worst = worst.max(case(kernels, storage, 8, [512, LLAMA], 0));
        }
        no_targets(kernels, storage);
        refused(kernels, storage);
    }
    worst
}

/// What each rank has of the whole logits, in memory of its own.
fn parts(logits: &Tensor, ranks: i64, offset: i64) -> Vec<(Tensor, Part)> {
    let vocabulary = logits.size()[1];
    let width = vocabulary / ranks;
    let part = |rank: i64| {
        let first = rank * width;
        let own = logits.narrow(1, first, width).contiguous();
        (shifted(&own, offset), Part { first, vocabulary })
    };
    (0..ranks).map(part).collect()
}

/// Losses of each rank, whose logits become gradients where they are wanted.
fn run(
    kernels: &Kernels,
    parts: &[(Tensor, Part)],
    targets: &Tensor,
    gradients: bool,
) -> Vec<Tensor> {
    let gauged: Vec<Gauged> =
        parts.iter().map(|(own, part)| gauge(kernels, own, targets, *part).unwrap()).collect();
    let maxima: Vec<&Tensor> = gauged.iter().map(|gauged| &gauged.maxima).collect();
    let largest = Tensor::stack(&maxima, 0).amax([0].as_slice(), false);
    let rescaled = gauged.iter().map(|gauged| {
        rescale(kernels, gauged, &largest).unwrap();
        gauged.sums.shallow_clone()
    });
    let sums = rescaled.reduce(|sum, sums| sum + sums).unwrap();
    let finish = |(own, part): &(Tensor, Part)| {
        cut(kernels, (own, targets, *part), (&largest, &sums), SCALE, gradients).unwrap()
    };
    parts.iter().map(finish).collect()
}

fn case(
    kernels: &Kernels,
    storage: Storage,
    ranks: i64,
    [rows, width]: [i64; 2],
    offset: i64,
) -> f64 {
    let (logits, targets) = problem(kernels, storage, [rows, ranks * width]);
    let parts = parts(&logits, ranks, offset);
    let quiet = run(kernels, &parts, &targets, false);
    for (rank, (own, part)) in parts.iter().enumerate() {
        same("logits without gradients", own, &logits.narrow(1, part.first, width).contiguous());
        same("losses of all ranks", &quiet[rank], &quiet[0]);
    }
    let losses = run(kernels, &parts, &targets, true);
    for losses in &losses {
        same("losses with and without gradients", losses, &quiet[0]);
    }
    let own: Vec<&Tensor> = parts.iter().map(|(own, _)| own).collect();
    let gradients = Tensor::cat(&own, 1);
    if ranks == 1 {
        let whole = shifted(&logits, offset);
        let want = cross_entropy::cross_entropy(kernels, &whole, &targets, SCALE, true).unwrap();
        same("losses of one rank", &losses[0], &want);
        same("gradients of one rank", &gradients, &whole);
    }
    // Besides a block's sum: an exponential and its product, whose own |x| is within the range
    // again, and the sum over the ranks. The range is counted twice already, of which a rank's own
    // exponentials use up what is left of it below the largest of all.
    let sums = sums(storage, width) + 5.0 + ranks as f64;
    judge(storage, (&logits, &targets), (&losses[0], &gradients), sums)
}

/// Rows without a target count for nothing on any rank, whatever their logits are, and one outside
/// the vocabulary is not overlooked.
fn no_targets(kernels: &Kernels, storage: Storage) {
    let logits = random(kernels, &[4, 42], storage.kind());
    let _ = logits.get(0).fill_(f64::NAN);
    let targets = Tensor::from_slice(&[NO_TARGET, 42, -1, 41]).to_device(kernels.device());
    let parts = parts(&logits, 2, 0);
    for (rank, losses) in run(kernels, &parts, &targets, true).iter().enumerate() {
        let (losses, own) = (exact(losses), exact(&parts[rank].0));
        assert_eq!(losses.double_value(&[0]), 0.0);
        assert_eq!(own.get(0).abs().max().double_value(&[]), 0.0);
        for row in [1, 2] {
            assert!(losses.double_value(&[row]).is_nan(), "row {row}");
            assert_eq!(own.get(row).isnan().sum(Kind::Int64).int64_value(&[]), 21, "row {row}");
        }
        assert!(losses.double_value(&[3]).is_finite());
    }
}

/// A part that is not within the vocabulary.
fn refused(kernels: &Kernels, storage: Storage) {
    let logits = random(kernels, &[1, 8], storage.kind());
    let targets = Tensor::from_slice(&[3_i64]).to_device(kernels.device());
    for (first, vocabulary) in [(-1, 16), (9, 16), (0, 7)] {
        let part = Part { first, vocabulary };
        let text = gauge(kernels, &logits, &targets, part).unwrap_err().to_string();
        assert!(text.contains("expected 8 tokens within"), "{text}");
    }
}
