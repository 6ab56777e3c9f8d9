// What all kernels share: number formats, 16-byte vectors, sums over a block. It is put before each source. NVRTC compiles both
// without any header; tests compile the same text with a host compiler, which takes CUDA's words from an emulation (EMULATED).
//
// Tensors are stored as T and computed with as Wide; STORAGE_BF16, STORAGE_FP32 or STORAGE_FP64 says which. Everything is
// deterministic: no atomics, and sums in an order that follows from the launch alone.

typedef long long i64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

// A BF16 number in memory.
struct Bf16 {
  u16 bits;
};

#if defined(STORAGE_BF16)
typedef Bf16 T;
typedef float Wide;
#elif defined(STORAGE_FP32)
typedef float T;
typedef float Wide;
#elif defined(STORAGE_FP64)
typedef double T;
typedef double Wide;
#else
#error "define STORAGE_BF16, STORAGE_FP32 or STORAGE_FP64"
#endif

// Elements of T in a vector of 16 bytes, the widest load that a thread can make.
constexpr int kLanes = 16 / (int)sizeof(T);
// Threads that run in lock-step.
constexpr int kWarp = 32;

template <typename S>
struct alignas(16) Pack {
  S lane[16 / sizeof(S)];
};

// Overloads, so that the kernels read the same in FP32 and FP64.
__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }
__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }
__device__ __forceinline__ float larger(float x, float y) { return fmaxf(x, y); }
__device__ __forceinline__ double larger(double x, double y) { return fmax(x, y); }
__device__ __forceinline__ float smaller(float x, float y) { return fminf(x, y); }
__device__ __forceinline__ double smaller(double x, double y) { return fmin(x, y); }
__device__ __forceinline__ float magnitude(float x) { return fabsf(x); }
__device__ __forceinline__ double magnitude(double x) { return fabs(x); }

__device__ __forceinline__ float widen(Bf16 x) { return __uint_as_float((u32)x.bits << 16); }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }

// To nearest, ties to even; a NaN stays one.
__device__ __forceinline__ void narrow(float x, Bf16& to) {
#ifdef EMULATED
  u32 word = __float_as_uint(x);
  to.bits = x == x ? (u16)((word + 0x7fffu + ((word >> 16) & 1u)) >> 16) : (u16)0x7fc0;
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#endif
}
__device__ __forceinline__ void narrow(float x, float& to) { to = x; }
__device__ __forceinline__ void narrow(double x, double& to) { to = x; }

// What is left of a number once it has been stored.
__device__ __forceinline__ Wide stored(Wide x) {
  T to;
  narrow(x, to);
  return widen(to);
}

__device__ __forceinline__ bool aligned(const void* pointer) { return ((unsigned long long)pointer & 15) == 0; }

// One vector of elements, or one element, into `to`, and back.
template <bool kVector, typename S>
__device__ __forceinline__ void load(const S* __restrict__ from, Wide* to) {
  if constexpr (kVector) {
    Pack<S> pack = *(const Pack<S>*)from;
#pragma unroll
    for (int lane = 0; lane < 16 / (int)sizeof(S); lane++) to[lane] = widen(pack.lane[lane]);
  } else {
    to[0] = widen(from[0]);
  }
}

template <bool kVector, typename S>
__device__ __forceinline__ void store(S* __restrict__ to, const Wide* from) {
  if constexpr (kVector) {
    Pack<S> pack;
#pragma unroll
    for (int lane = 0; lane < 16 / (int)sizeof(S); lane++) narrow(from[lane], pack.lane[lane]);
    *(Pack<S>*)to = pack;
  } else {
    narrow(from[0], to[0]);
  }
}

// As many numbers of Wide as a vector of T has elements, or one.
template <bool kVector>
__device__ __forceinline__ void load_wide(const Wide* __restrict__ from, Wide* to) {
  constexpr int kStep = kVector ? kLanes : 1;
  constexpr int kWide = kVector ? 16 / (int)sizeof(Wide) : 1;
#pragma unroll
  for (int at = 0; at < kStep; at += kWide) load<kVector>(from + at, to + at);
}

template <bool kVector>
__device__ __forceinline__ void store_wide(Wide* __restrict__ to, const Wide* from) {
  constexpr int kStep = kVector ? kLanes : 1;
  constexpr int kWide = kVector ? 16 / (int)sizeof(Wide) : 1;
#pragma unroll
  for (int at = 0; at < kStep; at += kWide) store<kVector>(to + at, from + at);
}

// The sum over a warp, to the same bit in every lane: at each step two lanes add the same two numbers.
template <typename V>
__device__ __forceinline__ V warp_sum(V value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

template <typename V>
__device__ __forceinline__ V warp_max(V value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value = larger(value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}

// Over a block of whole warps, the same for every thread. `scratch` is shared memory for 32 numbers, and all threads come here.
template <typename V>
__device__ __forceinline__ V block_sum(V value, V* scratch) {
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp;
  value = warp_sum(value);
  __syncthreads();  // the scratch may still be read by the reduction before
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  return warp_sum(lane < num_warps ? scratch[lane] : (V)0);
}

template <typename V>
__device__ __forceinline__ V block_max(V value, V* scratch) {
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp;
  value = warp_max(value);
  __syncthreads();
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  return warp_max(scratch[lane < num_warps ? lane : 0]);
}
