// The normal random numbers for avx2.
#define PHALANX_BYTES 32
#define PHALANX_NORMALS normals_avx2
#include "random_body.h"
