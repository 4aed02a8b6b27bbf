// The density op on tensors; bindings.cpp registers these under the schemas of dgm_kernels/density/op.py.
#pragma once

#include <tuple>

#include "common/tensors.h"

namespace dgm::density {

#define DGM_MIXTURE_PARAMETERS \
  const at::Tensor &x, const at::Tensor &y, const at::Tensor &inv, const OptionalTensor &q, const at::Tensor &offset

std::tuple<at::Tensor, at::Tensor> log_prob(DGM_MIXTURE_PARAMETERS, bool full);
std::tuple<at::Tensor, at::Tensor, at::Tensor> moments(const at::Tensor& weight, const at::Tensor& lse,
                                                       DGM_MIXTURE_PARAMETERS);
at::Tensor grad_x(const at::Tensor& grad, const at::Tensor& lse, DGM_MIXTURE_PARAMETERS);
std::tuple<at::Tensor, at::Tensor> mean(const at::Tensor& x, const at::Tensor& y, const at::Tensor& q,
                                        const at::Tensor& offset);
at::Tensor mean_grad(const at::Tensor& grad, const OptionalTensor& grad_lse, const at::Tensor& mean,
                     const at::Tensor& lse, const at::Tensor& x, const at::Tensor& y, const at::Tensor& q,
                     const at::Tensor& offset);
at::Tensor kernel_sum(const at::Tensor& x, const at::Tensor& y, int64_t kind, at::ArrayRef<double> numbers, bool same);
at::Tensor kernel_sum_grad(const at::Tensor& x, const at::Tensor& y, int64_t kind, at::ArrayRef<double> numbers,
                           bool same);

}  // namespace dgm::density
