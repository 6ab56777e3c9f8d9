// RMSNorm, alone and with the residual addition before it.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "fused.h"

namespace {

using namespace phalanx;

struct Normed {
  Tensor y, sum, reciprocal;
};

// y = w * z / sqrt(mean(z^2) + eps) for z = x (+ residual), statistics in FP32 (FP64 stays).
Normed plain_forward(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  auto sum = residual.defined() ? x + residual : x;
  auto wide = sum.to(statistics_dtype(x));
  auto reciprocal = at::rsqrt(at::mean(wide * wide, {-1}, true) + eps);
  return {(wide * reciprocal * weight.to(wide.scalar_type())).to(x.scalar_type()), sum, reciprocal};
}

Normed forward(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  bool fits = residual.defined() ? vectorised({x, residual, weight}) && x.sizes() == residual.sizes()
                                 : vectorised({x, weight});
  if (!fits || x.size(-1) != weight.numel()) return plain_forward(x, residual, weight, eps);
  int64_t width = x.size(-1), rows = x.numel() / width;
  Normed out{at::empty_like(x), residual.defined() ? at::empty_like(x) : x,
             at::empty({rows}, x.options().dtype(at::kFloat))};
  with_storage(x, [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, rows, grain(width), [&](int64_t from, int64_t to) {
      const T* added = residual.defined() ? data<T>(residual) + from * width : nullptr;
      kernels<T>().norm(data<T>(x) + from * width, added, data<T>(weight), data<T>(out.sum) + from * width,
                        data<T>(out.y) + from * width, data<float>(out.reciprocal) + from, to - from, width, eps);
    });
  });
  return out;
}

Tensor plain_backward(const Tensor& dy, const Tensor& d_sum, const Tensor& z, const Tensor& reciprocal,
                      Parameter& parameter) {
  auto dtype = reciprocal.scalar_type();
  auto unit = z.to(dtype) * reciprocal;
  auto wide_dy = dy.to(dtype);
  parameter.gradient.add_((wide_dy * unit).reshape({-1, z.size(-1)}).sum(0));
  auto scaled = wide_dy * parameter.weight.detach().to(dtype);
  auto dx = ((scaled - unit * at::mean(scaled * unit, {-1}, true)) * reciprocal).to(z.scalar_type());
  return d_sum.defined() ? dx + d_sum : dx;
}

// dx of the norm, plus `d_sum` where defined; adds the weight's gradient. One partial sum for each chunk of rows, added in order.
Tensor backward(const Tensor& given, const Tensor& d_sum, const Tensor& z, const Tensor& reciprocal,
                Parameter& parameter) {
  if (reciprocal.dim() != 1) return plain_backward(given, d_sum, z, reciprocal, parameter);
  auto dy = given.contiguous(), extra = d_sum.defined() ? d_sum.contiguous() : Tensor();
  int64_t width = z.size(-1), rows = z.numel() / width;
  // As many for any number of threads, so that the sums are the same.
  int64_t chunks = std::clamp<int64_t>(rows / 64, 1, 64);
  auto dx = at::empty_like(z);
  auto partial = at::zeros({chunks, width}, reciprocal.options());
  with_storage(z, [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; chunk++) {
        int64_t from = rows * chunk / chunks, to = rows * (chunk + 1) / chunks, at = from * width;
        kernels<T>().norm_backward(data<T>(dy) + at, extra.defined() ? data<T>(extra) + at : nullptr, data<T>(z) + at,
                                   data<T>(parameter.weight), data<float>(reciprocal) + from, data<T>(dx) + at,
                                   data<float>(partial) + chunk * width, to - from, width);
      }
    });
  });
  for (int64_t chunk = 0; chunk < chunks; chunk++) parameter.gradient.add_(partial[chunk]);
  return dx;
}

struct RmsNorm : torch::autograd::Function<RmsNorm> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight,
                        const c10::intrusive_ptr<Use>& use, double eps) {
    keep_use(context, use);
    auto out = ::forward(x, Tensor(), weight, eps);
    context->save_for_backward({x, out.reciprocal});
    return out.y;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    auto use = kept_use(context);
    auto saved = context->get_saved_variables();
    auto dx = ::backward(gradients[0], Tensor(), saved[0], saved[1], *use->parameter);
    use->done();
    return {dx, Tensor(), Tensor(), Tensor()};
  }
};

struct AddRmsNorm : torch::autograd::Function<AddRmsNorm> {
  static variable_list forward(AutogradContext* context, const Tensor& x, const Tensor& residual,
                               const Tensor& weight, const c10::intrusive_ptr<Use>& use, double eps) {
    keep_use(context, use);
    context->set_materialize_grads(false);
    auto out = ::forward(x, residual, weight, eps);
    context->save_for_backward({out.sum, out.reciprocal});
    return {out.y, out.sum};
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    auto use = kept_use(context);
    auto saved = context->get_saved_variables();
    auto dx = gradients[1];
    if (gradients[0].defined()) dx = ::backward(gradients[0], gradients[1], saved[0], saved[1], *use->parameter);
    use->done();
    return {dx, dx, Tensor(), Tensor(), Tensor()};
  }
};

}  // namespace

extern "C" {

char* phx_rms_norm(Tensor* x, Parameter* parameter, double eps, Tensor** out) {
  return guarded([&] {
    PHALANX_OPERATOR("rms_norm");
    *out = give(RmsNorm::apply(*x, parameter->weight, open_use(parameter), eps));
  });
}

char* phx_add_rms_norm(Tensor* x, Tensor* residual, Parameter* parameter, double eps, Tensor** normed, Tensor** sum) {
  return guarded([&] {
    PHALANX_OPERATOR("add_rms_norm");
    auto out = AddRmsNorm::apply(*x, *residual, parameter->weight, open_use(parameter), eps);
    *normed = give(out[0]);
    *sum = give(out[1]);
  });
}

}  // extern "C"
