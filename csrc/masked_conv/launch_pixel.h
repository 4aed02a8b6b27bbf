// Pixelwise kernels of masked_conv as they are registered; the schemas are in dgm_kernels/masked_conv/op.py.
#pragma once

#include <tuple>

#include "common/tensors.h"

namespace dgm::masked_conv {

at::Tensor gate(const at::Tensor& x, const OptionalTensor& condition);
std::tuple<at::Tensor, at::Tensor> gate_backward(const at::Tensor& grad, const at::Tensor& x,
                                                 const OptionalTensor& condition);
at::Tensor mixture(const at::Tensor& x, const at::Tensor& parameters, int64_t levels);
at::Tensor mixture_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& parameters, int64_t levels);
std::tuple<at::Tensor, at::Tensor> categorical(const at::Tensor& x, const at::Tensor& logits);
at::Tensor categorical_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& logits,
                                const at::Tensor& normaliser);

}  // namespace dgm::masked_conv
