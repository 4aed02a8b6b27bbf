// Kernels of attention as they are registered; the schemas are in dgm_kernels/attention/op.py.
#pragma once

#include <tuple>

#include "common/tensors.h"

// The end of every schema, op.Settings in Python.
#define DGM_ATTENTION_SETTINGS                                                                                         \
  const OptionalTensor &bounds, int64_t width, int64_t radius, const OptionalTensor &keep, const OptionalTensor &bias, \
      const OptionalTensor &slopes, const OptionalTensor &rope, bool interleaved, int64_t first, double scale

namespace dgm::attention {

std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                             DGM_ATTENTION_SETTINGS);
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad, const OptionalTensor& grad_lse,
                                                        const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                        const at::Tensor& out, const at::Tensor& lse,
                                                        DGM_ATTENTION_SETTINGS);
std::tuple<at::Tensor, at::Tensor> jvp(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                       const at::Tensor& tangent_q, const at::Tensor& tangent_k,
                                       const at::Tensor& tangent_v, const at::Tensor& out, const at::Tensor& lse,
                                       DGM_ATTENTION_SETTINGS);
at::Tensor decode(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, int64_t begin, int64_t end,
                  int64_t width, int64_t radius, const OptionalTensor& slopes, int64_t position, double scale);

}  // namespace dgm::attention
