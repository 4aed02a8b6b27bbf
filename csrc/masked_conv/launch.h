// Kernels of masked convolution as they are registered; the schemas are in dgm_kernels/masked_conv/op.py.
#pragma once

#include "common/tensors.h"

namespace dgm::masked_conv {

at::Tensor conv(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, int64_t layout, bool strict,
                int64_t groups, int64_t step_y, int64_t step_x);
at::Tensor input_grad(const at::Tensor& grad, const at::Tensor& weight, int64_t layout, bool strict, int64_t groups,
                      int64_t step_y, int64_t step_x);
at::Tensor weight_grad(const at::Tensor& grad, const at::Tensor& x, int64_t height, int64_t width, int64_t layout,
                       bool strict, int64_t groups, int64_t step_y, int64_t step_x);

}  // namespace dgm::masked_conv
