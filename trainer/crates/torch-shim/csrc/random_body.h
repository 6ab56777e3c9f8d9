// The body of random_*.cpp, several lanes at a time. The scalar form, with where the series come from, is the model's
// `random.rs`; a test compares their bits.
#include <cmath>
#include <cstring>
#include <initializer_list>

#include "random.h"

namespace phalanx {
namespace {

constexpr int kLanes = PHALANX_BYTES / 8;
typedef double Doubles __attribute__((vector_size(PHALANX_BYTES)));
typedef uint64_t Words __attribute__((vector_size(PHALANX_BYTES)));
typedef int64_t Signed __attribute__((vector_size(PHALANX_BYTES)));

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;
constexpr double kLn2 = 0.693147180559945309417232121458, kHalfRoot = 0.707106781186547524400844362105,
                 kTurn = 6.28318530717958647692528676656;

inline Words mix(Words bits) {
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9;
  bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB;
  return bits ^ (bits >> 31);
}

// 53 random bits.
inline Signed bits_of(uint64_t key, Words index) { return Signed(mix(key + index * kGolden) >> 11); }

inline Doubles ln(Doubles x) {
  Words bits;
  std::memcpy(&bits, &x, sizeof bits);
  Words half_bits = (bits & ((uint64_t(1) << 52) - 1)) | (uint64_t(1022) << 52);
  Doubles half;
  std::memcpy(&half, &half_bits, sizeof half);
  Signed is_low = half < kHalfRoot;  // -1 where it is
  Doubles mantissa = is_low ? 2.0 * half : half;
  Signed exponent = Signed(bits >> 52) - 1022 + is_low;
  Doubles s = (mantissa - 1.0) / (mantissa + 1.0), z = s * s, sum = z * 0.0 + 2.0 / 19.0;
#pragma GCC unroll 9
  for (double n : {17.0, 15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0}) sum = sum * z + 2.0 / n;
  return __builtin_convertvector(exponent, Doubles) * kLn2 + s * sum;
}

inline void sin_cos_of_turn(Doubles turn, Doubles& sine, Doubles& cosine) {
  Signed quarter = __builtin_convertvector(turn * 4.0 + 0.5, Signed);
  Doubles angle = kTurn * (turn - __builtin_convertvector(quarter, Doubles) * 0.25);
  Doubles z = angle * angle, sin = z * 0.0 + 1.0, cos = sin;
#pragma GCC unroll 7
  for (double n : {14.0, 12.0, 10.0, 8.0, 6.0, 4.0, 2.0}) {
    sin = 1.0 - sin * z * (1.0 / (n * (n + 1.0)));
    cos = 1.0 - cos * z * (1.0 / (n * (n - 1.0)));
  }
  sin *= angle;
  Signed is_even = (quarter & 1) == 0;
  Doubles a = is_even ? sin : cos, b = is_even ? cos : sin;
  sine = (quarter & 2) != 0 ? -a : a;
  cosine = ((quarter + 1) & 2) != 0 ? -b : b;
}

inline void pairs_at(uint64_t key, uint64_t first, double std, float* even, float* odd) {
  Words index;
  for (int lane = 0; lane < kLanes; lane++) index[lane] = 2 * (first + lane);
  const double unit = 1.0 / (uint64_t(1) << 53);
  Doubles from = __builtin_convertvector(bits_of(key, index) + 1, Doubles) * unit, square = -2.0 * ln(from), radius;
  for (int lane = 0; lane < kLanes; lane++) radius[lane] = std::sqrt(square[lane]);
  Doubles sine, cosine;
  sin_cos_of_turn(__builtin_convertvector(bits_of(key, index + 1), Doubles) * unit, sine, cosine);
  Doubles first_of_pair = std * (radius * cosine), second = std * (radius * sine);
  for (int lane = 0; lane < kLanes; lane++) {
    even[lane] = float(first_of_pair[lane]);
    odd[lane] = float(second[lane]);
  }
}

}  // namespace

void PHALANX_NORMALS(uint64_t key, uint64_t first, int64_t pairs, double std, float* out) {
  float even[kLanes], odd[kLanes];
  for (int64_t done = 0; done < pairs; done += kLanes) {
    pairs_at(key, first + done, std, even, odd);
    for (int lane = 0; lane < kLanes && done + lane < pairs; lane++) {
      out[2 * (done + lane)] = even[lane];
      out[2 * (done + lane) + 1] = odd[lane];
    }
  }
}

}  // namespace phalanx
