//! What crosses the border: closures, errors, panics, hooks, lists, and the ready hook's timing.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use torch_shim::memory::Meter;
use torch_shim::params::{ParameterSet, ParameterSpec};
use torch_shim::tch::{self, Device, Kind, Tensor};
use torch_shim::{ShimError, autograd, fused, ops};

fn values(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(&tensor.to_kind(Kind::Double).flatten(0, -1)).unwrap()
}

fn spec(name: &str, shape: &[i64]) -> ParameterSpec {
    ParameterSpec { name: name.into(), shape: shape.to_vec(), decay: true }
}

fn set_of(specs: Vec<ParameterSpec>) -> ParameterSet {
    ParameterSet::new(specs, Kind::Float, Kind::Float, Device::Cpu).unwrap()
}

fn square(inputs: &[Option<Tensor>]) -> torch_shim::Result<Vec<Tensor>> {
    Ok(inputs.iter().flatten().map(|x| x * x).collect())
}

#[test]
fn a_custom_function_has_the_given_derivative() {
    let x = Tensor::from_slice(&[1f64, 2.0]).set_requires_grad(true);
    let y =
        autograd::apply(&[&x], 1, square, |g| Ok(vec![g[0].as_ref().map(|g| g * 7.0)])).unwrap();
    assert_eq!(values(&y[0]), [1.0, 4.0]);
    autograd::backward(&[&y[0]], &[&Tensor::from_slice(&[1f64, 10.0])]).unwrap();
    assert_eq!(values(&x.grad()), [7.0, 70.0]);
}

#[test]
fn errors_and_panics_of_closures_come_back() {
    let x = Tensor::from_slice(&[1f64]).set_requires_grad(true);
    let y = autograd::apply(&[&x], 1, square, |_| Err(ShimError::Invalid("peer 3 lost".into())))
        .unwrap();
    let error = autograd::backward(&[&y[0]], &[]).unwrap_err();
    assert!(matches!(&error, ShimError::Closure(text) if text == "peer 3 lost"), "{error:?}");
    let y = autograd::apply(&[&x], 1, square, |_| panic!("boom")).unwrap();
    let error = autograd::backward(&[&y[0]], &[]).unwrap_err();
    assert!(error.to_string().contains("panic: boom"), "{error:?}");
    let error = autograd::apply(&[&x], 2, square, |_| Ok(vec![])).unwrap_err();
    assert!(error.to_string().contains("returned 1 tensors where 2 are wanted"), "{error}");
}

#[test]
fn closures_are_dropped_with_the_graph() {
    let alive = Arc::new(());
    let x = Tensor::from_slice(&[1f64]).set_requires_grad(true);
    {
        let (first, second) = (alive.clone(), alive.clone());
        let forward = move |x: &[Option<Tensor>]| {
            let _ = &first;
            square(x)
        };
        let y = autograd::apply(&[&x], 1, forward, move |_| {
            let _ = &second;
            Ok(vec![None])
        });
        assert!(y.is_ok() && Arc::strong_count(&alive) > 1);
    }
    assert_eq!(Arc::strong_count(&alive), 1);
}

/// x and 2 x, with x^2 saved; the derivative is 100 x^2 whatever the gradients are.
fn saving(x: &Tensor) -> Vec<Tensor> {
    let forward = |x: &[Option<Tensor>]| {
        let x = x[0].as_ref().unwrap();
        Ok(vec![x * 1.0, x * 2.0, x * x])
    };
    let backward = |g: &[Option<Tensor>]| {
        assert_eq!(g.len(), 3);
        assert!(g[0].is_some() && g[1].is_none(), "a gradient that nobody gave is none");
        Ok(vec![g[2].as_ref().map(|saved| saved * 100.0)])
    };
    autograd::apply_saving(&[x], (2, 1), forward, backward).unwrap()
}

#[test]
fn saved_tensors_come_to_backward_and_go_with_it() {
    let x = Tensor::from_slice(&[3f64]).set_requires_grad(true);
    let y = saving(&x);
    assert_eq!((y.len(), values(&y[1])), (2, vec![6.0]));
    let gradients = autograd::gradients(&[&y[0]], &[], &[&x], true).unwrap();
    assert_eq!(values(gradients[0].as_ref().unwrap()), [900.0]);
    autograd::backward(&[&y[0]], &[]).unwrap();
    assert_eq!(values(&x.grad()), [900.0]);
    // The graph is still there, what it saved is not.
    let error = autograd::backward(&[&y[0]], &[]).unwrap_err().to_string();
    assert!(error.contains("a second time"), "{error}");
    // Without gradients nothing is kept, and the values are the same.
    assert_eq!(values(&tch::no_grad(|| saving(&x))[1]), [6.0]);
}

