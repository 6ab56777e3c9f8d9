// Linear and embedding whose weight gradients go straight into the accumulator.
#include <ATen/ATen.h>

#include "fused.h"
#include "matmul.h"

namespace phalanx {

void accumulate_product(Tensor& accumulator, const Tensor& a, const Tensor& b) {
  if (fast_accumulate(accumulator, a, b)) return;
  auto dtype = accumulator.scalar_type();
  if (a.is_cuda() && dtype == at::kFloat && (a.scalar_type() == at::kBFloat16 || a.scalar_type() == at::kHalf)) {
    // The product is made and added up in FP32, of operands as they are.
    at::addmm_out(accumulator, accumulator, a.t(), b, at::kFloat);
    return;
  }
  // Products of BF16 operands are exact in FP32, so casting both loses nothing and keeps the sum in FP32.
  accumulator.addmm_(a.to(dtype).t(), b.to(dtype));
}

void accumulate_rows(Tensor& accumulator, const Tensor& index, const Tensor& rows) {
  if (!accumulator.is_cuda()) {
    accumulator.index_add_(0, index, rows);
    return;
  }
  // The GPU's index_add_ adds rows of one index in any order. This sorts them; the last flag: it does not look at the
  // indices, for which the host would have to wait.
  at::_index_put_impl_(accumulator, {std::optional<Tensor>(index)}, rows, /*accumulate=*/true, /*unsafe=*/true);
}

void Use::accumulate(const Tensor& dy, const Tensor& x) {
  auto rows = dy.reshape({-1, parameter->weight.size(0)}), columns = x.reshape({-1, parameter->weight.size(1)});
  if (auto& deferred = parameter->hook->deferred) {
    deferred->tasks.push_back([self = share(), rows, columns] {
      accumulate_product(self->parameter->gradient, rows, columns);
    });
  } else {
    accumulate_product(parameter->gradient, rows, columns);
  }
}

// Without AVX-512, libtorch multiplies BF16 matrices one element at a time: then the products are made in FP32, with the
// same rounding at the end.
static bool widen(const Tensor& x) {
  static const bool fast = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                           __builtin_cpu_supports("avx512dq");
  return !fast && x.is_cpu() && x.scalar_type() == at::kBFloat16;
}

Tensor project(const Tensor& x, const Tensor& weight) {
  if (widen(x) && weight.scalar_type() == at::kBFloat16)
    return at::linear(x.to(at::kFloat), weight.to(at::kFloat)).to(at::kBFloat16);
  if (!x.is_cpu() || x.scalar_type() != at::kFloat) return at::linear(x, weight);
  auto out = fast_project(x.reshape({-1, x.size(-1)}), weight);
  if (!out.defined()) return at::linear(x, weight);
  auto sizes = x.sizes().vec();
  sizes.back() = weight.size(0);
  return out.view(sizes);
}

Tensor product(const Tensor& a, const Tensor& b) {
  auto out = at::empty({a.size(0), b.size(1)}, a.options());
  multiply_into(out, a, b);
  return out;
}

void multiply_into(Tensor out, const Tensor& a, const Tensor& b) {
  if (widen(a))
    out.copy_(at::mm(a.to(at::kFloat), b.to(at::kFloat)));
  else if (!fast_product(a, b, out))
    at::mm_out(out, a, b);
}

}  // namespace phalanx

namespace {

using namespace phalanx;

struct Linear : torch::autograd::Function<Linear> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight,
                        const c10::intrusive_ptr<Use>& use, bool with_values) {
    keep_use(context, use);
    context->save_for_backward({x});
    if (with_values) return project(x, weight);
    auto sizes = x.sizes().vec();
    sizes.back() = weight.size(0);
    return at::empty({1}, x.options()).expand(sizes);
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    auto use = kept_use(context);
    auto& parameter = *use->parameter;
    auto x = context->get_saved_variables()[0];
    auto dy = gradients[0].reshape({-1, parameter.weight.size(0)});
    Tensor dx;
    if (context->needs_input_grad(0)) dx = product(dy, parameter.weight.detach()).view(x.sizes());
    use->accumulate(dy, x);
    use->done();
    return {dx, Tensor(), Tensor(), Tensor()};
  }
};

struct Embedding : torch::autograd::Function<Embedding> {
  static Tensor forward(AutogradContext* context, const Tensor& tokens, const Tensor& weight,
                        const c10::intrusive_ptr<Use>& use) {
    keep_use(context, use);
    context->save_for_backward({tokens});
    return at::embedding(weight, tokens);
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    auto use = kept_use(context);
    auto& parameter = *use->parameter;
    auto tokens = context->get_saved_variables()[0].reshape({-1});
    auto dy = gradients[0].reshape({-1, parameter.weight.size(1)}).to(parameter.gradient.scalar_type());
    accumulate_rows(parameter.gradient, tokens, dy);
    use->done();
    return {Tensor(), Tensor(), Tensor()};
  }
};

}  // namespace

extern "C" {

char* phx_linear(Tensor* x, Parameter* parameter, Tensor** out) {
  return guarded([&] {
    PHALANX_OPERATOR("linear");
    *out = give(Linear::apply(*x, parameter->weight, open_use(parameter), true));
  });
}

char* phx_linear_graph(Tensor* x, Parameter* parameter, Tensor** out) {
  return guarded([&] { *out = give(Linear::apply(*x, parameter->weight, open_use(parameter), false)); });
}

char* phx_embedding(Tensor* tokens, Parameter* parameter, Tensor** out) {
  return guarded([&] {
    PHALANX_OPERATOR("embedding");
    *out = give(Embedding::apply(*tokens, parameter->weight, open_use(parameter)));
  });
}

char* phx_project(Tensor* x, Parameter* parameter, Tensor** out) {
  return guarded([&] {
    PHALANX_OPERATOR("project");
    *out = give(project(x->detach(), parameter->weight.detach()));
  });
}

char* phx_product(Tensor* a, Parameter* parameter, Tensor** out) {
  return guarded([&] {
    PHALANX_OPERATOR("product");
    auto rows = a->reshape({-1, a->size(-1)});
    auto sizes = a->sizes().vec();
    sizes.back() = parameter->weight.size(1);
    *out = give(product(rows.detach(), parameter->weight.detach()).view(sizes));
  });
}

char* phx_use_open(Parameter* parameter, Use** out) {
  return guarded([&] { *out = open_use(parameter).release(); });
}

char* phx_use_accumulate(Use* use, Tensor* dy, Tensor* x) {
  return guarded([&] {
    PHALANX_OPERATOR("accumulate");
    use->accumulate(*dy, *x);
  });
}

char* phx_use_accumulate_rows(Use* use, Tensor* tokens, Tensor* dy) {
  return guarded([&] {
    auto& parameter = *use->parameter;
    accumulate_rows(parameter.gradient, tokens->reshape({-1}),
                    dy->reshape({-1, parameter.weight.size(1)}).to(parameter.gradient.scalar_type()));
  });
}

char* phx_use_done(Use* use) {
  return guarded([&] { use->done(); });
}

bool phx_use_counts(Use* use) { return use->open; }

void phx_use_free(Use* use) { c10::intrusive_ptr<Use>::reclaim(use); }

}  // extern "C"
