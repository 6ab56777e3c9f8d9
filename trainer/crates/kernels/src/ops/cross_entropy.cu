// Cross-entropy of rows of logits, and in the same launch the gradient in their place. A block takes a row at a time: one pass
// finds the maximum and the sum of the exponentials together (Milakov and Gimelshein 2018), the second writes the gradient,
// while the row still lies in the L2 cache.

// Calls `vector(at)` for the vectors of a row that are this thread's, and `element(at)` for the elements before the first address
// of 16 bytes and behind the last whole vector: any width will do.
template <typename Vector, typename Element>
__device__ __forceinline__ void sweep(const T* row, int width, Vector vector, Element element) {
  int off = (int)((unsigned long long)row & 15) / (int)sizeof(T);
  int first = off == 0 ? 0 : kLanes - off;
  if (first > width) first = width;
  int last = first + (width - first) / kLanes * kLanes;
  for (int at = first + (int)threadIdx.x * kLanes; at < last; at += (int)blockDim.x * kLanes) vector(at);
  for (int at = (int)threadIdx.x; at < first; at += (int)blockDim.x) element(at);
  for (int at = last + (int)threadIdx.x; at < width; at += (int)blockDim.x) element(at);
}

// Where there is a target: losses[row] = log(sum exp(l)) - l[target], and with `gradients` l = scale * (softmax(l) - onehot). With
// -100 there is none: the loss is 0, and so is the gradient. Any other number outside the row gives NaN for both.
extern "C" __global__ void __launch_bounds__(1024)
    cross_entropy(T* logits, const i64* targets, Wide* losses, i64 rows, int width, double scale, int gradients) {
  __shared__ Wide scratch[kWarp];
  const Wide kLowest = sizeof(Wide) == 4 ? (Wide)-3.0e38f : (Wide)-1.0e308;  // finite: two of them differ by 0
  const Wide kNan = (Wide)__uint_as_float(0x7fc00000u);
  for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
    T* own = logits + row * width;
    i64 target = targets[row];
    bool is_target = target >= 0 && target < width;
    if (!is_target) {
      Wide value = target == -100 ? (Wide)0 : kNan;
      if (threadIdx.x == 0) losses[row] = value;
      if (!gradients) continue;
      Wide values[kLanes];
#pragma unroll
      for (int lane = 0; lane < kLanes; lane++) values[lane] = value;
      sweep(own, width, [&](int at) { store<true>(own + at, values); }, [&](int at) { store<false>(own + at, values); });
      continue;
    }
    Wide at_target = widen(own[target]);  // before it is overwritten: the reductions below hold all threads together
    Wide maximum = kLowest, sum = 0;
    sweep(
        own, width,
        [&](int at) {
          Wide x[kLanes];
          load<true>(own + at, x);
          Wide most = maximum, more = 0;
#pragma unroll
          for (int lane = 0; lane < kLanes; lane++) most = larger(most, x[lane]);
#pragma unroll
          for (int lane = 0; lane < kLanes; lane++) more += exponential(x[lane] - most);
          sum = sum * exponential(maximum - most) + more;
          maximum = most;
        },
        [&](int at) {
          Wide x = widen(own[at]), most = larger(maximum, x);
          sum = sum * exponential(maximum - most) + exponential(x - most);
          maximum = most;
        });
    Wide most = block_max(maximum, scratch);
    sum = block_sum(sum * exponential(maximum - most), scratch);
    if (threadIdx.x == 0) losses[row] = logarithm(sum) + most - at_target;
    if (!gradients) continue;
    Wide factor = (Wide)scale / sum;
    sweep(
        own, width,
        [&](int at) {
          Wide x[kLanes];
          load<true>(own + at, x);
#pragma unroll
          for (int lane = 0; lane < kLanes; lane++) {
            x[lane] = exponential(x[lane] - most) * factor;
            if (at + lane == target) x[lane] -= (Wide)scale;
          }
          store<true>(own + at, x);
        },
        [&](int at) {
          Wide x = exponential(widen(own[at]) - most) * factor;
          if (at == target) x -= (Wide)scale;
          narrow(x, own[at]);
        });
  }
}