#[test]
fn a_write_behind_libtorchs_back_is_noticed() {
    let x = Tensor::from_slice(&[3f64]).set_requires_grad(true);
    let z = &x * 1.0;
    let y = &z * &z;
    autograd::written(&z).unwrap();
    let error = autograd::backward(&[&y], &[]).unwrap_err().to_string();
    assert!(error.contains("modified by an inplace operation"), "{error}");
}

#[test]
fn hooks_see_and_replace_gradients() {
    let x = Tensor::from_slice(&[3f64]).set_requires_grad(true);
    let calls = Arc::new(AtomicUsize::new(0));
    let counter = calls.clone();
    autograd::post_accumulate_hook(&x, move |leaf| {
        assert!(leaf.grad().defined());
        counter.fetch_add(1, Ordering::SeqCst);
        Ok(())
    })
    .unwrap();
    let y = &x * 2.0;
    autograd::gradient_hook(&y, |g| Ok(Some(g * 5.0))).unwrap();
    autograd::backward(&[&y], &[]).unwrap();
    assert_eq!((values(&x.grad()), calls.load(Ordering::SeqCst)), (vec![10.0], 1));
    assert!(autograd::post_accumulate_hook(&y, |_| Ok(())).is_err());
}

#[test]
fn libtorch_errors_are_one_line() {
    let x = Tensor::zeros([2, 3], (Kind::Float, Device::Cpu));
    let set = set_of(vec![spec("w", &[4, 5])]);
    let error = fused::linear(&x, set.at(0).unwrap()).unwrap_err().to_string();
    assert!(error.contains("mat1 and mat2") && error.lines().count() == 1, "{error}");
}

#[test]
fn adamw_equals_the_formula() {
    let p = Tensor::from_slice(&[1f64, -2.0]);
    let g = Tensor::from_slice(&[0.5f64, 0.25]);
    let (m, v) = (p.zeros_like(), p.zeros_like());
    let (mut expected, mut em, mut ev) = (values(&p), [0.0; 2], [0.0; 2]);
    for step in 1..=3u64 {
        let constants = ops::AdamW {
            learning_rate: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            step,
        };
        ops::fused_adamw(&[&p], &[&g], &[&m], &[&v], &constants, ops::OnDevice::default()).unwrap();
        for i in 0..2 {
            let gradient = values(&g)[i];
            em[i] = 0.9 * em[i] + 0.1 * gradient;
            ev[i] = 0.95 * ev[i] + 0.05 * gradient * gradient;
            let (mh, vh) = (
                em[i] / (1.0 - 0.9f64.powi(step as i32)),
                ev[i] / (1.0 - 0.95f64.powi(step as i32)),
            );
            expected[i] = expected[i] * (1.0 - 0.1 * 0.1) - 0.1 * mh / (vh.sqrt() + 1e-8);
        }
    }
    for (got, expected) in values(&p).iter().zip(expected) {
        assert!((got - expected).abs() < 1e-13, "{got} against {expected}");
    }
}

#[test]
fn adamw_does_what_the_device_decided() {
    let constants = ops::AdamW {
        learning_rate: 0.1,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        step: 1,
    };
    let run = |gradient: f64, on_device: ops::OnDevice<'_>| {
        let p = Tensor::from_slice(&[1f64, -2.0]);
        let g = Tensor::from_slice(&[gradient, 0.25 * gradient]);
        let (m, v) = (p.zeros_like(), p.zeros_like());
        ops::fused_adamw(&[&p], &[&g], &[&m], &[&v], &constants, on_device).unwrap();
        (values(&p), values(&m), values(&v))
    };
    let number = |value: f32| Tensor::from(value);
    let (one, zero, four) = (number(1.0), number(0.0), number(4.0));
    let none = ops::OnDevice::default();
    assert_eq!(run(2.0, ops::OnDevice { held: Some(&zero), ..none }), run(2.0, none));
    let held = run(f64::NAN, ops::OnDevice { held: Some(&one), ..none });
    assert_eq!(held, (vec![1.0, -2.0], vec![0.0; 2], vec![0.0; 2]));
    assert_eq!(run(8.0, ops::OnDevice { divisor: Some(&four), ..none }), run(2.0, none));
    let wide = Tensor::from(1f64);
    let p = Tensor::from_slice(&[1f64]);
    let wrong = ops::OnDevice { held: Some(&wide), ..none };
    let error = ops::fused_adamw(&[&p], &[&p], &[&p], &[&p], &constants, wrong);
    assert!(error.unwrap_err().to_string().contains("one FP32 number"));
}

