// Output head and cross-entropy in one, so that the full logits never exist.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "fused.h"

namespace {

using namespace phalanx;

// One chunk: its loss; with gradients, turns `logits` into their gradient in place.
Tensor chunk_loss(Tensor& logits, const Tensor& targets, double scale, bool gradients) {
  auto valid = targets.ne(-100);
  auto index = targets.clamp_min(0).unsqueeze(1);
  auto normalizer = at::logsumexp(logits, {1});
  auto losses = (normalizer - logits.gather(1, index).squeeze(1)) * valid;
  if (gradients) {
    logits.sub_(normalizer.unsqueeze(1)).exp_();
    logits.scatter_add_(1, index, at::full_like(index, -1.0, logits.scalar_type()));
    logits.mul_((valid.to(logits.scalar_type()) * scale).unsqueeze(1));  // bool * double would be FP32
  }
  return losses.sum() * scale;
}

// The same in one sweep, for FP32 and BF16 on the CPU; the losses of the rows are added in order, in FP64.
double fast_chunk_loss(Tensor& logits, const Tensor& targets, double scale, bool gradients) {
  int64_t rows = logits.size(0), width = logits.size(1);
  std::vector<double> losses(rows);
  with_storage(logits, [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, rows, grain(width), [&](int64_t from, int64_t to) {
      kernels<T>().cross_entropy(data<T>(logits) + from * width, data<int64_t>(targets) + from, losses.data() + from,
                                 to - from, width, scale, gradients);
    });
  });
  double sum = 0;
  for (double loss : losses) sum += loss;
  return sum * scale;
}

// On a GPU the host would have to wait; whoever puts targets there has looked at them.
void check_targets(const Tensor& targets, int64_t vocabulary) {
  if (!targets.is_cpu()) return;
  auto wrong = (targets.ne(-100)).logical_and(targets.lt(0).logical_or(targets.ge(vocabulary)));
  TORCH_CHECK(!wrong.any().item<bool>(), "head_loss: a target lies outside the vocabulary of ", vocabulary);
}

// The forward pass computes the gradients too: logits are made once and dropped chunk by chunk. The weight's gradient is
// added there for a loss gradient of exactly one, which backward checks.
struct HeadLoss : torch::autograd::Function<HeadLoss> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight,
                        const c10::intrusive_ptr<Use>& use, const Tensor& targets, double scale, int64_t chunk) {
    auto& parameter = *use->parameter;
    auto rows = x.reshape({-1, x.size(-1)});
    auto labels = targets.reshape({-1}).to(at::kLong);
    auto dtype = statistics_dtype(x);
    check_targets(labels, weight.size(0));
    auto loss = at::zeros({}, x.options().dtype(dtype));
    double fast_loss = 0;
    auto dx = use->open ? at::empty_like(rows) : Tensor();
    for (int64_t start = 0; start < rows.size(0); start += chunk) {
      auto count = std::min(chunk, rows.size(0) - start);
      auto part = rows.narrow(0, start, count);
      auto logits = project(part, weight), part_labels = labels.narrow(0, start, count);
      if (vectorised({logits})) {
        fast_loss += fast_chunk_loss(logits, part_labels, scale, use->open);
      } else {
        logits = logits.to(dtype);
        loss += chunk_loss(logits, part_labels, scale, use->open);
      }
      if (!use->open) continue;
      auto d_logits = logits.to(x.scalar_type());
      multiply_into(dx.narrow(0, start, count), d_logits, weight);
      accumulate_product(parameter.gradient, d_logits, part);
    }
    keep_use(context, use);
    if (use->open) context->save_for_backward({dx.view(x.sizes())});
    return fast_loss == 0 ? loss : loss + fast_loss;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    auto use = kept_use(context);
    // The same for the gradient, which on a GPU is looked at there.
    const char* wrong =
        "head_loss computes its gradients in the forward pass, for a loss gradient of one; put every factor into its scale";
    if (gradients[0].is_cpu()) {
      TORCH_CHECK(gradients[0].item<double>() == 1.0, wrong);
    } else {
      at::_assert_async(gradients[0].eq(1.0), wrong);
    }
    auto dx = context->get_saved_variables()[0];
    use->done();
    return {dx, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

}  // namespace

extern "C" {

char* phx_head_loss(Tensor* x, Parameter* parameter, Tensor* targets, double scale, int64_t chunk, Tensor** out) {
  return guarded([&] {
    PHALANX_OPERATOR("head_loss");
    TORCH_CHECK(chunk > 0, "head_loss: chunk_tokens must be at least 1, not ", chunk);
    TORCH_CHECK(targets->numel() * x->size(-1) == x->numel(), "head_loss: ", targets->numel(), " targets for an input of ",
                x->sizes());
    *out = give(HeadLoss::apply(*x, parameter->weight, open_use(parameter), *targets, scale, chunk));
  });
}

}  // extern "C"
