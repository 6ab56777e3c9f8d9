//! SwiGLU: forward and backward.

use kernels::ops::swiglu::{backward, forward, reference};
use kernels::{Kernels, Storage};
use torch_shim::autograd;
use torch_shim::tch::Tensor;

use super::{Extent, begin, close, exact, leaf, random, shifted};

const SHAPES: [&[i64]; 6] = [&[1, 2], &[3, 10], &[2, 3, 32], &[5, 86], &[3, 28672], &[40, 4400]];

/// All shapes and formats; the largest share of the tolerance that was used.
pub fn check(kernels: &Kernels, extent: Extent) -> f64 {
    let mut worst: f64 = 0.0;
    for &storage in Storage::ALL {
        for shape in SHAPES {
            begin();
            let gate_up = random(kernels, shape, storage.kind()) * 3.0;
            worst = worst.max(case(kernels, storage, &gate_up));
        }
        let unaligned = shifted(&random(kernels, &[3, 64], storage.kind()), 1);
        worst = worst.max(case(kernels, storage, &unaligned));
        // Where the exponential overflows, vanishes, and is one.
        let edges = [100.0, -100.0, 0.0, -0.0, 30.0, -30.0, 1e-20, 17.0];
        let edges = Tensor::from_slice(&edges).repeat([2, 2]).to_kind(storage.kind());
        worst = worst.max(case(kernels, storage, &edges.to_device(kernels.device())));
        if extent == Extent::Full {
            let gate_up = random(kernels, &[512, 28672], storage.kind()) * 3.0;
            worst = worst.max(case(kernels, storage, &gate_up));
        }
    }
    worst
}

fn case(kernels: &Kernels, storage: Storage, gate_up: &Tensor) -> f64 {
    let twin = leaf(gate_up);
    let want = reference(&twin).unwrap();
    let got = forward(kernels, gate_up).unwrap();
    // The exponential is off by two units in the last place, which are four roundings; a sum, a
    // quotient, two products.
    let mut worst = close("y", storage, (&got, &want), (8.0, &want.abs()));
    let dy = random(kernels, &want.size(), storage.kind());
    autograd::backward(&[&want], &[&exact(&dy)]).unwrap();
    let got = backward(kernels, &dy, gate_up).unwrap();
    let halves = exact(gate_up).chunk(2, -1);
    let (gate, up, d) = (&halves[0], &halves[1], exact(&dy));
    // dg = d u (s + silu (1 - s)), where 1 - s cancels: s and its difference to one are each off by
    // six roundings of one.
    let sigmoid = gate.sigmoid();
    let silu = (gate * &sigmoid).abs();
    let terms = [(&d * up).abs() * (sigmoid + &silu), d.abs() * silu];
    let terms = Tensor::cat(&terms, -1);
    worst = worst.max(close("dgate_up", storage, (&got, &twin.grad()), (18.0, &terms)));
    worst
}
