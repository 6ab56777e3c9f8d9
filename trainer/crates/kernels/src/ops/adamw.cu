// AdamW over chunks of flat buffers, one launch for all: master weights, moments and gradients in Wide, and a copy of the weights
// in T for computing with.

// What is the same for all elements of an update.
struct Constants {
  Wide rate, beta1, rest1, beta2, rest2, eps, decay, step, correction;
};

__device__ __forceinline__ void update(Wide& weight, Wide gradient, Wide& first, Wide& second, Wide decay, const Constants& c) {
  weight -= c.rate * decay * weight;
  first = c.beta1 * first + c.rest1 * gradient;
  second = c.beta2 * second + c.rest2 * gradient * gradient;
  weight -= c.step * first / (root(second) * c.correction + c.eps);
}

template <bool kVector>
__device__ __forceinline__ void elements(Wide* master, const Wide* gradients, Wide* first, Wide* second, T* copy, i64 begin,
                                         i64 end, Wide factor, Wide decay, const Constants& c) {
  constexpr int kStep = kVector ? kLanes : 1;
  for (i64 at = begin + (i64)threadIdx.x * kStep; at < end; at += (i64)blockDim.x * kStep) {
    Wide w[kStep], g[kStep], m[kStep], v[kStep];
    load_wide<kVector>(master + at, w);
    load_wide<kVector>(gradients + at, g);
    load_wide<kVector>(first + at, m);
    load_wide<kVector>(second + at, v);
#pragma unroll
    for (int lane = 0; lane < kStep; lane++) update(w[lane], g[lane] * factor, m[lane], v[lane], decay, c);
    store_wide<kVector>(master + at, w);
    store_wide<kVector>(first + at, m);
    store_wide<kVector>(second + at, v);
    if (copy) store<kVector>(copy + at, w);
  }
}

// A chunk is (first element, elements, whether it decays), in the same places of all buffers. `factor`, where there is one, is
// what gradients are multiplied by; where it is not finite, nothing is changed: that is how a step is skipped without asking the
// host. `step` is rate / (1 - beta1^t) and `correction` 1 / sqrt(1 - beta2^t).
extern "C" __global__ void __launch_bounds__(256)
    adamw(Wide* master, const Wide* gradients, Wide* first, Wide* second, T* copy, const i64* chunks, i64 num_chunks,
          const float* factor, double rate, double beta1, double beta2, double eps, double decay, double step,
          double correction) {
  Wide scale = factor ? (Wide)*factor : (Wide)1;
  if (!(magnitude(scale) <= (Wide)3.0e38f)) return;
  Constants c{(Wide)rate,          (Wide)beta1, (Wide)(1 - beta1), (Wide)beta2,     (Wide)(1 - beta2),
              (Wide)eps,           (Wide)decay, (Wide)step,        (Wide)correction};
  for (i64 chunk = blockIdx.x; chunk < num_chunks; chunk += gridDim.x) {
    i64 begin = chunks[3 * chunk], end = begin + chunks[3 * chunk + 1];
    Wide own_decay = chunks[3 * chunk + 2] ? c.decay : (Wide)0;
    // Whole vectors in all buffers, whose beginnings are aligned.
    i64 whole = begin % kLanes == 0 ? begin + (end - begin) / kLanes * kLanes : begin;
    bool vector = aligned(master) && aligned(gradients) && aligned(first) && aligned(second) && aligned(copy);
    if (!vector) whole = begin;
    elements<true>(master, gradients, first, second, copy, begin, whole, scale, own_decay, c);
    elements<false>(master, gradients, first, second, copy, whole, end, scale, own_decay, c);
  }
}
