// RMSNorm over rows of up to 512 x ITEMS elements, alone and with the residual addition before it. ITEMS is how many elements
// of a row a thread holds in registers, so that each is read from memory once.

// Calls `body(at, item)` for each vector (or element) of a row that is this thread's: `at` is its place in the row, `item` the
// place where the thread keeps it.
template <bool kVector, typename Body>
__device__ __forceinline__ void each(int width, Body body) {
  constexpr int kStep = kVector ? kLanes : 1;
#pragma unroll
  for (int item = 0; item < ITEMS; item += kStep) {
    int at = (item / kStep * (int)blockDim.x + (int)threadIdx.x) * kStep;
    if (at < width) body(at, item);
  }
}

template <bool kVector>
__device__ __forceinline__ void forward(const T* __restrict__ x, const T* __restrict__ residual,
                                        const T* __restrict__ weight, T* __restrict__ sum, T* __restrict__ normed,
                                        Wide* __restrict__ reciprocal, i64 rows, int width, Wide eps, Wide* scratch) {
  constexpr int kStep = kVector ? kLanes : 1;
  for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
    i64 first = row * width;
    Wide z[ITEMS];
    Wide squares = 0;
    each<kVector>(width, [&](int at, int item) {
      load<kVector>(x + first + at, z + item);
      if (residual) {
        Wide added[kStep];
        load<kVector>(residual + first + at, added);
#pragma unroll
        for (int lane = 0; lane < kStep; lane++) z[item + lane] = stored(z[item + lane] + added[lane]);
        store<kVector>(sum + first + at, z + item);
      }
#pragma unroll
      for (int lane = 0; lane < kStep; lane++) squares += z[item + lane] * z[item + lane];
    });
    Wide scale = (Wide)1 / root(block_sum(squares, scratch) / (Wide)width + eps);
    if (threadIdx.x == 0) reciprocal[row] = scale;
    each<kVector>(width, [&](int at, int item) {
      Wide out[kStep];
      load<kVector>(weight + at, out);
#pragma unroll
      for (int lane = 0; lane < kStep; lane++) out[lane] *= z[item + lane] * scale;
      store<kVector>(normed + first + at, out);
    });
  }
}

template <bool kVector>
__device__ __forceinline__ void backward(const T* __restrict__ dy, const T* __restrict__ d_sum, const T* __restrict__ z,
                                         const T* __restrict__ weight, const Wide* __restrict__ reciprocal,
                                         T* __restrict__ dx, Wide* __restrict__ partial, i64 rows, int width,
                                         Wide* scratch) {
  constexpr int kStep = kVector ? kLanes : 1;
  Wide d_weight[ITEMS];
#pragma unroll
  for (int item = 0; item < ITEMS; item++) d_weight[item] = 0;
  for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
    i64 first = row * width;
    Wide scale = reciprocal[row];
    Wide unit[ITEMS], scaled[ITEMS];
    Wide product = 0;
    each<kVector>(width, [&](int at, int item) {
      Wide w[kStep];
      load<kVector>(z + first + at, unit + item);
      load<kVector>(dy + first + at, scaled + item);
      load<kVector>(weight + at, w);
#pragma unroll
      for (int lane = 0; lane < kStep; lane++) {
        unit[item + lane] *= scale;
        d_weight[item + lane] += scaled[item + lane] * unit[item + lane];
        scaled[item + lane] *= w[lane];
        product += scaled[item + lane] * unit[item + lane];
      }
    });
    Wide projection = block_sum(product, scratch) / (Wide)width;
    each<kVector>(width, [&](int at, int item) {
      Wide out[kStep];
#pragma unroll
      for (int lane = 0; lane < kStep; lane++) out[lane] = (scaled[item + lane] - unit[item + lane] * projection) * scale;
      if (d_sum) {
        Wide added[kStep];
        load<kVector>(d_sum + first + at, added);
#pragma unroll
        for (int lane = 0; lane < kStep; lane++) out[lane] += added[lane];
      }
      store<kVector>(dx + first + at, out);
    });
  }
  Wide* own = partial + (i64)blockIdx.x * width;
  each<kVector>(width, [&](int at, int item) { store_wide<kVector>(own + at, d_weight + item); });
}

// z = x + residual, rounded (z = x where there is no residual, and then `sum` is not written); reciprocal = 1 / sqrt(mean(z^2) +
// eps), one a row; normed = weight * z * reciprocal, rounded once.
extern "C" __global__ void __launch_bounds__(512)
    rms_norm_forward(const T* x, const T* residual, const T* weight, T* sum, T* normed, Wide* reciprocal, i64 rows,
                     int width, double eps) {
  __shared__ Wide scratch[kWarp];
  bool vector = width % kLanes == 0 && aligned(x) && aligned(residual) && aligned(weight) && aligned(sum) && aligned(normed);
  if (vector)
    forward<true>(x, residual, weight, sum, normed, reciprocal, rows, width, (Wide)eps, scratch);
  else
    forward<false>(x, residual, weight, sum, normed, reciprocal, rows, width, (Wide)eps, scratch);
}

// dx of the norm (+ d_sum, where there is one). Row b of `partial`, [blocks, width], gets the weight's gradient of the rows that
// block b took.
extern "C" __global__ void __launch_bounds__(512)
    rms_norm_backward(const T* dy, const T* d_sum, const T* z, const T* weight, const Wide* reciprocal, T* dx,
                      Wide* partial, i64 rows, int width) {
  __shared__ Wide scratch[kWarp];
  bool vector = width % kLanes == 0 && aligned(dy) && aligned(d_sum) && aligned(z) && aligned(weight) && aligned(dx) &&
                aligned(partial);
  if (vector)
    backward<true>(dy, d_sum, z, weight, reciprocal, dx, partial, rows, width, scratch);
  else
    backward<false>(dy, d_sum, z, weight, reciprocal, dx, partial, rows, width, scratch);
}

// Adds the rows of `partial`, [rows, width], to `gradient`, [width]. A warp adds every 16th row of 32 columns; the sums of the 16
// warps are added in order.
extern "C" __global__ void __launch_bounds__(512)
    rms_norm_weight_gradient(const Wide* partial, Wide* gradient, int rows, int width) {
  constexpr int kWarps = 16;
  __shared__ Wide sums[kWarps][kWarp];
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, column = blockIdx.x * kWarp + lane;
  Wide sum = 0;
  if (column < width) {
#pragma unroll 4
    for (int row = warp; row < rows; row += kWarps) sum += partial[(i64)row * width + column];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= width) return;
  Wide total = 0;
  for (int other = 0; other < kWarps; other++) total += sums[other][lane];
  gradient[column] += total;
}
