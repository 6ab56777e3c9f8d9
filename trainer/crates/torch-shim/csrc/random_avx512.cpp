// The normal random numbers for avx512.
#define PHALANX_BYTES 64
#define PHALANX_NORMALS normals_avx512
#include "random_body.h"
