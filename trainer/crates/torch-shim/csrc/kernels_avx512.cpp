// The kernels for avx512.
#define PHALANX_ISA avx512
#define PHALANX_BYTES 64
#define PHALANX_JOIN(name) name##avx512
#include "kernels_body.h"
