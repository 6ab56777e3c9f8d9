// Rotary embedding between the fused projection, [batch, sequence, heads + 2 kv_heads, head_dim], and queries, keys and values,
// each [batch, sequence, heads, head_dim] with strides of its own. Element i of a head turns with i + head_dim / 2.

struct Strides {
  i64 batch, token, head;
};

// One vector (or element) of each half of a head, turned; `sign` -1 turns back.
template <bool kVector>
__device__ __forceinline__ void turn(const T* from, T* to, const Wide* __restrict__ cos, const Wide* __restrict__ sin,
                                     int half, Wide sign) {
  constexpr int kStep = kVector ? kLanes : 1;
  Wide first[kStep], second[kStep], c[kStep], s[kStep];
  load<kVector>(from, first);
  load<kVector>(from + half, second);
  load_wide<kVector>(cos, c);
  load_wide<kVector>(sin, s);
#pragma unroll
  for (int lane = 0; lane < kStep; lane++) {
    Wide x = first[lane], y = second[lane], turned = sign * s[lane];
    first[lane] = x * c[lane] - y * turned;
    second[lane] = y * c[lane] + x * turned;
  }
  store<kVector>(to, first);
  store<kVector>(to + half, second);
}

template <bool kVector>
__device__ __forceinline__ void move(const T* from, T* to, int half) {
  constexpr int kStep = kVector ? kLanes : 1;
  Wide first[kStep], second[kStep];
  load<kVector>(from, first);
  load<kVector>(from + half, second);
  store<kVector>(to, first);
  store<kVector>(to + half, second);
}

// A block takes a token at a time; its threads take pairs of vectors of all heads.
template <bool kVector>
__device__ __forceinline__ void tokens(const T* q, Strides at_q, const T* k, Strides at_k, const T* v, Strides at_v, T* out,
                                       const Wide* cos, const Wide* sin, i64 batch, int sequence, int heads, int kv_heads,
                                       int head_dim, int has_rows, Wide sign) {
  constexpr int kStep = kVector ? kLanes : 1;
  int half = head_dim / 2, groups = half / kStep;
  int num_heads = heads + kv_heads + (v ? kv_heads : 0);
  i64 width = (i64)(heads + 2 * kv_heads) * head_dim;
  for (i64 token = blockIdx.x; token < batch * sequence; token += gridDim.x) {
    i64 row = token / sequence, position = token % sequence;
    const Wide* own_cos = cos + (has_rows ? token : position) * head_dim;
    const Wide* own_sin = sin + (has_rows ? token : position) * head_dim;
    for (int work = threadIdx.x; work < num_heads * groups; work += blockDim.x) {
      int head = work / groups, at = work % groups * kStep;
      T* to = out + token * width + (i64)head * head_dim + at;
      if (head < heads) {
        const T* from = q + row * at_q.batch + position * at_q.token + head * at_q.head + at;
        turn<kVector>(from, to, own_cos + at, own_sin + at, half, sign);
      } else if (head < heads + kv_heads) {
        const T* from = k + row * at_k.batch + position * at_k.token + (head - heads) * at_k.head + at;
        turn<kVector>(from, to, own_cos + at, own_sin + at, half, sign);
      } else {
        const T* from = v + row * at_v.batch + position * at_v.token + (head - heads - kv_heads) * at_v.head + at;
        move<kVector>(from, to, half);
      }
    }
  }
}

__device__ __forceinline__ bool whole(Strides at) { return at.batch % kLanes == 0 && at.token % kLanes == 0 && at.head % kLanes == 0; }

// Turns queries and keys into their places of `out`, by `sign` 1 or back by -1; moves values, where `v` is given. q, k and v may
// be those places of `out` themselves: each element is read and written by one thread. The tables are [sequence, head_dim], or
// where `has_rows` [batch, sequence, head_dim], their halves equal. Strides count elements; the last dimension has no gaps.
extern "C" __global__ void __launch_bounds__(512)
    rope(const T* q, i64 q_batch, i64 q_token, i64 q_head, const T* k, i64 k_batch, i64 k_token, i64 k_head, const T* v,
         i64 v_batch, i64 v_token, i64 v_head, T* out, const Wide* cos, const Wide* sin, i64 batch, int sequence, int heads,
         int kv_heads, int head_dim, int has_rows, int sign) {
  Strides at_q{q_batch, q_token, q_head}, at_k{k_batch, k_token, k_head}, at_v{v_batch, v_token, v_head};
  bool vector = head_dim % (2 * kLanes) == 0 && aligned(q) && aligned(k) && aligned(v) && aligned(out) && aligned(cos) &&
                aligned(sin) && whole(at_q) && whole(at_k) && (!v || whole(at_v));
  if (vector)
    tokens<true>(q, at_q, k, at_k, v, at_v, out, cos, sin, batch, sequence, heads, kv_heads, head_dim, has_rows, (Wide)sign);
  else
    tokens<false>(q, at_q, k, at_k, v, at_v, out, cos, sin, batch, sequence, heads, kv_heads, head_dim, has_rows, (Wide)sign);
}
