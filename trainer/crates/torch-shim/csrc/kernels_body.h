// The kernels themselves, included once for each instruction set with PHALANX_ISA and PHALANX_BYTES (a vector's size) set.
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace phalanx {
namespace PHALANX_ISA {

constexpr int64_t kLanes = PHALANX_BYTES / 4;
typedef float Floats __attribute__((vector_size(PHALANX_BYTES)));
typedef int32_t Ints __attribute__((vector_size(PHALANX_BYTES)));
typedef uint32_t Words __attribute__((vector_size(PHALANX_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(PHALANX_BYTES / 2)));

static inline Floats all(float x) { return Floats{} + x; }

static inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline Floats load(const Bf16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return (Floats)(__builtin_convertvector(h, Words) << 16);
}

static inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

// To nearest even; a NaN stays one.
static inline void store(Bf16* p, Floats v) {
  Words w = (Words)v;
  Words rounded = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
  Words nan = (Words)(v != v);
  Halves h = __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), Halves);
  std::memcpy(p, &h, sizeof h);
}

// A row's tail goes through a padded copy.
template <typename T>
static inline Floats load_part(const T* p, int64_t count) {
  T padded[kLanes] = {};
  std::memcpy(padded, p, count * sizeof(T));
  return load(padded);
}

template <typename T>
static inline void store_part(T* p, Floats v, int64_t count) {
  T padded[kLanes];
  store(padded, v);
  std::memcpy(p, padded, count * sizeof(T));
}

// Calls `body(load, store, offset)` for each vector of a row, whole ones and the tail.
template <typename Body>
static inline void each(int64_t width, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes)
    body([&](auto* p) { return load(p + i); }, [&](auto* p, Floats v) { store(p + i, v); }, i);
  if (i < width) {
    int64_t count = width - i;
    body([&](auto* p) { return load_part(p + i, count); }, [&](auto* p, Floats v) { store_part(p + i, v, count); }, i);
  }
}

static inline float sum_lanes(Floats v) {
  float sum = 0;
  for (int64_t i = 0; i < kLanes; i++) sum += v[i];
  return sum;
}

// e^x to about two units in the last place (Cephes' polynomial); a NaN stays one.
static inline Floats exp(Floats x) {
  x = x < -87.0f ? all(-87.0f) : x;
  x = x > 88.0f ? all(88.0f) : x;
  Floats shifted = x * 1.44269504088896341f + 12582912.0f;
  Floats n = shifted - 12582912.0f;
  Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Ints power = ((Ints)shifted - 0x4b400000 + 127) << 23;
  return p * (Floats)power;
}

static inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exp(-x)); }

template <typename T>
void norm(const T* x, const T* residual, const T* weight, T* sum, T* y, float* reciprocal, int64_t rows, int64_t width,
          float eps) {
  for (int64_t row = 0; row < rows; row++) {
    const T* z = x + row * width;
    Floats squares = {};
    if (residual) {
      const T* r = residual + row * width;
      T* s = sum + row * width;
      each(width, [&](auto get, auto put, int64_t) { put(s, get(z) + get(r)); });
      z = s;
    }
    each(width, [&](auto get, auto, int64_t) {
      Floats v = get(z);
      squares += v * v;
    });
    float scale = 1.0f / std::sqrt(sum_lanes(squares) / width + eps);
    reciprocal[row] = scale;
    T* out = y + row * width;
    each(width, [&](auto get, auto put, int64_t) { put(out, get(z) * scale * get(weight)); });
  }
}

template <typename T>
void norm_backward(const T* dy, const T* d_sum, const T* z, const T* weight, const float* reciprocal, T* dx,
                   float* d_weight, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; row++) {
    const T* g = dy + row * width;
    const T* x = z + row * width;
    T* out = dx + row * width;
    float scale = reciprocal[row];
    Floats products = {};
    each(width, [&](auto get, auto put, int64_t) {
      Floats unit = get(x) * scale, gradient = get(g);
      products += gradient * get(weight) * unit;
      put(d_weight, get(d_weight) + gradient * unit);
    });
    float projection = sum_lanes(products) / width;
    const T* extra = d_sum ? d_sum + row * width : nullptr;
    each(width, [&](auto get, auto put, int64_t) {
      Floats d = (get(g) * get(weight) - get(x) * scale * projection) * scale;
      put(out, extra ? d + get(extra) : d);
    });
  }
}

