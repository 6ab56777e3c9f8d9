// Common parts of the fused operators: autograd functions that add their weight's gradient to its accumulator.
#pragma once

#include <ATen/record_function.h>
#include <torch/csrc/autograd/custom_function.h>

#include "kernels.h"
#include "parameter.h"

// What follows in this scope is an operator of this name on a profiler's timeline.
#define PHALANX_OPERATOR(name) RECORD_FUNCTION("phalanx::" name, c10::ArrayRef<const c10::IValue>())

namespace phalanx {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Opens a use of the parameter, counted only where a backward can follow. Function::forward runs with gradients off,
// so the caller asks before it and passes the answer on.
inline c10::intrusive_ptr<Use> open_use(Parameter* parameter) {
  return c10::make_intrusive<Use>(ParameterPtr::reclaim_copy(parameter), c10::GradMode::is_enabled());
}

inline void keep_use(AutogradContext* context, const c10::intrusive_ptr<Use>& use) {
  context->saved_data["use"] = c10::IValue::make_capsule(use);
}

inline c10::intrusive_ptr<Use> kept_use(AutogradContext* context) {
  return c10::static_intrusive_pointer_cast<Use>(context->saved_data["use"].toCapsule());
}

// The dtype in which statistics are taken: FP64 stays, all else is FP32.
inline at::ScalarType statistics_dtype(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// x weight^T, a b, and a b into `out`, without autograd.
Tensor project(const Tensor& x, const Tensor& weight);
Tensor product(const Tensor& a, const Tensor& b);
void multiply_into(Tensor out, const Tensor& a, const Tensor& b);

// Whether the vectorised kernels take these tensors; the plain ATen form takes all others.
inline bool vectorised(std::initializer_list<Tensor> tensors) {
  auto dtype = tensors.begin()->scalar_type();
  if (dtype != at::kFloat && dtype != at::kBFloat16) return false;
  for (auto& x : tensors)
    if (!x.is_cpu() || !x.is_contiguous() || x.scalar_type() != dtype) return false;
  return true;
}

template <typename T>
T* data(const Tensor& x) {
  return x.defined() ? static_cast<T*>(x.data_ptr()) : nullptr;
}

// Calls `body(T)` with the storage type of `x`, FP32 or BF16.
template <typename Body>
void with_storage(const Tensor& x, Body&& body) {
  if (x.scalar_type() == at::kFloat) return body(float());
  body(Bf16());
}

// Rows a thread takes at least, for rows of `width` elements.
inline int64_t grain(int64_t width) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)); }

}  // namespace phalanx
