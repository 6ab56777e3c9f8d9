// Adds a tensor of T to an accumulator of Wide, in place.

extern "C" __global__ void __launch_bounds__(256) accumulate(Wide* sum, const T* x, i64 count) {
  i64 whole = aligned(sum) && aligned(x) ? count / kLanes * kLanes : 0;
  i64 thread = (i64)blockIdx.x * blockDim.x + threadIdx.x, threads = (i64)gridDim.x * blockDim.x;
  for (i64 at = thread * kLanes; at < whole; at += threads * kLanes) {
    Wide a[kLanes], b[kLanes];
    load_wide<true>(sum + at, a);
    load<true>(x + at, b);
#pragma unroll
    for (int lane = 0; lane < kLanes; lane++) a[lane] += b[lane];
    store_wide<true>(sum + at, a);
  }
  for (i64 at = whole + thread; at < count; at += threads) sum[at] += widen(x[at]);
}
