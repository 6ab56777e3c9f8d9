// Chooses how normal random numbers are made on this processor.
#include "random.h"

extern "C" {

void phx_normals(uint64_t key, uint64_t first, int64_t pairs, double std, float* out) {
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) return phalanx::normals_avx512(key, first, pairs, std, out);
  if (__builtin_cpu_supports("avx2")) return phalanx::normals_avx2(key, first, pairs, std, out);
  phalanx::normals_baseline(key, first, pairs, std, out);
}

}  // extern "C"
