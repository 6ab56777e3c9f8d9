// The norm of gradients as one vector, and what they are clipped by, without the host. Squares are summed in Wide within a chunk
// and a thread's share of it, and in FP64 beyond: one FP32 sum over hundreds of millions of squares stops growing.

// The sum of the squares of each chunk (first element, elements, unused), by one block.
extern "C" __global__ void __launch_bounds__(256)
    squares_of_chunks(const Wide* gradients, const i64* chunks, i64 num_chunks, double* partial) {
  __shared__ double scratch[kWarp];
  constexpr int kWide = 16 / (int)sizeof(Wide);
  for (i64 chunk = blockIdx.x; chunk < num_chunks; chunk += gridDim.x) {
    i64 begin = chunks[3 * chunk], end = begin + chunks[3 * chunk + 1];
    i64 whole = begin % kWide == 0 && aligned(gradients) ? begin + (end - begin) / kWide * kWide : begin;
    Wide sum = 0;
#pragma unroll 4
    for (i64 at = begin + (i64)threadIdx.x * kWide; at < whole; at += (i64)blockDim.x * kWide) {
      Wide x[kWide];
      load<true>(gradients + at, x);
#pragma unroll
      for (int lane = 0; lane < kWide; lane++) sum += x[lane] * x[lane];
    }
    for (i64 at = whole + (i64)threadIdx.x; at < end; at += (i64)blockDim.x) sum += gradients[at] * gradients[at];
    double total = block_sum((double)sum, scratch);
    if (threadIdx.x == 0) partial[chunk] = total;
  }
}

// The sum of all partial sums, by one block.
extern "C" __global__ void __launch_bounds__(1024) sum_of_squares(const double* partial, i64 count, double* out) {
  __shared__ double scratch[kWarp];
  double sum = 0;
#pragma unroll 4
  for (i64 at = threadIdx.x; at < count; at += blockDim.x) sum += partial[at];
  double total = block_sum(sum, scratch);
  if (threadIdx.x == 0) *out = total;
}

// norm = sqrt(squares), and what gradients are multiplied by: at most 1, and not finite where the norm is not. Without a limit
// (0) it is 1, or not finite.
extern "C" __global__ void __launch_bounds__(32)
    clip_coefficient(const double* squares, double limit, double* norm, float* coefficient) {
  if (threadIdx.x != 0) return;
  double value = sqrt(*squares);
  bool is_finite = value <= 1.7e308;  // false for a NaN too
  *norm = value;
  double factor = limit > 0 ? smaller(limit / (value + 1e-6), 1.0) : 1.0;
  *coefficient = is_finite ? (float)factor : __uint_as_float(0x7fc00000u);
}
