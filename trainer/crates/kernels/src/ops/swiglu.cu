// SwiGLU on the fused projection: rows [gate, up] of 2 * width elements.

__device__ __forceinline__ Wide sigmoid(Wide x) { return (Wide)1 / ((Wide)1 + exponential(-x)); }

// Calls `body(row, at)` for each vector (or element) of all rows.
template <bool kVector, typename Body>
__device__ __forceinline__ void each(i64 rows, int width, Body body) {
  constexpr int kStep = kVector ? kLanes : 1;
  for (i64 row = blockIdx.y; row < rows; row += gridDim.y)
    for (i64 at = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * kStep; at < width; at += (i64)gridDim.x * blockDim.x * kStep)
      body(row, at);
}

template <bool kVector>
__device__ __forceinline__ void forward(const T* __restrict__ gate_up, T* __restrict__ y, i64 rows, int width) {
  constexpr int kStep = kVector ? kLanes : 1;
  each<kVector>(rows, width, [&](i64 row, i64 at) {
    Wide gate[kStep], up[kStep];
    load<kVector>(gate_up + 2 * row * width + at, gate);
    load<kVector>(gate_up + (2 * row + 1) * width + at, up);
#pragma unroll
    for (int lane = 0; lane < kStep; lane++) gate[lane] = gate[lane] * sigmoid(gate[lane]) * up[lane];
    store<kVector>(y + row * width + at, gate);
  });
}

template <bool kVector>
__device__ __forceinline__ void backward(const T* __restrict__ dy, const T* __restrict__ gate_up,
                                         T* __restrict__ d_gate_up, i64 rows, int width) {
  constexpr int kStep = kVector ? kLanes : 1;
  each<kVector>(rows, width, [&](i64 row, i64 at) {
    Wide gate[kStep], up[kStep], d[kStep];
    load<kVector>(gate_up + 2 * row * width + at, gate);
    load<kVector>(gate_up + (2 * row + 1) * width + at, up);
    load<kVector>(dy + row * width + at, d);
#pragma unroll
    for (int lane = 0; lane < kStep; lane++) {
      Wide s = sigmoid(gate[lane]), silu = gate[lane] * s;
      gate[lane] = d[lane] * up[lane] * (s + silu * ((Wide)1 - s));
      up[lane] = d[lane] * silu;
    }
    store<kVector>(d_gate_up + 2 * row * width + at, gate);
    store<kVector>(d_gate_up + (2 * row + 1) * width + at, up);
  });
}

// y = silu(gate) * up.
extern "C" __global__ void __launch_bounds__(256) swiglu_forward(const T* gate_up, T* y, i64 rows, int width) {
  if (width % kLanes == 0 && aligned(gate_up) && aligned(y))
    forward<true>(gate_up, y, rows, width);
  else
    forward<false>(gate_up, y, rows, width);
}

extern "C" __global__ void __launch_bounds__(256)
    swiglu_backward(const T* dy, const T* gate_up, T* d_gate_up, i64 rows, int width) {
  if (width % kLanes == 0 && aligned(dy) && aligned(gate_up) && aligned(d_gate_up))
    backward<true>(dy, gate_up, d_gate_up, rows, width);
  else
    backward<false>(dy, gate_up, d_gate_up, rows, width);
}
