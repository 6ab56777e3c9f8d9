// The normal random numbers for baseline.
#define PHALANX_BYTES 16
#define PHALANX_NORMALS normals_baseline
#include "random_body.h"
