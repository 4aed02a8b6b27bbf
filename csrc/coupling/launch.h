// The coupling op on tensors; bindings.cpp registers these under the schemas of dgm_kernels/coupling/op.py.
#pragma once

#include <tuple>

#include "common/tensors.h"

namespace dgm::coupling {

#define DGM_REGION_PARAMETERS \
  const OptionalTensor &fixed, int64_t start, int64_t stop, int64_t parity, int64_t width, int64_t plane

#define DGM_SPLINE_PARAMETERS                                                                                   \
  const at::Tensor &widths, const at::Tensor &heights, const at::Tensor &derivatives, double bound, bool tails, \
      double min_width, double min_height, double min_derivative, bool inverse

std::tuple<at::Tensor, at::Tensor> affine(const at::Tensor& x, const at::Tensor& shift, const OptionalTensor& log_scale,
                                          DGM_REGION_PARAMETERS, int64_t scale_map, bool inverse, at::ScalarType dtype);
std::tuple<at::Tensor, at::Tensor, at::Tensor> affine_backward(const at::Tensor& grad,
                                                               const OptionalTensor& grad_logdet,
                                                               const at::Tensor& output, const at::Tensor& shift,
                                                               const at::Tensor& log_scale, DGM_REGION_PARAMETERS,
                                                               int64_t scale_map, bool inverse, bool with_shift,
                                                               at::ScalarType x_dtype);
std::tuple<at::Tensor, at::Tensor> spline(const at::Tensor& x, DGM_SPLINE_PARAMETERS, at::ScalarType dtype);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> spline_backward(const at::Tensor& grad,
                                                                           const OptionalTensor& grad_logdet,
                                                                           const at::Tensor& x, DGM_SPLINE_PARAMETERS);
std::tuple<at::Tensor, at::Tensor> made_inverse(const at::Tensor& z, at::TensorList weights, at::TensorList biases,
                                                at::TensorList degrees, int64_t activation, int64_t bins,
                                                int64_t scale_map, double bound, double min_width, double min_height,
                                                double min_derivative);
at::Tensor log_prob(const at::Tensor& z, const OptionalTensor& logdet, bool logistic);

}  // namespace dgm::coupling
