// The gradient of an embedding table: rows of dy are added to the rows of their tokens, in the order in which the tokens came,
// without atomics: the same bits every time. Tokens come sorted, with where each was before.

template <bool kVector>
__device__ __forceinline__ void add_rows(const i64* __restrict__ order, const T* __restrict__ dy, Wide* __restrict__ row,
                                         i64 begin, i64 end, int width) {
  constexpr int kStep = kVector ? kLanes : 1;
  int first = ((int)blockIdx.y * (int)blockDim.x + (int)threadIdx.x) * kStep, step = (int)(gridDim.y * blockDim.x) * kStep;
  for (int at = first; at < width; at += step) {
    Wide sum[kStep];
    load_wide<kVector>(row + at, sum);
#pragma unroll 4
    for (i64 i = begin; i < end; i++) {
      Wide more[kStep];
      load<kVector>(dy + order[i] * width + at, more);
#pragma unroll
      for (int lane = 0; lane < kStep; lane++) sum[lane] += more[lane];
    }
    store_wide<kVector>(row + at, sum);
  }
}

// `tokens`, `count` of them, rise; `order` is where each stood, and so a row of dy, [count, width]. Blocks in x take tokens, those
// in y columns: whoever finds the first of equal tokens adds for all of them. A token outside the table's `rows` is left out.
extern "C" __global__ void __launch_bounds__(256)
    embedding_gradient(const i64* tokens, const i64* order, const T* dy, Wide* gradient, i64 count, i64 rows, int width) {
  bool vector = width % kLanes == 0 && aligned(dy) && aligned(gradient);
  for (i64 begin = blockIdx.x; begin < count; begin += gridDim.x) {
    i64 token = tokens[begin];
    if (token < 0 || token >= rows || (begin > 0 && tokens[begin - 1] == token)) continue;
    i64 end = begin + 1;
    while (end < count && tokens[end] == token) end++;
    if (vector)
      add_rows<true>(order, dy, gradient + token * width, begin, end, width);
    else
      add_rows<false>(order, dy, gradient + token * width, begin, end, width);
  }
}
