// Causal attention on a GPU by libtorch's fused kernels: FlashAttention 2 and cuDNN's. Both take fewer heads of keys and
// values than of queries as they are, and several documents of any length, one after another, without a mask.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>

#include "common.h"

using at::Tensor;
using phalanx::give;
using phalanx::guarded;

namespace {

enum Kernel { kFlash = 0, kCudnn = 1 };

// The backward kernels add up in any order, unless they are told not to: equal runs shall have equal bits. What makes a
// memory of NaN of each new tensor is not wanted with it.
class Deterministic {
 public:
  Deterministic() {
    auto& context = at::globalContext();
    before_ = context.deterministicAlgorithms();
    before_warns_ = context.deterministicAlgorithmsWarnOnly();
    context.setDeterministicFillUninitializedMemory(false);
    context.setDeterministicAlgorithms(true, false);
  }
  ~Deterministic() { at::globalContext().setDeterministicAlgorithms(before_, before_warns_); }

 private:
  bool before_, before_warns_;
};

std::optional<Tensor> given(const Tensor* tensor) { return tensor ? std::optional<Tensor>(*tensor) : std::nullopt; }

Tensor or_undefined(const Tensor* tensor) { return tensor ? *tensor : Tensor(); }

Tensor swapped(const Tensor& x) { return x.transpose(1, 2); }

}  // namespace

extern "C" {

// Queries, keys and values: [batch, sequence, heads, head_dim], or with `starts`, the tokens at which documents begin and
// the last one's end (int32), [tokens, heads, head_dim]; `longest` is the longest row or document. `out`: attention, in the
// form of the queries, and three tensors for the backward pass.
char* phx_flash_forward(int kernel, Tensor* q, Tensor* k, Tensor* v, Tensor* starts, int64_t longest, Tensor** out) {
  return guarded([&] {
    RECORD_FUNCTION("phalanx::flash_attention", c10::ArrayRef<const c10::IValue>());
    auto by = given(starts);
    if (kernel == kFlash) {
      auto [mixed, logsumexp, state, unused, mask] =
          at::_flash_attention_forward(*q, *k, *v, by, by, longest, longest, 0.0, true, false);
      out[0] = give(mixed);
      out[1] = give(logsumexp);
      out[2] = give(state);
      out[3] = give(unused);
      return;
    }
    bool dense = !starts;
    auto form = [&](const Tensor& x) { return dense ? swapped(x) : x; };
    auto made = at::_cudnn_attention_forward(form(*q), form(*k), form(*v), {}, by, by, longest, longest, true, 0.0, true,
                                             false);
    out[0] = give(form(std::get<0>(made)));
    out[1] = give(std::get<1>(made));
    out[2] = give(std::get<6>(made));
    out[3] = give(std::get<7>(made));
  });
}

// The gradients of queries, keys and values. `kept` is what the forward pass gave.
char* phx_flash_backward(int kernel, Tensor* d_out, Tensor* q, Tensor* k, Tensor* v, Tensor* const* kept, Tensor* starts,
                         int64_t longest, Tensor** out) {
  return guarded([&] {
    RECORD_FUNCTION("phalanx::flash_attention_backward", c10::ArrayRef<const c10::IValue>());
    at::NoGradGuard no_grad;
    Deterministic deterministic;
    auto by = or_undefined(starts);
    auto mixed = or_undefined(kept[0]), logsumexp = or_undefined(kept[1]);
    auto first = or_undefined(kept[2]), second = or_undefined(kept[3]);
    if (kernel == kFlash) {
      auto [dq, dk, dv] = at::_flash_attention_backward(*d_out, *q, *k, *v, mixed, logsumexp, by, by, longest, longest, 0.0,
                                                        true, first, second);
      out[0] = give(dq);
      out[1] = give(dk);
      out[2] = give(dv);
      return;
    }
    bool dense = !starts;
    auto form = [&](const Tensor& x) { return dense ? swapped(x) : x; };
    auto [dq, dk, dv] =
        at::_cudnn_attention_backward(form(*d_out), form(*q), form(*k), form(*v), form(mixed), logsumexp, first, second,
                                      Tensor(), by, by, longest, longest, 0.0, true);
    out[0] = give(form(dq));
    out[1] = give(form(dk));
    out[2] = give(form(dv));
  });
}

}  // extern "C"
