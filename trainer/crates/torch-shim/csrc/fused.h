// Common parts of the fused operators: autograd functions that add their weight's gradient to its accumulator.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include "parameter.h"

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

}  // namespace phalanx
