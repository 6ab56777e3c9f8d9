// What every file of the shim shares: errors cross the border as malloc'd text, tensors as `at::Tensor*`.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

namespace phalanx {

// Only the first line of what(): libtorch appends stack traces, which are of no use to a reader. The caller frees it.
inline char* error_text(const char* what) {
  const char* end = std::strchr(what, '\n');
  size_t length = end ? static_cast<size_t>(end - what) : std::strlen(what);
  char* text = static_cast<char*>(std::malloc(length + 1));
  if (text) {
    std::memcpy(text, what, length);
    text[length] = '\0';
  }
  return text;
}

// Runs `body`; null when all went well, or else the error's text.
template <typename Body>
char* guarded(Body&& body) {
  try {
    body();
    return nullptr;
  } catch (const std::exception& e) {
    return error_text(e.what());
  } catch (...) {
    return error_text("unknown C++ exception");
  }
}

inline std::vector<at::Tensor> tensors(at::Tensor* const* pointers, size_t count) {
  std::vector<at::Tensor> list;
  list.reserve(count);
  for (size_t i = 0; i < count; i++) list.push_back(pointers[i] ? *pointers[i] : at::Tensor());
  return list;
}

// Hands a tensor over to the caller; null stands for an undefined one.
inline at::Tensor* give(at::Tensor tensor) {
  return tensor.defined() ? new at::Tensor(std::move(tensor)) : nullptr;
}

}  // namespace phalanx
