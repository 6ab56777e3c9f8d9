// Element-wise sums and copies on the calling thread alone: communication threads must not wake the OpenMP pool that
// computes.
#include "common.h"

using at::Tensor;
using phalanx::guarded;

namespace {

enum Operation { kSum = 0, kMin = 1, kMax = 2 };

template <typename T, typename Wide>
void combine(T* accumulator, const T* x, int64_t count, int operation) {
  switch (operation) {
    case kSum:
      for (int64_t i = 0; i < count; i++) accumulator[i] = T(Wide(accumulator[i]) + Wide(x[i]));
      return;
    case kMin:  // a NaN wins, so that no rank can hide one
      for (int64_t i = 0; i < count; i++)
        if (!(accumulator[i] != accumulator[i]) && !(x[i] >= accumulator[i])) accumulator[i] = x[i];
      return;
    default:
      for (int64_t i = 0; i < count; i++)
        if (!(accumulator[i] != accumulator[i]) && !(x[i] <= accumulator[i])) accumulator[i] = x[i];
  }
}

template <typename T, typename Wide>
void divide(T* x, int64_t count, double divisor) {
  for (int64_t i = 0; i < count; i++) x[i] = T(Wide(x[i]) / Wide(divisor));
}

void check_pair(const Tensor& a, const Tensor& b) {
  TORCH_CHECK(a.is_cpu() && b.is_cpu() && a.is_contiguous() && b.is_contiguous(), "contiguous CPU tensors are wanted");
  TORCH_CHECK(a.numel() == b.numel() && a.scalar_type() == b.scalar_type(), "tensors of ", a.numel(), " ",
              a.scalar_type(), " and ", b.numel(), " ", b.scalar_type(), " elements do not pair up");
}

}  // namespace

extern "C" {

char* phx_combine(Tensor* accumulator, Tensor* x, int operation) {
  return guarded([&] {
    check_pair(*accumulator, *x);
    auto count = x->numel();
    auto run = [&](auto zero, auto wide) {
      using T = decltype(zero);
      combine<T, decltype(wide)>(static_cast<T*>(accumulator->data_ptr()), static_cast<const T*>(x->data_ptr()), count,
                                 operation);
    };
    switch (x->scalar_type()) {
      case at::kFloat: return run(float(), float());
      case at::kDouble: return run(double(), double());
      case at::kBFloat16: return run(c10::BFloat16(), float());
      case at::kLong: return run(int64_t(), int64_t());
      default: TORCH_CHECK(false, "no reduction of ", x->scalar_type());
    }
  });
}

char* phx_divide(Tensor* x, double divisor) {
  return guarded([&] {
    check_pair(*x, *x);
    switch (x->scalar_type()) {
      case at::kFloat: return divide<float, float>(x->data_ptr<float>(), x->numel(), divisor);
      case at::kDouble: return divide<double, double>(x->data_ptr<double>(), x->numel(), divisor);
      case at::kBFloat16: return divide<c10::BFloat16, float>(x->data_ptr<c10::BFloat16>(), x->numel(), divisor);
      default: TORCH_CHECK(false, "no average of ", x->scalar_type());
    }
  });
}

char* phx_copy(Tensor* to, Tensor* from) {
  return guarded([&] {
    check_pair(*to, *from);
    if (from->nbytes()) std::memcpy(to->data_ptr(), from->data_ptr(), from->nbytes());
  });
}

}  // extern "C"
