//! The packed form against the plain attention over the full matrix of scores.

use super::*;
use crate::fused::reference;
use tch::no_grad;

struct Case {
    batch: i64,
    heads: (i64, i64),
    sequence: i64,
    width: i64,
    documents: Vec<Vec<i64>>,
}

fn values(case: &Case, heads: i64, seed: i64) -> Tensor {
    tch::manual_seed(seed);
    let shape = [case.batch, case.sequence, heads, case.width];
    let x = Tensor::randn(shape, (Kind::Double, Device::Cpu)).transpose(1, 2);
    x.set_requires_grad(true)
}

/// Values and gradients, of both.
fn check(case: &Case) {
    let (heads, kv_heads) = case.heads;
    let inputs = [values(case, heads, 1), values(case, kv_heads, 2), values(case, kv_heads, 3)];
    let documents = Documents::from_lengths(case.documents.clone());
    let packed = Packed::new(&documents, case.batch, case.sequence, Device::Cpu).unwrap();
    assert_eq!(packed.is_none(), documents.is_causal());
    let [q, k, v] = &inputs;
    let ours = attention(Kernel::Plain, q, k, v, packed.as_ref()).unwrap();
    let theirs = reference::attention(q, k, v, &documents).unwrap();
    let weight = no_grad(|| Tensor::randn_like(&theirs));
    let gradients = |out: &Tensor| {
        let all = autograd::gradients(&[out], &[&weight], &[q, k, v], false).unwrap();
        all.into_iter().map(Option::unwrap).collect::<Vec<_>>()
    };
    let (ours_too, theirs_too) = (gradients(&ours), gradients(&theirs));
    let pairs = std::iter::once((&ours, &theirs)).chain(ours_too.iter().zip(&theirs_too));
    for (index, (ours, theirs)) in pairs.enumerate() {
        assert_eq!(ours.size(), theirs.size());
        let worst = (ours - theirs).abs().max().double_value(&[]);
        assert!(worst < 1e-12, "tensor {index} differs by {worst:e}");
    }
}

#[test]
fn packed_attention_is_plain_attention_within_documents() {
    let case = |documents: &[&[i64]], heads, width| Case {
        batch: documents.len() as i64,
        heads,
        sequence: documents[0].iter().sum(),
        width,
        documents: documents.iter().map(|row| row.to_vec()).collect(),
    };
    check(&case(&[&[12]], (2, 2), 4));
    check(&case(&[&[12], &[12]], (4, 2), 4));
    check(&case(&[&[1, 5, 6], &[12]], (4, 2), 4));
    check(&case(&[&[1, 1, 1], &[2, 1], &[1, 2]], (6, 2), 8));
    check(&case(&[&[7, 2, 30, 1, 24], &[40, 24], &[64]], (8, 1), 16));
}

#[test]
fn places_of_documents_go_on_from_row_to_row() {
    let documents = Documents::from_lengths(vec![vec![3, 1], vec![4], vec![1, 2, 1]]);
    let packed = Packed::new(&documents, 3, 4, Device::Cpu).unwrap().unwrap();
    assert_eq!((packed.starts.kind(), packed.longest), (Kind::Int, 4));
    assert_eq!(Vec::<i32>::try_from(&packed.starts).unwrap(), [0, 3, 4, 8, 9, 11, 12]);
    assert!(Packed::new(&documents, 2, 4, Device::Cpu).is_err());
    assert!(Packed::new(&documents, 3, 5, Device::Cpu).is_err());
    assert!(Packed::new(&Documents::causal(), 3, 4, Device::Cpu).unwrap().is_none());
}

#[test]
fn a_pass_without_gradients_keeps_nothing_and_one_backward_is_all() {
    let documents = vec![vec![5, 3]];
    let case = Case { batch: 1, heads: (2, 1), sequence: 8, width: 4, documents };
    let [q, k, v] = [values(&case, 2, 1), values(&case, 1, 2), values(&case, 1, 3)];
    let packed = Packed::new(&Documents::from_lengths(case.documents), 1, 8, Device::Cpu).unwrap();
    let run = || attention(Kernel::Plain, &q, &k, &v, packed.as_ref()).unwrap();
    let without = no_grad(run);
    assert!(!without.requires_grad());
    let with = run();
    assert!(with.equal(&without));
    with.sum(Kind::Double).backward();
    assert!(q.grad().defined() && k.grad().size() == [1, 1, 8, 4]);
}

#[test]
fn the_plain_form_is_no_misbehaviour_and_an_absent_kernel_is() {
    for is_packed in [false, true] {
        let heads = (4, 2, 32);
        let told = |kernel| misbehaviour(kernel, heads, Device::Cpu, is_packed).unwrap();
        assert_eq!(told(Kernel::Plain), None);
        // libtorch has none on a CPU.
        assert!(told(Kernel::Flash).is_some() && told(Kernel::Cudnn).is_some());
    }
    let wrong = |factor: f64| {
        let one = |_| Tensor::ones([4], (Kind::Float, Device::Cpu));
        let all = || (0..4).map(one).collect::<Vec<_>>();
        let off: Vec<Tensor> = all().into_iter().map(|x| x * factor).collect();
        compare(&(off, all()), &all()).unwrap()
    };
    assert!(wrong(1.1).unwrap().contains("off by 1.0e-1"));
    assert!(wrong(f64::NAN).unwrap().contains("off by NaN"));
    assert!(wrong(1.0 + 1e-6).unwrap().contains("not the same twice"));
    assert_eq!(wrong(1.0), None);
}

#[test]
fn kernels_take_half_precision_of_some_widths() {
    let check = |kind, width, expected| {
        let q = Tensor::empty([1, 1, 1, width], (kind, Device::Cpu));
        assert_eq!(takes(&q), expected, "{kind:?} {width}");
    };
    check(Kind::BFloat16, 128, true);
    check(Kind::BFloat16, 256, true);
    check(Kind::BFloat16, 260, false);
    check(Kind::BFloat16, 20, false);
    check(Kind::Float, 128, false);
    check(Kind::Double, 64, false);
}
