// What the CUDA driver says of itself and its GPUs, by its own C interface, which comes with it: neither a CUDA header
// nor libtorch's CUDA part is needed, so that it can be asked why the latter does not start.
//
// Source of the names, numbers and signatures: NVIDIA's public header cuda.h (CUDA 12 and 13).
#include <dlfcn.h>

#include <stdexcept>

#include "common.h"

using phalanx::guarded;

extern "C" {

struct phx_card {
  char name[128];
  int32_t major, minor;
  uint64_t bytes;
};

// Asks the library at `path`. `code` is CUDA's error number, 0 for none; `version` is 13000 for CUDA 13.0, 0 where it is not
// known. Up to `room` GPUs are described, of `count` that there are. An error: there is no such library.
char* phx_driver_look(const char* path, int* code, int* version, phx_card* cards, size_t room, size_t* count) {
  *code = *version = 0;
  *count = 0;
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* error = dlerror();
    return phalanx::error_text(error ? error : path);
  }
  return guarded([&] {
    auto find = [&](const char* name) {
      void* symbol = dlsym(library, name);
      if (!symbol) throw std::runtime_error(std::string(path) + " has no " + name);
      return symbol;
    };
    auto init = reinterpret_cast<int (*)(unsigned)>(find("cuInit"));
    auto get_version = reinterpret_cast<int (*)(int*)>(find("cuDriverGetVersion"));
    auto get_count = reinterpret_cast<int (*)(int*)>(find("cuDeviceGetCount"));
    auto get = reinterpret_cast<int (*)(int*, int)>(find("cuDeviceGet"));
    auto get_name = reinterpret_cast<int (*)(char*, int, int)>(find("cuDeviceGetName"));
    auto get_attribute = reinterpret_cast<int (*)(int*, int, int)>(find("cuDeviceGetAttribute"));
    auto get_bytes = reinterpret_cast<int (*)(size_t*, int)>(find("cuDeviceTotalMem_v2"));
    // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
    constexpr int kMajor = 75, kMinor = 76;
    // The version can be had from a driver that does not start.
    if (get_version(version)) *version = 0;
    int found = 0;
    if ((*code = init(0)) || (*code = get_count(&found))) return;
    *count = static_cast<size_t>(found);
    for (int index = 0; index < found && static_cast<size_t>(index) < room; index++) {
      int device = 0;
      size_t bytes = 0;
      auto& card = cards[index];
      std::memset(&card, 0, sizeof card);
      if ((*code = get(&device, index)) || (*code = get_name(card.name, sizeof card.name - 1, device)) ||
          (*code = get_attribute(&card.major, kMajor, device)) || (*code = get_attribute(&card.minor, kMinor, device)) ||
          (*code = get_bytes(&bytes, device)))
        return;
      card.bytes = bytes;
    }
  });
}

}  // extern "C"
