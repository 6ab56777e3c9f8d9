// RMSNorm, alone and with the residual addition before it.
#include <ATen/ATen.h>

#include "fused.h"

namespace {

using namespace phalanx;

// y = w * x / sqrt(mean(x^2) + eps), statistics in FP32 (FP64 stays). Returns y and the reciprocal root [tokens, 1].
std::tuple<Tensor, Tensor> norm_forward(const Tensor& x, const Tensor& weight, double eps) {
  auto wide = x.to(statistics_dtype(x));
  auto reciprocal = at::rsqrt(at::mean(wide * wide, {-1}, true) + eps);
  auto y = (wide * reciprocal * weight.to(wide.scalar_type())).to(x.scalar_type());
  return {y, reciprocal};
}

// dx of the norm alone; adds the weight's gradient.
Tensor norm_backward(const Tensor& dy, const Tensor& x, const Tensor& reciprocal, Parameter& parameter) {
  auto dtype = reciprocal.scalar_type();
  auto unit = x.to(dtype) * reciprocal;
  auto wide_dy = dy.to(dtype);
  auto width = x.size(-1);
  parameter.gradient.add_((wide_dy * unit).reshape({-1, width}).sum(0));
  auto scaled = wide_dy * parameter.weight.detach().to(dtype);
  auto projection = at::mean(scaled * unit, {-1}, true);
  return ((scaled - unit * projection) * reciprocal).to(x.scalar_type());
}

struct RmsNorm : torch::autograd::Function<RmsNorm> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight,
                        const c10::intrusive_ptr<Use>& use, double eps) {
    keep_use(context, use);
    auto [y, reciprocal] = norm_forward(x, weight, eps);
    context->save_for_backward({x, reciprocal});
    return y;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    auto use = kept_use(context);
    auto saved = context->get_saved_variables();
    auto dx = norm_backward(gradients[0], saved[0], saved[1], *use->parameter);
    use->done();
    return {dx, Tensor(), Tensor(), Tensor()};
  }
};

struct AddRmsNorm : torch::autograd::Function<AddRmsNorm> {
  static variable_list forward(AutogradContext* context, const Tensor& x, const Tensor& residual,
                               const Tensor& weight, const c10::intrusive_ptr<Use>& use, double eps) {
    keep_use(context, use);
    auto sum = x + residual;
    auto [y, reciprocal] = norm_forward(sum, weight, eps);
    context->save_for_backward({sum, reciprocal});
    return {y, sum};
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    auto use = kept_use(context);
    auto saved = context->get_saved_variables();
    Tensor dx;
    if (gradients[0].defined()) dx = norm_backward(gradients[0], saved[0], saved[1], *use->parameter);
    if (gradients[1].defined()) dx = dx.defined() ? dx + gradients[1] : gradients[1];
    use->done();
    return {dx, dx, Tensor(), Tensor(), Tensor()};
  }
};

}  // namespace

extern "C" {

char* phx_rms_norm(Tensor* x, Parameter* parameter, double eps, Tensor** out) {
  return guarded([&] { *out = give(RmsNorm::apply(*x, parameter->weight, open_use(parameter), eps)); });
}

char* phx_add_rms_norm(Tensor* x, Tensor* residual, Parameter* parameter, double eps, Tensor** normed, Tensor** sum) {
  return guarded([&] {
    auto out = AddRmsNorm::apply(*x, *residual, parameter->weight, open_use(parameter), eps);
    *normed = give(out[0]);
    *sum = give(out[1]);
  });
}

}  // extern "C"
