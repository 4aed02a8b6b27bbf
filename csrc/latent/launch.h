// The latent op on tensors; bindings.cpp registers these under the schemas of dgm_kernels/latent/op.py.
#pragma once

#include <tuple>

#include "common/tensors.h"

namespace dgm::latent {

// The eight arguments of a noise key, as dgm_kernels/_core/noise.py spells them.
#define DGM_KEY_PARAMETERS                                                                                             \
  const OptionalTensor &noise, const OptionalTensor &seed_tensor, int64_t seed, const OptionalTensor &key_step_tensor, \
      int64_t key_step, const OptionalTensor &samples, int64_t first_sample, int64_t stream

#define DGM_SAMPLE_SETTINGS double free_bits, bool log_normal, double prior_mu, double prior_log_var

using Pair = std::tuple<at::Tensor, at::Tensor>;
using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Pair sample(const at::Tensor& mu, const at::Tensor& log_var, DGM_KEY_PARAMETERS, DGM_SAMPLE_SETTINGS,
            at::ScalarType dtype);
Pair sample_backward(const OptionalTensor& grad, const OptionalTensor& grad_kl, const at::Tensor& mu,
                     const at::Tensor& log_var, DGM_KEY_PARAMETERS, DGM_SAMPLE_SETTINGS);
Pair tril(const at::Tensor& mu, const at::Tensor& scale_tril, DGM_KEY_PARAMETERS, at::ScalarType dtype);
Pair tril_backward(const OptionalTensor& grad, const OptionalTensor& grad_kl, const at::Tensor& mu,
                   const at::Tensor& scale_tril, DGM_KEY_PARAMETERS);
at::Tensor kl(const at::Tensor& mu, const at::Tensor& log_var, const OptionalTensor& prior_mu,
              const OptionalTensor& prior_log_var, double free_bits);
Four kl_backward(const at::Tensor& grad, const at::Tensor& mu, const at::Tensor& log_var,
                 const OptionalTensor& prior_mu, const OptionalTensor& prior_log_var, double free_bits);
Pair importance(const at::Tensor& mu, const at::Tensor& log_var, DGM_KEY_PARAMETERS, int64_t draws, bool log_normal,
                at::ScalarType dtype);
Pair importance_backward(const OptionalTensor& grad, const OptionalTensor& grad_ratio, const at::Tensor& mu,
                         const at::Tensor& log_var, DGM_KEY_PARAMETERS, int64_t draws, bool log_normal);
at::Tensor bound(const at::Tensor& log_weights);
at::Tensor bound_backward(const at::Tensor& grad, const at::Tensor& log_weights, const at::Tensor& bound);
Four quantize(const at::Tensor& x, const at::Tensor& codebook, at::ScalarType dtype);
Pair quantize_backward(const OptionalTensor& grad, const at::Tensor& grad_losses, const at::Tensor& x,
                       const at::Tensor& codebook, const at::Tensor& indices);

}  // namespace dgm::latent