#[test]
fn norms_and_factors_go_over_lists() {
    let (a, b) = (Tensor::from_slice(&[3f64]), Tensor::from_slice(&[4f64, 0.0]));
    assert_eq!(values(&ops::global_norm(&[&a, &b]).unwrap()), [5.0]);
    ops::foreach_mul(&[&a, &b], 2.0).unwrap();
    ops::foreach_mul_tensor(&[&a, &b], &Tensor::from_slice(&[0.5f64]).squeeze()).unwrap();
    assert_eq!((values(&a), values(&b)), (vec![3.0], vec![4.0, 0.0]));
    assert_eq!(values(&ops::global_norm::<&Tensor>(&[]).unwrap()), [0.0]);
}

#[test]
fn parameters_are_aligned_views_of_the_buffers() {
    let specs = vec![spec("b", &[3, 5]), spec("a", &[7])];
    let set = ParameterSet::new(specs, Kind::BFloat16, Kind::Float, Device::Cpu).unwrap();
    for parameter in set.iter() {
        for tensor in [&parameter.compute, &parameter.master, &parameter.grad] {
            assert_eq!(tensor.data_ptr() as usize % 64, 0, "{}", parameter.name);
        }
        let _ = parameter.master.shallow_clone().fill_(parameter.index as f64 + 1.5);
    }
    assert_eq!(set.iter_by_name().map(|p| p.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    set.refresh_compute().unwrap();
    assert_eq!(values(&set.get("a").unwrap().compute), [2.5; 7]);
    assert_eq!(set.flat_master().sum(Kind::Double).double_value(&[]), 15.0 * 1.5 + 7.0 * 2.5);
    assert_eq!(set.num_elements(), 22);
}

#[test]
fn specs_that_do_not_fit_are_refused() {
    let refused =
        |specs, compute, master| ParameterSet::new(specs, compute, master, Device::Cpu).is_err();
    assert!(refused(vec![spec("w", &[2]), spec("w", &[2])], Kind::Float, Kind::Float));
    assert!(refused(vec![spec("w", &[2])], Kind::Double, Kind::Float));
    assert!(!refused(vec![spec("w", &[4, 2])], Kind::BFloat16, Kind::Float));
}

#[test]
fn the_ready_hook_fires_after_the_last_use() {
    let set = set_of(vec![spec("tied", &[5, 4]), spec("w", &[4, 4])]);
    let order = Arc::new(Mutex::new(vec![]));
    let seen = order.clone();
    set.set_ready_hook(move |index| {
        seen.lock().unwrap().push(index);
        Ok(())
    })
    .unwrap();
    let (tied, w) = (set.at(0).unwrap(), set.at(1).unwrap());
    let tokens = Tensor::from_slice(&[1i64, 2]).view([1, 2]);
    let forward = || {
        let x = fused::linear(&fused::embedding(&tokens, tied).unwrap(), w).unwrap();
        fused::head_loss(&x, tied, &tokens, 1.0, 8).unwrap()
    };
    drop(tch::no_grad(forward));
    drop(forward()); // a graph that never runs its backward leaves nothing open
    autograd::backward(&[&forward()], &[]).unwrap();
    assert_eq!(*order.lock().unwrap(), [1, 0]);
    set.set_ready_hook(|_| Err(ShimError::Invalid("no such peer".into()))).unwrap();
    let error = autograd::backward(&[&forward()], &[]).unwrap_err().to_string();
    assert!(error.contains("no such peer"), "{error}");
    set.clear_ready_hook().unwrap();
    autograd::backward(&[&forward()], &[]).unwrap();
    assert_eq!(order.lock().unwrap().len(), 2);
}

#[test]
fn a_meter_counts_what_is_made_until_it_is_dropped() {
    let made = |bytes: i64| Tensor::empty([bytes], (Kind::Uint8, Device::Cpu));
    let before = made(1000);
    let meter = Meter::new().unwrap();
    let first = meter.count(|| {
        let (first, second) = (made(3000), made(500));
        std::thread::spawn(move || drop((made(7000), second))).join().unwrap();
        first
    });
    let (view, other) = (first.narrow(0, 100, 7), made(900));
    drop((before, first));
    assert_eq!((meter.now(), meter.peak()), (3000, 3500));
    drop((view, other));
    assert_eq!((meter.now(), meter.peak()), (0, 3500));
}
