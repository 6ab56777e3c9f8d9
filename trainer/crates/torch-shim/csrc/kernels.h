// Vectorised CPU kernels over ranges of rows. No torch here: they are compiled once for each instruction set, and chosen at
// run time. Sums run over fixed lanes in a fixed order, so results depend on the processor's type and nothing else.
#pragma once

#include <cstdint>

namespace phalanx {

// Storage of a BF16 number.
struct Bf16 {
  uint16_t bits;
};

// The kernels for one storage type; arithmetic is FP32 throughout. `rows` rows of `width` elements, contiguous.
template <typename T>
struct Kernels {
  // y = w * z * reciprocal, where z = x (+ residual, kept in `sum`) and reciprocal = 1 / sqrt(mean(z^2) + eps).
  void (*norm)(const T* x, const T* residual, const T* weight, T* sum, T* y, float* reciprocal, int64_t rows,
               int64_t width, float eps);
  // dx (+ d_sum) of the norm; adds the weight's gradient of these rows to `d_weight`.
  void (*norm_backward)(const T* dy, const T* d_sum, const T* z, const T* weight, const float* reciprocal, T* dx,
                        float* d_weight, int64_t rows, int64_t width);
  // y = silu(gate) * up for rows [gate, up] of 2 * width elements.
  void (*swiglu)(const T* gate_up, T* y, int64_t rows, int64_t width);
  void (*swiglu_backward)(const T* dy, const T* gate_up, T* d_gate_up, int64_t rows, int64_t width);
  // Rotates `heads` heads of one token; `sign` -1 turns back. The tables' halves are equal.
  void (*rotate)(const T* x, T* y, const float* cos, const float* sin, int64_t heads, int64_t head_dim, float sign);
  // The loss of each row of logits; with `gradient`, turns logits into scale * (softmax - target). -100: no target.
  void (*cross_entropy)(T* logits, const int64_t* targets, double* losses, int64_t rows, int64_t width, float scale,
                        bool gradient);
};

// The best kernels for this processor.
template <typename T>
const Kernels<T>& kernels();

}  // namespace phalanx