template <typename T>
void swiglu(const T* gate_up, T* y, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; row++) {
    const T* gate = gate_up + 2 * row * width;
    const T* up = gate + width;
    T* out = y + row * width;
    each(width, [&](auto get, auto put, int64_t) {
      Floats g = get(gate);
      put(out, g * sigmoid(g) * get(up));
    });
  }
}

template <typename T>
void swiglu_backward(const T* dy, const T* gate_up, T* d_gate_up, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; row++) {
    const T* gate = gate_up + 2 * row * width;
    const T* up = gate + width;
    const T* gradient = dy + row * width;
    T* d_gate = d_gate_up + 2 * row * width;
    T* d_up = d_gate + width;
    each(width, [&](auto get, auto put, int64_t) {
      Floats g = get(gate), d = get(gradient), s = sigmoid(g), silu = g * s;
      put(d_gate, d * get(up) * (s + silu * (1.0f - s)));
      put(d_up, d * silu);
    });
  }
}

template <typename T>
void rotate(const T* x, T* y, const float* cos, const float* sin, int64_t heads, int64_t head_dim, float sign) {
  int64_t half = head_dim / 2;
  for (int64_t head = 0; head < heads; head++) {
    const T *first = x + head * head_dim, *second = first + half;
    T *out_first = y + head * head_dim, *out_second = out_first + half;
    each(half, [&](auto get, auto put, int64_t) {
      Floats a = get(first), b = get(second), c = get(cos), s = get(sin) * sign;
      put(out_first, a * c - b * s);
      put(out_second, b * c + a * s);
    });
  }
}

template <typename T>
void cross_entropy(T* logits, const int64_t* targets, double* losses, int64_t rows, int64_t width, float scale,
                   bool gradient) {
  for (int64_t row = 0; row < rows; row++) {
    T* x = logits + row * width;
    losses[row] = 0;
    if (targets[row] == -100) {
      if (gradient) std::memset(static_cast<void*>(x), 0, width * sizeof(T));
      continue;
    }
    Floats largest = all(-INFINITY);
    int64_t whole = width / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
      Floats v = load(x + i);
      largest = v > largest ? v : largest;
    }
    float maximum = -INFINITY;
    for (int64_t i = 0; i < kLanes; i++) maximum = largest[i] > maximum ? largest[i] : maximum;
    for (int64_t i = whole; i < width; i++) {
      float v = load_part(x + i, 1)[0];
      maximum = v > maximum ? v : maximum;
    }
    Floats sums = {};
    for (int64_t i = 0; i < whole; i += kLanes) sums += exp(load(x + i) - maximum);
    float sum = sum_lanes(sums);
    for (int64_t i = whole; i < width; i++) sum += exp(load_part(x + i, 1) - maximum)[0];
    float at_target = load_part(x + targets[row], 1)[0];
    losses[row] = (std::log(static_cast<double>(sum)) + maximum - at_target);
    if (!gradient) continue;
    float factor = scale / sum;
    float target_gradient = exp(all(at_target - maximum))[0] * factor - scale;
    each(width, [&](auto get, auto put, int64_t) { put(x, exp(get(x) - maximum) * factor); });
    store_part(x + targets[row], all(target_gradient), 1);
  }
}

}  // namespace PHALANX_ISA
}  // namespace phalanx

#include "kernels_attention.h"

namespace phalanx {
namespace PHALANX_ISA {

template <typename T>
const Kernels<T> table = {norm<T>,   norm_backward<T>, swiglu<T>,    swiglu_backward<T>,
                          rotate<T>, cross_entropy<T>, attention<T>, attention_backward<T>};

}  // namespace PHALANX_ISA

const Kernels<float>& PHALANX_JOIN(kernels_float_)() { return PHALANX_ISA::table<float>; }
const Kernels<Bf16>& PHALANX_JOIN(kernels_bf16_)() { return PHALANX_ISA::table<Bf16>; }

}  // namespace phalanx
