// Causal attention within documents: by the vectorised kernels on a CPU, by libtorch's elsewhere.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "fused.h"

namespace {

using namespace phalanx;

// The documents of each row of a batch: lengths one after another, and how many each row has. No rows: one document a row.
struct DocumentLengths {
  std::vector<int64_t> lengths, counts;

  // Calls `body(start, length)` for each document of a row of `sequence` tokens.
  template <typename Body>
  void each(int64_t row, int64_t sequence, Body&& body) const {
    if (counts.empty()) return body(0, sequence);
    int64_t first = 0, start = 0;
    for (int64_t r = 0; r < row; r++) first += counts[r];
    for (int64_t i = first; i < first + counts[row]; i++) {
      body(start, lengths[i]);
      start += lengths[i];
    }
  }

  int64_t longest(int64_t sequence) const {
    return lengths.empty() ? sequence : *std::max_element(lengths.begin(), lengths.end());
  }
};

// [batch, heads, sequence, head_dim] as it lies in memory: [batch, sequence, heads, head_dim].
Tensor by_token(const Tensor& x) { return x.transpose(1, 2); }

bool fast_attention(const Tensor& q, const Tensor& k, const Tensor& v) {
  return vectorised({by_token(q), by_token(k), by_token(v)}) && q.size(3) % kAttentionWidth == 0 && q.size(3) > 0 &&
         q.size(2) == k.size(2) && k.sizes() == v.sizes() && q.size(0) == k.size(0) && q.size(3) == k.size(3) &&
         k.size(1) > 0 && q.size(1) % k.size(1) == 0;
}

template <typename T>
AttentionSpan<T> span_of(const Tensor& q, const Tensor& k, const Tensor& v, int64_t row, int64_t start, int64_t length,
                         int64_t head) {
  int64_t heads = q.size(1), kv_heads = k.size(1), head_dim = q.size(3), token = row * q.size(2) + start;
  int64_t kv_place = (token * kv_heads + head / (heads / kv_heads)) * head_dim;
  float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  return {data<T>(q) + (token * heads + head) * head_dim, data<T>(k) + kv_place, data<T>(v) + kv_place,
          heads * head_dim, kv_heads * head_dim, length, head_dim, scale};
}

struct Attention : torch::autograd::Function<Attention> {
  static Tensor forward(AutogradContext* context, const Tensor& q, const Tensor& k, const Tensor& v,
                        const DocumentLengths& documents) {
    int64_t batch = q.size(0), heads = q.size(1), sequence = q.size(2), head_dim = q.size(3);
    auto out = at::empty({batch, sequence, heads, head_dim}, q.options());
    auto logsumexp = at::empty({batch, heads, sequence}, q.options().dtype(at::kFloat));
    int64_t scratch_size = attention_scratch(kForwardCopies, documents.longest(sequence), head_dim);
    with_storage(q, [&](auto zero) {
      using T = decltype(zero);
      at::parallel_for(0, batch * heads, 1, [&](int64_t from, int64_t to) {
        std::unique_ptr<float[]> scratch(new float[scratch_size]);
        for (int64_t task = from; task < to; task++) {
          int64_t row = task / heads, head = task % heads;
          documents.each(row, sequence, [&](int64_t start, int64_t length) {
            auto span = span_of<T>(q, k, v, row, start, length, head);
            T* own_out = data<T>(out) + (span.q - data<T>(q));
            kernels<T>().attention(span, own_out, data<float>(logsumexp) + task * sequence + start, scratch.get());
          });
        }
      });
    });
    context->save_for_backward({q, k, v, out, logsumexp});
    context->saved_data["lengths"] = documents.lengths;
    context->saved_data["counts"] = documents.counts;
    return out.flatten(2);
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    auto saved = context->get_saved_variables();
    auto &q = saved[0], &k = saved[1], &v = saved[2], &out = saved[3], &logsumexp = saved[4];
    DocumentLengths documents{context->saved_data["lengths"].toIntVector(), context->saved_data["counts"].toIntVector()};
    int64_t heads = q.size(1), kv_heads = k.size(1), sequence = q.size(2), group = heads / kv_heads;
    auto d_out = gradients[0].contiguous();
    auto dq = at::empty_like(out), dk = at::empty_like(by_token(k)), dv = at::empty_like(by_token(v));
    int64_t scratch_size = attention_scratch(kBackwardCopies, documents.longest(sequence), q.size(3));
    with_storage(q, [&](auto zero) {
      using T = decltype(zero);
      at::parallel_for(0, q.size(0) * kv_heads, 1, [&](int64_t from, int64_t to) {
        std::unique_ptr<float[]> scratch(new float[scratch_size]);
        for (int64_t task = from; task < to; task++) {
          int64_t row = task / kv_heads, head = task % kv_heads * group;
          documents.each(row, sequence, [&](int64_t start, int64_t length) {
            auto span = span_of<T>(q, k, v, row, start, length, head);
            int64_t place = span.q - data<T>(q), kv_place = span.k - data<T>(k);
            auto own_logsumexp = data<float>(logsumexp) + (row * heads + head) * sequence + start;
            kernels<T>().attention_backward(span, group, data<T>(out) + place, data<T>(d_out) + place, own_logsumexp,
                                            sequence, data<T>(dq) + place, data<T>(dk) + kv_place,
                                            data<T>(dv) + kv_place, scratch.get());
          });
        }
      });
    });
    return {by_token(dq), by_token(dk), by_token(dv), Tensor()};
  }
};

Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v) {
  return at::scaled_dot_product_attention(q, k, v, {}, 0.0, true, std::nullopt, q.size(1) != k.size(1));
}

// q: [batch, heads, sequence, head_dim], k and v the same with their own heads.
Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const DocumentLengths& documents) {
  if (fast_attention(q, k, v)) return Attention::apply(q, k, v, documents);
  if (documents.counts.empty()) return attend(q, k, v).transpose(1, 2).flatten(2);
  std::vector<Tensor> rows;
  for (int64_t row = 0; row < q.size(0); row++) {
    std::vector<Tensor> parts;
    documents.each(row, q.size(2), [&](int64_t start, int64_t length) {
      auto cut = [&](const Tensor& x) { return x.narrow(0, row, 1).narrow(2, start, length); };
      parts.push_back(attend(cut(q), cut(k), cut(v)));
    });
    rows.push_back(parts.size() == 1 ? parts[0] : at::cat(parts, 2));
  }
  return (rows.size() == 1 ? rows[0] : at::cat(rows, 0)).transpose(1, 2).flatten(2);
}

}  // namespace

extern "C" {

char* phx_attention(Tensor* q, Tensor* k, Tensor* v, const int64_t* lengths, const int64_t* counts, size_t num_rows,
                    Tensor** out) {
  return guarded([&] {
    PHALANX_OPERATOR("attention");
    DocumentLengths documents;
    documents.counts.assign(counts, counts + num_rows);
    int64_t total = 0;
    for (int64_t count : documents.counts) total += count;
    documents.lengths.assign(lengths, lengths + total);
    *out = give(attention(*q, *k, *v, documents));
  });
}

}  // extern "C"
