// Matrix products on a CPU with AVX-512, by the micro-kernels of oneDNN that libtorch carries.
#pragma once

#include <ATen/core/Tensor.h>

namespace phalanx {

// Each returns false (or no tensor), having done nothing, where libtorch's own product is to be taken. Matrices are of two dims, a row a
// token; sums run in blocks of a fixed size and order, so that results do not depend on the number of threads.

// x[M, K] weight[N, K]^T, in FP32.
at::Tensor fast_project(const at::Tensor& x, const at::Tensor& weight);
// out[M, K] = dy[M, N] weight[N, K], in FP32.
bool fast_product(const at::Tensor& dy, const at::Tensor& weight, const at::Tensor& out);
// sum[N, K] += dy[M, N]^T x[M, K], of FP32 or BF16 operands, into FP32.
bool fast_accumulate(const at::Tensor& sum, const at::Tensor& dy, const at::Tensor& x);

}  // namespace phalanx
