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

// What takes part in a row's maximum first: finite, so that two of them differ by 0.
__device__ __forceinline__ Wide lowest() { return sizeof(Wide) == 4 ? (Wide)-3.0e38f : (Wide)-1.0e308; }

// The maximum of a row, and the sum of the exponentials of what its elements are below it; the same for all threads.
__device__ __forceinline__ void gauge(const T* own, int width, Wide* scratch, Wide& most, Wide& sum) {
  Wide maximum = lowest();
  sum = 0;
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
  most = block_max(maximum, scratch);
  sum = block_sum(sum * exponential(maximum - most), scratch);
}

// l = scale * (softmax(l) - onehot) in place; `target` outside the row where there is no such place in it.
__device__ __forceinline__ void derive(T* own, int width, i64 target, Wide most, Wide factor, Wide scale) {
  sweep(
      own, width,
      [&](int at) {
        Wide x[kLanes];
        load<true>(own + at, x);
#pragma unroll
        for (int lane = 0; lane < kLanes; lane++) {
          x[lane] = exponential(x[lane] - most) * factor;
          if (at + lane == target) x[lane] -= scale;
        }
        store<true>(own + at, x);
      },
      [&](int at) {
        Wide x = exponential(widen(own[at]) - most) * factor;
        if (at == target) x -= scale;
        narrow(x, own[at]);
      });
}

__device__ __forceinline__ void fill(T* own, int width, Wide value) {
  Wide values[kLanes];
#pragma unroll
  for (int lane = 0; lane < kLanes; lane++) values[lane] = value;
  sweep(own, width, [&](int at) { store<true>(own + at, values); }, [&](int at) { store<false>(own + at, values); });
}

// The loss and the gradient of a row whose target is none: 0 for -100, else NaN.
__device__ __forceinline__ Wide untargeted(i64 target) { return target == -100 ? (Wide)0 : (Wide)__uint_as_float(0x7fc00000u); }

// Where there is a target: losses[row] = log(sum exp(l)) - l[target], and with `gradients` l = scale * (softmax(l) - onehot). With
// -100 there is none: the loss is 0, and so is the gradient. Any other number outside the row gives NaN for both.
extern "C" __global__ void __launch_bounds__(1024)
    cross_entropy(T* logits, const i64* targets, Wide* losses, i64 rows, int width, double scale, int gradients) {
  __shared__ Wide scratch[kWarp];
  for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
    T* own = logits + row * width;
    i64 target = targets[row];
    if (target < 0 || target >= width) {
      Wide value = untargeted(target);
      if (threadIdx.x == 0) losses[row] = value;
      if (gradients) fill(own, width, value);
      continue;
    }
    Wide at_target = widen(own[target]);  // before it is overwritten: the reductions below hold all threads together
    Wide most, sum;
    gauge(own, width, scratch, most, sum);
    if (threadIdx.x == 0) losses[row] = logarithm(sum) + most - at_target;
    if (gradients) derive(own, width, target, most, (Wide)scale / sum, (Wide)scale);
  }
}

// The same over rows that are cut: a rank has the logits of the tokens from `first` on, `width` of `vocabulary`. Three numbers of
// a row go over the ranks: maxima[row], of which the largest is taken; sums[row], of exponentials below the own maximum until
// `cut_rescale` has put them below the largest; and behind all those the target's logit, or 0 where it is another's. Both are
// summed. Rows without a target are not read.
extern "C" __global__ void __launch_bounds__(1024)
    cut_gauge(const T* logits, const i64* targets, Wide* maxima, Wide* sums, i64 rows, int width, i64 first, i64 vocabulary) {
  __shared__ Wide scratch[kWarp];
  for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* own = logits + row * width;
    i64 target = targets[row], at = target - first;
    Wide most = 0, sum = 0, at_target = 0;
    if (target >= 0 && target < vocabulary) {
      if (at >= 0 && at < width) at_target = widen(own[at]);
      gauge(own, width, scratch, most, sum);
    }
    if (threadIdx.x == 0) {
      maxima[row] = most;
      sums[row] = sum;
      sums[rows + row] = at_target;
    }
  }
}

extern "C" __global__ void __launch_bounds__(256)
    cut_rescale(const Wide* maxima, const Wide* largest, Wide* sums, i64 rows) {
  for (i64 row = blockIdx.x * (i64)blockDim.x + threadIdx.x; row < rows; row += gridDim.x * (i64)blockDim.x)
    sums[row] *= exponential(maxima[row] - largest[row]);
}

// Losses of the whole rows, and with `gradients` those of this rank's logits in their place.
extern "C" __global__ void __launch_bounds__(1024)
    cut_cross_entropy(T* logits, const i64* targets, const Wide* largest, const Wide* sums, Wide* losses, i64 rows, int width,
                      i64 first, i64 vocabulary, double scale, int gradients) {
  for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
    T* own = logits + row * width;
    i64 target = targets[row];
    bool is_target = target >= 0 && target < vocabulary;
    Wide most = largest[row], sum = sums[row];
    Wide loss = is_target ? logarithm(sum) + most - sums[rows + row] : untargeted(target);
    if (threadIdx.x == 0) losses[row] = loss;
    if (!gradients) continue;
    if (is_target)
      derive(own, width, target - first, most, (Wide)scale / sum, (Wide)scale);
    else
      fill(own, width, untargeted(target));
  }
}
