// Vectorised CPU kernels over ranges of rows. No torch here: they are compiled once for each instruction set, and chosen at
// run time. Sums run over fixed lanes in a fixed order, so results depend on the processor's type and nothing else.
#pragma once

#include <cstdint>

namespace phalanx {

// Storage of a BF16 number.
struct Bf16 {
  uint16_t bits;
};

// Queries or keys that attention takes at a time, and what their width must be a multiple of.
constexpr int64_t kAttentionBlock = 64;
constexpr int64_t kAttentionWidth = 16;

// One document of one key/value head, and of its first query head; the others follow at a distance of `head_dim`. A row a
// token, rows `q_stride` and `kv_stride` elements apart.
template <typename T>
struct AttentionSpan {
  const T *q, *k, *v;
  int64_t q_stride, kv_stride, length, head_dim;
  float scale;
};

// Floats that the attention kernels work in, whatever they hold before: copies of a whole span, and blocks.
constexpr int64_t kForwardCopies = 3, kBackwardCopies = 8;
inline int64_t attention_scratch(int64_t copies, int64_t length, int64_t head_dim) {
  int64_t padded = (length + kAttentionBlock - 1) / kAttentionBlock * kAttentionBlock;
  return copies * padded * head_dim + kAttentionBlock * (2 * kAttentionBlock + head_dim + 2) + padded;
}

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
  // Causal attention of one query head; `logsumexp` of each row is kept for backward.
  void (*attention)(const AttentionSpan<T>& span, T* out, float* logsumexp, float* scratch);
  // Gradients of `heads` query heads and of the key/value head they share. `out`, `d_out` and `dq` lie as q does; the
  // heads' logsumexps are `logsumexp_stride` apart.
  void (*attention_backward)(const AttentionSpan<T>& span, int64_t heads, const T* out, const T* d_out,
                             const float* logsumexp, int64_t logsumexp_stride, T* dq, T* dk, T* dv, float* scratch);
};

// The best kernels for this processor.
template <typename T>
const Kernels<T>& kernels();

}  // namespace phalanx
