// The norm op on tensors; bindings.cpp registers these under the schemas of dgm_kernels/norm/op.py.
#pragma once

#include <tuple>

#include "common/tensors.h"

namespace dgm::norm {

using FiveTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using SevenTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> rows(
    const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& gate, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& shift, int64_t size, bool rms,
    double eps, at::ScalarType dtype, at::ScalarType h_dtype);
SevenTensors rows_backward(const at::Tensor& grad, const OptionalTensor& grad_h, const at::Tensor& h,
                           const OptionalTensor& x, const OptionalTensor& gate, const OptionalTensor& weight,
                           const OptionalTensor& bias, const OptionalTensor& scale, bool with_shift,
                           const at::Tensor& mean, const at::Tensor& rstd, int64_t size, bool rms);
std::tuple<at::Tensor, at::Tensor, at::Tensor> group_silu(const at::Tensor& x, const OptionalTensor& weight,
                                                          const OptionalTensor& bias, const OptionalTensor& scale,
                                                          const OptionalTensor& shift, int64_t groups, double eps,
                                                          at::ScalarType dtype);
FiveTensors group_silu_backward(const at::Tensor& grad, const at::Tensor& x, const OptionalTensor& weight,
                                const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& shift,
                                const at::Tensor& mean, const at::Tensor& rstd, int64_t groups);

}  // namespace dgm::norm
