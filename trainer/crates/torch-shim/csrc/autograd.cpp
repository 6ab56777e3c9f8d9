// Autograd with Rust closures: custom functions, hooks, backward with given gradients.
#include <ATen/ops/ones_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>

#include "closure.h"

using at::Tensor;
using phalanx::Closure;
using phalanx::guarded;
using torch::autograd::variable_list;
using ClosurePtr = c10::intrusive_ptr<Closure>;

namespace {

// The inputs must come as a TensorList: a std::vector<Tensor> would silently be taken for a non-tensor argument.
struct RustFunction : torch::autograd::Function<RustFunction> {
  // What `forward` returns beyond `num_out` tensors is saved: backward gets it behind the gradients, and it goes with the graph.
  static variable_list forward(torch::autograd::AutogradContext* context, at::TensorList inputs, ClosurePtr forward,
                               ClosurePtr backward, int64_t num_out, int64_t num_saved) {
    context->saved_data["backward"] = c10::IValue::make_capsule(backward);
    context->saved_data["num_in"] = static_cast<int64_t>(inputs.size());
    auto out = forward->call(inputs.vec(), num_out + num_saved);
    if (num_saved > 0) {
      context->set_materialize_grads(false);
      context->save_for_backward(variable_list(out.begin() + num_out, out.end()));
      out.resize(num_out);
    }
    return out;
  }

  static variable_list backward(torch::autograd::AutogradContext* context, variable_list gradients) {
    auto capsule = context->saved_data["backward"].toCapsule();
    size_t num_in = context->saved_data["num_in"].toInt();
    for (auto& saved : context->get_saved_variables()) gradients.push_back(saved);
    auto out = static_cast<Closure*>(capsule.get())->call(gradients, num_in);
    out.resize(num_in + 4);  // the closures and the counts take no gradient
    return out;
  }
};

struct PostAccumulateHook : torch::autograd::PostAccumulateGradHook {
  ClosurePtr closure;
  void operator()(const torch::autograd::Variable& tensor) override { closure->call({tensor}, 0); }
};

}  // namespace

extern "C" {

bool phx_is_recording() { return c10::GradMode::is_enabled(); }

void phx_free(void* pointer) { std::free(pointer); }

// Takes both closures over whatever happens.
char* phx_apply(Tensor* const* in, size_t num_in, Tensor** out, size_t num_out, size_t num_saved, void* forward_context,
                phx_call forward, void* backward_context, phx_call backward, phx_drop drop) {
  return guarded([&] {
    auto forward_closure = c10::make_intrusive<Closure>(forward_context, forward, drop);
    auto backward_closure = c10::make_intrusive<Closure>(backward_context, backward, drop);
    auto inputs = phalanx::tensors(in, num_in);
    auto results = RustFunction::apply(at::TensorList(inputs), forward_closure, backward_closure,
                                       static_cast<int64_t>(num_out), static_cast<int64_t>(num_saved));
    for (size_t i = 0; i < num_out; i++) out[i] = phalanx::give(results[i]);
  });
}

// Counts a write to the tensor's memory that libtorch did not see.
char* phx_written(Tensor* tensor) {
  return guarded([&] { tensor->unsafeGetTensorImpl()->bump_version(); });
}

char* phx_post_accumulate_hook(Tensor* tensor, void* context, phx_call call, phx_drop drop) {
  return guarded([&] {
    auto hook = std::make_unique<PostAccumulateHook>();
    hook->closure = c10::make_intrusive<Closure>(context, call, drop);
    TORCH_CHECK(tensor->requires_grad() && tensor->is_leaf(),
                "a post-accumulate hook wants a leaf that requires a gradient");
    torch::autograd::impl::set_post_acc_grad_hooks(*tensor, std::move(hook));
  });
}

char* phx_gradient_hook(Tensor* tensor, void* context, phx_call call, phx_drop drop) {
  return guarded([&] {
    auto closure = c10::make_intrusive<Closure>(context, call, drop);
    TORCH_CHECK(tensor->requires_grad(), "a gradient hook wants a tensor that requires a gradient");
    tensor->register_hook([closure](const Tensor& gradient) -> Tensor {
      auto replaced = closure->call({gradient}, 1)[0];
      return replaced.defined() ? replaced : gradient;
    });
  });
}

// Backward from `out` with the gradients `given` (null: ones). With `in`, their gradients are returned and nothing is
// accumulated into leaves.
char* phx_backward(Tensor* const* out, Tensor* const* given, size_t num_out, Tensor* const* in, size_t num_in,
                   Tensor** gradients, bool keep_graph) {
  return guarded([&] {
    torch::autograd::edge_list roots, targets;
    variable_list root_gradients;
    for (size_t i = 0; i < num_out; i++) {
      TORCH_CHECK(out[i]->requires_grad(), "output ", i, " of the backward pass does not require a gradient");
      roots.push_back(torch::autograd::impl::gradient_edge(*out[i]));
      root_gradients.push_back(given && given[i] ? *given[i] : at::ones_like(*out[i]));
    }
    for (size_t i = 0; i < num_in; i++) {
      TORCH_CHECK(in[i]->requires_grad(), "input ", i, " of the backward pass does not require a gradient");
      targets.push_back(torch::autograd::impl::gradient_edge(*in[i]));
    }
    auto result = torch::autograd::Engine::get_default_engine().execute(roots, root_gradients, keep_graph, false,
                                                                        num_in == 0, targets);
    for (size_t i = 0; i < num_in; i++) gradients[i] = phalanx::give(result[i]);
  });
}

}  // extern "C"
