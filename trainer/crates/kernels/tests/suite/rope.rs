//! RoPE: forward in place, backward from gradients of any strides.

use kernels::ops::rope::{Layout, Tables, backward, forward, reference};
use kernels::{Kernels, Storage};
use torch_shim::autograd;
use torch_shim::tch::{Kind, Tensor};

use super::{Extent, begin, close, exact, leaf, random, same, shifted};

/// Batch, sequence, heads, key and value heads, head_dim: no whole vectors, whole ones, many heads.
const SHAPES: [[i64; 5]; 6] = [
    [1, 1, 1, 1, 2],
    [2, 5, 3, 1, 6],
    [2, 7, 4, 2, 16],
    [1, 9, 32, 8, 128],
    [3, 4, 2, 2, 64],
    [1, 3, 5, 5, 20],
];

/// All shapes and formats; the largest share of the tolerance that was used.
pub fn check(kernels: &Kernels, extent: Extent) -> f64 {
    let mut worst: f64 = 0.0;
    for &storage in Storage::ALL {
        for shape in SHAPES {
            for has_rows in [false, true] {
                worst = worst.max(case(kernels, storage, shape, has_rows, 0));
            }
        }
        worst = worst.max(case(kernels, storage, [2, 3, 2, 1, 32], true, 1));
        if extent == Extent::Full {
            worst = worst.max(case(kernels, storage, [2, 512, 32, 8, 128], false, 0));
        }
    }
    worst
}

fn case(
    kernels: &Kernels,
    storage: Storage,
    [batch, sequence, heads, kv_heads, head_dim]: [i64; 5],
    has_rows: bool,
    offset: i64,
) -> f64 {
    begin();
    let kind = storage.kind();
    let layout = Layout { heads, kv_heads, head_dim };
    let width = (heads + 2 * kv_heads) * head_dim;
    let qkv = shifted(&random(kernels, &[batch, sequence, width], kind), offset);
    let half_shape = match has_rows {
        true => vec![batch, sequence, head_dim / 2],
        false => vec![sequence, head_dim / 2],
    };
    let half = random(kernels, &half_shape, Kind::Double) * 3.0;
    let table = |x: Tensor| {
        let x = x.to_kind(storage.wide());
        Tensor::cat(&[&x, &x], -1)
    };
    let (cos, sin) = (table(half.cos()), table(half.sin()));
    let (exact_cos, exact_sin) = (exact(&cos), exact(&sin));
    let exact_tables = Tables { cos: &exact_cos, sin: &exact_sin };
    let twin = leaf(&qkv);
    let want = reference(&twin, exact_tables, layout).unwrap();
    // Without cancelling: each element is a sum of two products.
    let (abs_cos, abs_sin) = (exact_cos.abs(), exact_sin.abs());
    let turned = |x: &Tensor, cos: &Tensor, sin: &Tensor| {
        let halves = x.chunk(2, -1);
        x * cos + Tensor::cat(&[&halves[1], &halves[0]], -1) * sin
    };
    // [B, H, S, E] with tables [S, E] or [B, S, E].
    let spread = |table: &Tensor| if has_rows { table.unsqueeze(1) } else { table.shallow_clone() };
    let (abs_cos, abs_sin) = (spread(&abs_cos), spread(&abs_sin));

    let values = exact(&qkv);
    let got = forward(kernels, &qkv, Tables { cos: &cos, sin: &sin }, layout).unwrap();
    let plain = values.view([batch, sequence, -1, head_dim]).transpose(1, 2).abs();
    let first = [0, heads, heads + kv_heads];
    let mut worst: f64 = 0.0;
    for (index, (got, want)) in got.iter().zip(&want).enumerate() {
        let part = plain.narrow(1, first[index], want.size()[1]);
        if index == 2 {
            same("values", got, &want.to_kind(kind));
            continue;
        }
        // Two products and a sum.
        let terms = turned(&part, &abs_cos, &abs_sin);
        worst = worst.max(close("turned", storage, (got, want), (2.0, &terms)));
    }

    // Gradients as attention gives them, by [B, S, H, E] and by [B, H, S, E], and with gaps.
    let gradient = |heads: i64, how: usize| match how {
        0 => random(kernels, &[batch, heads, sequence, head_dim], kind),
        1 => random(kernels, &[batch, sequence, heads, head_dim], kind).transpose(1, 2),
        _ => random(kernels, &[batch, heads, head_dim, sequence], kind).transpose(2, 3),
    };
    for how in 0..3 {
        let given = [gradient(heads, how), gradient(kv_heads, 1), gradient(kv_heads, 2 - how)];
        let twin = leaf(&qkv);
        let out = reference(&twin, exact_tables, layout).unwrap();
        let exact_given: Vec<Tensor> = given.iter().map(exact).collect();
        let outputs: Vec<&Tensor> = out.iter().collect();
        autograd::backward(&outputs, &exact_given.iter().collect::<Vec<_>>()).unwrap();
        let tables = Tables { cos: &cos, sin: &sin };
        let got = backward(kernels, [&given[0], &given[1], &given[2]], tables, layout).unwrap();
        let turned_parts: Vec<Tensor> = exact_given[..2]
            .iter()
            .map(|part| turned(&part.abs(), &abs_cos, &abs_sin))
            .chain([exact_given[2].abs()])
            .map(|part| part.transpose(1, 2).flatten(2, -1))
            .collect();
        let terms = Tensor::cat(&turned_parts, -1);
        worst = worst.max(close("dqkv", storage, (&got, &twin.grad()), (2.0, &terms)));
    }
    worst
}
