// Operators over lists of tensors that tch does not reach.
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include "common.h"

using at::Tensor;
using phalanx::guarded;
using phalanx::tensors;

extern "C" {

// `step` is the count of updates after this one, as a single-element FP32 tensor shared by all. `divisor`, of one element
// and FP32, divides the gradients; null: nothing does. Where `held`, the same, is 1, nothing changes; null: it is 0.
char* phx_fused_adamw(Tensor* const* parameters, Tensor* const* gradients, Tensor* const* first_moments,
                      Tensor* const* second_moments, size_t count, Tensor* step, double learning_rate, double beta1,
                      double beta2, double weight_decay, double eps, Tensor* divisor, Tensor* held) {
  return guarded([&] {
    if (count == 0) return;
    at::NoGradGuard no_grad;
    auto p = tensors(parameters, count), g = tensors(gradients, count);
    auto m = tensors(first_moments, count), v = tensors(second_moments, count);
    std::vector<Tensor> steps(count, *step);
    auto given = [](Tensor* tensor) { return tensor ? std::optional<Tensor>(*tensor) : std::nullopt; };
    at::_fused_adamw_(p, g, m, v, {}, steps, learning_rate, beta1, beta2, weight_decay, eps, false, false, given(divisor),
                      given(held));
  });
}

// The 2-norm over all tensors together, as a tensor of no dimension on their device.
char* phx_global_norm(Tensor* const* list, size_t count, Tensor** out) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    auto all = tensors(list, count);
    if (all.empty()) {
      *out = phalanx::give(at::zeros({}, at::kFloat));
      return;
    }
    auto norms = at::_foreach_norm(all, 2);
    *out = phalanx::give(at::linalg_vector_norm(at::stack(norms), 2));
  });
}

char* phx_foreach_mul(Tensor* const* list, size_t count, double factor) {
  return guarded([&] {
    if (count == 0) return;
    at::NoGradGuard no_grad;
    auto all = tensors(list, count);
    at::_foreach_mul_(all, at::Scalar(factor));
  });
}

char* phx_foreach_mul_tensor(Tensor* const* list, size_t count, Tensor* factor) {
  return guarded([&] {
    if (count == 0) return;
    at::NoGradGuard no_grad;
    auto all = tensors(list, count);
    at::_foreach_mul_(all, *factor);
  });
}

}  // extern "C"
