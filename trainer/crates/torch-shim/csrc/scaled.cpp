// Products of matrices of FP8 (e4m3) numbers with an FP32 scale a row of each, a row along the dimension that is summed.
#include <ATen/ATen.h>

#include "fused.h"

namespace phalanx {
namespace {

// Whether the GPU may sum in its tensor cores alone, with fewer bits than FP32; see ops/decisions/0035-fp8.md.
constexpr bool kFastAccumulation = false;
// Of the GPU's product: the summed dimension, and the columns of the result.
constexpr int64_t kMultiple = 16;

void check_operand(const char* name, const Tensor& values, const Tensor& scales) {
  TORCH_CHECK(values.dim() == 2 && values.scalar_type() == at::kFloat8_e4m3fn && values.is_contiguous(), "the ", name,
              " operand of an FP8 product is ", values.sizes(), " of ", values.scalar_type(),
              ", expected a contiguous matrix of Float8_e4m3fn");
  TORCH_CHECK(scales.dim() == 1 && scales.size(0) == values.size(0) && scales.scalar_type() == at::kFloat &&
                  scales.is_contiguous(),
              "the scales of the ", name, " operand are ", scales.sizes(), " of ", scales.scalar_type(), ", expected ",
              values.size(0), " of Float");
}

// (a a_scales)(b b_scales)^T for a[M, K] and b[N, K]: products of e4m3 numbers are exact in FP32, in which they are summed, then
// scaled, and rounded to BF16 once.
Tensor scaled_product(const Tensor& a, const Tensor& a_scales, const Tensor& b, const Tensor& b_scales, bool fast) {
  check_operand("left", a, a_scales);
  check_operand("right", b, b_scales);
  TORCH_CHECK(a.size(1) == b.size(1), "an FP8 product of rows of ", a.size(1), " and of ", b.size(1));
  // On a CPU as well, so that what runs there runs on a GPU.
  TORCH_CHECK(a.size(1) % kMultiple == 0 && b.size(0) % kMultiple == 0, "an FP8 product of ", a.sizes(), " and ", b.sizes(),
              ": rows, and the number of the right operand's, must be multiples of ", kMultiple);
  auto left = a_scales.view({-1, 1}), right = b_scales.view({1, -1});
  if (a.is_cuda()) return at::_scaled_mm(a, b.t(), left, right, {}, {}, at::kBFloat16, fast);
  return project(a.to(at::kFloat), b.to(at::kFloat)).mul_(left).mul_(right).to(at::kBFloat16);
}

}  // namespace
}  // namespace phalanx

using namespace phalanx;

extern "C" {

char* phx_scaled_product(Tensor* a, Tensor* a_scales, Tensor* b, Tensor* b_scales, bool fast, Tensor** out) {
  return guarded([&] {
    PHALANX_OPERATOR("scaled_product");
    at::NoGradGuard no_grad;
    *out = give(scaled_product(*a, *a_scales, *b, *b_scales, fast));
  });
}

bool phx_scaled_is_fast() { return kFastAccumulation; }

char* phx_use_accumulate_scaled(Use* use, Tensor* dy, Tensor* dy_scales, Tensor* x, Tensor* x_scales) {
  return guarded([&] {
    PHALANX_OPERATOR("accumulate_scaled");
    at::NoGradGuard no_grad;
    auto& parameter = use->parameter;
    auto add = [parameter, dy = *dy, dy_scales = *dy_scales, x = *x, x_scales = *x_scales] {
      parameter->gradient.add_(scaled_product(dy, dy_scales, x, x_scales, kFastAccumulation));
    };
    if (auto& deferred = parameter->hook->deferred)
      deferred->tasks.push_back(add);
    else
      add();
  });
}

}  // extern "C"
