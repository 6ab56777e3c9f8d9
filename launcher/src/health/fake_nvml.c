// Plays NVIDIA's management library for tests: two GPUs, of which the second has what -D says.
#ifndef COUNT
#define COUNT 2
#endif
#ifndef INIT_CODE
#define INIT_CODE 0
#endif
#ifndef HANDLE_CODE
#define HANDLE_CODE 0
#endif
#ifndef ECC_CODE
#define ECC_CODE 0
#endif
#ifndef ECC_ERRORS
#define ECC_ERRORS 0
#endif
#ifndef REMAP_FAILURE
#define REMAP_FAILURE 0
#endif

#ifndef MEMORY_CODE
#define MEMORY_CODE 0
#endif

static int gpus[2];

int nvmlInit_v2(void) { return INIT_CODE; }
int nvmlShutdown(void) { return 0; }

int nvmlDeviceGetCount_v2(unsigned int *count) {
  *count = COUNT;
  return 0;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **device) {
  *device = &gpus[index];
  return index == 1 ? HANDLE_CODE : 0;
}

int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *total_free_used) {
  total_free_used[0] = device == &gpus[1] ? 40ULL << 30 : 80ULL << 30;
  total_free_used[1] = total_free_used[2] = 1;
  return MEMORY_CODE;
}

int nvmlDeviceGetTotalEccErrors(void *device, unsigned int type, unsigned int counter,
                                unsigned long long *count) {
  if (type != 1 || counter != 0) return 2;
  *count = device == &gpus[1] ? ECC_ERRORS : 0;
  return ECC_CODE;
}

#ifndef NO_REMAPPED_ROWS
int nvmlDeviceGetRemappedRows(void *device, unsigned int *corrected, unsigned int *uncorrected,
                              unsigned int *pending, unsigned int *failure) {
  *corrected = *uncorrected = *pending = 0;
  *failure = device == &gpus[1] ? REMAP_FAILURE : 0;
  return 0;
}
#endif
