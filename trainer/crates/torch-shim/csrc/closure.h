// Rust closures as C++ objects.
#pragma once

#include <torch/custom_class.h>

#include "common.h"

extern "C" {
// `in` is borrowed; what is put into `out` passes to C++ (null: undefined). Null when well, or else a malloc'd text.
typedef char* (*phx_call)(void* context, at::Tensor* const* in, size_t num_in, at::Tensor** out, size_t num_out);
typedef char* (*phx_ready)(void* context, size_t index);
typedef void (*phx_drop)(void* context);
}

namespace phalanx {

inline void raise_if(char* error) {
  if (!error) return;
  std::string text(error);
  std::free(error);
  throw std::runtime_error(text);
}

// Owns a boxed Rust closure over tensors, and drops it with the last reference.
struct Closure : torch::CustomClassHolder {
  void* context;
  phx_call function;
  phx_drop drop;
  Closure(void* context, phx_call function, phx_drop drop) : context(context), function(function), drop(drop) {}
  ~Closure() override { drop(context); }

  std::vector<at::Tensor> call(const std::vector<at::Tensor>& in, size_t num_out) {
    std::vector<at::Tensor*> in_pointers(in.size()), out_pointers(num_out, nullptr);
    for (size_t i = 0; i < in.size(); i++)
      in_pointers[i] = in[i].defined() ? const_cast<at::Tensor*>(&in[i]) : nullptr;
    char* error = function(context, in_pointers.data(), in_pointers.size(), out_pointers.data(), num_out);
    std::vector<at::Tensor> out(num_out);
    for (size_t i = 0; i < num_out; i++) {
      if (!out_pointers[i]) continue;
      out[i] = std::move(*out_pointers[i]);
      delete out_pointers[i];
    }
    raise_if(error);
    return out;
  }
};

}  // namespace phalanx
