// Operators of a block that hold no weight: rotary embedding and SwiGLU. Attention is in fused_attention.cpp.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "fused.h"

namespace {

using namespace phalanx;

// x: [batch, sequence, heads, head_dim]; cos, sin: [.., sequence, 1, head_dim], both halves equal. `sign` is 1 for the
// rotation and -1 for its inverse, which is also its transpose.
Tensor rotate(const Tensor& x, const Tensor& cos, const Tensor& sin, double sign) {
  auto wide = x.to(cos.scalar_type());
  auto halves = wide.chunk(2, -1);
  auto turned = at::cat({halves[1].neg(), halves[0]}, -1);
  return (wide * cos + turned * (sin * sign)).to(x.scalar_type());
}

// The vectorised form, for contiguous tables of FP32: [sequence, head_dim], or one for each row of the batch.
bool fast_tables(const Tensor& x, const Tensor& cos, const Tensor& sin, int64_t head_dim) {
  int64_t tokens = x.size(0) * x.size(1);
  bool fits = cos.numel() == tokens * head_dim || (cos.dim() == 2 && cos.numel() == x.size(1) * head_dim);
  return vectorised({x}) && vectorised({cos, sin}) && cos.scalar_type() == at::kFloat && fits &&
         sin.numel() == cos.numel() && head_dim % 2 == 0;
}

// Turns q and k, and moves v, between the fused layout and three tensors [batch, sequence, heads, head_dim].
template <typename T>
void turn(T* qkv, T* const* parts, const int64_t* heads, const Tensor& cos, const Tensor& sin, int64_t tokens,
          int64_t head_dim, bool back) {
  int64_t width = (heads[0] + heads[1] + heads[2]) * head_dim, positions = cos.numel() / head_dim;
  at::parallel_for(0, tokens, grain(width), [&](int64_t from, int64_t to) {
    for (int64_t token = from; token < to; token++) {
      T* fused = qkv + token * width;
      int64_t position = token % positions * head_dim;
      for (int part = 0; part < 3; part++) {
        int64_t size = heads[part] * head_dim;
        T* own = parts[part] + token * size;
        T *source = back ? own : fused, *target = back ? fused : own;
        if (part == 2)
          std::memcpy(static_cast<void*>(target), source, size * sizeof(T));
        else
          kernels<T>().rotate(source, target, data<float>(cos) + position, data<float>(sin) + position, heads[part],
                              head_dim, back ? -1.0f : 1.0f);
        fused += size;
      }
    }
  });
}

struct RopeQkv : torch::autograd::Function<RopeQkv> {
  static variable_list forward(AutogradContext* context, const Tensor& qkv, const Tensor& cos, const Tensor& sin,
                               int64_t heads, int64_t kv_heads, int64_t head_dim) {
    context->save_for_backward({cos, sin});
    context->saved_data["shape"] = std::vector<int64_t>{heads, kv_heads, kv_heads, head_dim};
    auto shape = [&](int64_t count) { return std::vector<int64_t>{qkv.size(0), qkv.size(1), count, head_dim}; };
    TORCH_CHECK(qkv.dim() == 3 && qkv.size(2) == (heads + 2 * kv_heads) * head_dim, "rope_qkv: ", qkv.sizes(),
                " does not hold ", heads, " + 2 x ", kv_heads, " heads of ", head_dim);
    if (fast_tables(qkv, cos, sin, head_dim)) {
      auto q = at::empty(shape(heads), qkv.options()), k = at::empty(shape(kv_heads), qkv.options());
      auto v = at::empty_like(k);
      int64_t counts[] = {heads, kv_heads, kv_heads};
      with_storage(qkv, [&](auto zero) {
        using T = decltype(zero);
        T* parts[] = {data<T>(q), data<T>(k), data<T>(v)};
        turn<T>(data<T>(qkv), parts, counts, cos, sin, qkv.size(0) * qkv.size(1), head_dim, false);
      });
      return {q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)};
    }
    auto split = qkv.unflatten(-1, {heads + 2 * kv_heads, head_dim});
    auto c = cos.unsqueeze(-2), s = sin.unsqueeze(-2);
    auto q = rotate(split.narrow(2, 0, heads), c, s, 1.0).transpose(1, 2);
    auto k = rotate(split.narrow(2, heads, kv_heads), c, s, 1.0).transpose(1, 2);
    auto v = split.narrow(2, heads + kv_heads, kv_heads).clone().transpose(1, 2);
    return {q, k, v};
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    auto saved = context->get_saved_variables();
    auto shape = context->saved_data["shape"].toIntVector();
    auto first = gradients[0].transpose(1, 2).contiguous();
    int64_t head_dim = shape[3], width = (shape[0] + shape[1] + shape[2]) * head_dim;
    if (fast_tables(first, saved[0], saved[1], head_dim)) {
      auto second = gradients[1].transpose(1, 2).contiguous(), third = gradients[2].transpose(1, 2).contiguous();
      auto dqkv = at::empty({first.size(0), first.size(1), width}, first.options());
      with_storage(first, [&](auto zero) {
        using T = decltype(zero);
        T* parts[] = {data<T>(first), data<T>(second), data<T>(third)};
        turn<T>(data<T>(dqkv), parts, shape.data(), saved[0], saved[1], first.size(0) * first.size(1), head_dim, true);
      });
      return {dqkv, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
    }
    auto c = saved[0].unsqueeze(-2), s = saved[1].unsqueeze(-2);
    auto dq = rotate(gradients[0].transpose(1, 2), c, s, -1.0);
    auto dk = rotate(gradients[1].transpose(1, 2), c, s, -1.0);
    auto dqkv = at::cat({dq, dk, gradients[2].transpose(1, 2)}, 2).flatten(2);
    return {dqkv, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

struct SwiGlu : torch::autograd::Function<SwiGlu> {
  static Tensor forward(AutogradContext* context, const Tensor& gate_up) {
    context->save_for_backward({gate_up});
    if (vectorised({gate_up})) {
      auto sizes = gate_up.sizes().vec();
      int64_t width = sizes.back() /= 2;
      auto y = at::empty(sizes, gate_up.options());
      with_storage(gate_up, [&](auto zero) {
        using T = decltype(zero);
        at::parallel_for(0, y.numel() / width, grain(width), [&](int64_t from, int64_t to) {
          kernels<T>().swiglu(data<T>(gate_up) + 2 * from * width, data<T>(y) + from * width, to - from, width);
        });
      });
      return y;
    }
    auto dtype = statistics_dtype(gate_up);
    auto halves = gate_up.chunk(2, -1);
    return (at::silu(halves[0].to(dtype)) * halves[1].to(dtype)).to(gate_up.scalar_type());
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    auto gate_up = context->get_saved_variables()[0];
    if (vectorised({gate_up})) {
      auto dy = gradients[0].contiguous();
      auto d_gate_up = at::empty_like(gate_up);
      int64_t width = dy.size(-1);
      with_storage(gate_up, [&](auto zero) {
        using T = decltype(zero);
        at::parallel_for(0, dy.numel() / width, grain(width), [&](int64_t from, int64_t to) {
          kernels<T>().swiglu_backward(data<T>(dy) + from * width, data<T>(gate_up) + 2 * from * width,
                                       data<T>(d_gate_up) + 2 * from * width, to - from, width);
        });
      });
      return {d_gate_up};
    }
    auto dtype = statistics_dtype(gate_up);
    auto halves = gate_up.chunk(2, -1);
    auto gate = halves[0].to(dtype), up = halves[1].to(dtype), dy = gradients[0].to(dtype);
    auto sigmoid = at::sigmoid(gate);
    auto silu = gate * sigmoid;
    auto d_gate = dy * up * (sigmoid + silu * (1 - sigmoid));
    return {at::cat({d_gate, dy * silu}, -1).to(gate_up.scalar_type())};
  }
};

}  // namespace

extern "C" {

char* phx_rope_qkv(Tensor* qkv, Tensor* cos, Tensor* sin, int64_t heads, int64_t kv_heads, int64_t head_dim,
                   Tensor** out) {
  return guarded([&] {
    PHALANX_OPERATOR("rope_qkv");
    auto result = RopeQkv::apply(*qkv, *cos, *sin, heads, kv_heads, head_dim);
    for (int i = 0; i < 3; i++) out[i] = give(result[i]);
  });
}

char* phx_swiglu(Tensor* gate_up, Tensor** out) {
  return guarded([&] {
    PHALANX_OPERATOR("swiglu");
    *out = give(SwiGlu::apply(*gate_up));
  });
}

}  // extern "C"
