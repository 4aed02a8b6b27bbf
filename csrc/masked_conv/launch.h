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

at::Tensor pack_program(const at::Tensor& program, at::TensorList weights, at::TensorList degrees);
at::Tensor generate(const at::Tensor& program, const at::Tensor& packed, at::TensorList constants,
                    const at::Tensor& given, const at::Tensor& known, const OptionalTensor& noise,
                    const OptionalTensor& seed_tensor, int64_t seed, const OptionalTensor& key_step_tensor,
                    int64_t key_step, const OptionalTensor& samples, int64_t first_sample, int64_t stream, double scale,
                    double offset);

}  // namespace dgm::masked_conv
