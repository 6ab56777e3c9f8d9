// The kernels for baseline.
#define PHALANX_ISA baseline
#define PHALANX_BYTES 16
#define PHALANX_JOIN(name) name##baseline
#include "kernels_body.h"
