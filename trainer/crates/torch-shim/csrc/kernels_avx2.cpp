// The kernels for avx2.
#define PHALANX_ISA avx2
#define PHALANX_BYTES 32
#define PHALANX_JOIN(name) name##avx2
#include "kernels_body.h"
