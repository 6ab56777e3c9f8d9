// Plays the CUDA driver for tests: two GPUs, of a driver for CUDA 13.0, unless -D says otherwise.
#include <string.h>

#ifndef VERSION
#define VERSION 13000
#endif
#ifndef COUNT
#define COUNT 2
#endif
#ifndef INIT_CODE
#define INIT_CODE 0
#endif
#ifndef NAME_CODE
#define NAME_CODE 0
#endif

int cuInit(unsigned flags) { return flags ? 1 : INIT_CODE; }

int cuDriverGetVersion(int *version) {
  *version = VERSION;
  return 0;
}

int cuDeviceGetCount(int *count) {
  *count = COUNT;
  return 0;
}

int cuDeviceGet(int *device, int ordinal) {
  *device = 100 + ordinal;
  return 0;
}

#ifndef NO_NAME
int cuDeviceGetName(char *name, int length, int device) {
  strncpy(name, device == 100 ? "NVIDIA A100-SXM4-80GB" : "NVIDIA H200", length);
  return device == 101 ? NAME_CODE : 0;
}
#endif

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? (device == 100 ? 8 : 9) : 0;
  return attribute == 75 || attribute == 76 ? 0 : 1;
}

int cuDeviceTotalMem_v2(size_t *bytes, int device) {
  *bytes = (device == 100 ? 80ULL : 141ULL) << 30;
  return 0;
}
