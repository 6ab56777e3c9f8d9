// Chooses the kernels for this processor, once.
#include "kernels.h"

namespace phalanx {

const Kernels<float>& kernels_float_avx512();
const Kernels<float>& kernels_float_avx2();
const Kernels<float>& kernels_float_baseline();
const Kernels<Bf16>& kernels_bf16_avx512();
const Kernels<Bf16>& kernels_bf16_avx2();
const Kernels<Bf16>& kernels_bf16_baseline();

namespace {

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  static const auto& best =
      has_avx512() ? kernels_float_avx512() : has_avx2() ? kernels_float_avx2() : kernels_float_baseline();
  return best;
}

template <>
const Kernels<Bf16>& kernels<Bf16>() {
  static const auto& best =
      has_avx512() ? kernels_bf16_avx512() : has_avx2() ? kernels_bf16_avx2() : kernels_bf16_baseline();
  return best;
}

}  // namespace phalanx
