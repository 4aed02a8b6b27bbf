// The sampler op on tensors; bindings.cpp registers these under the schemas of dgm_kernels/sampler/op.py.
#pragma once

#include "common/tensors.h"

namespace dgm::sampler {

// The eight arguments of a noise key, as dgm_kernels/_core/noise.py spells them.
#define DGM_NOISE_PARAMETERS                                                                                           \
  const OptionalTensor &noise, const OptionalTensor &seed_tensor, int64_t seed, const OptionalTensor &key_step_tensor, \
      int64_t key_step, const OptionalTensor &samples, int64_t first_sample, int64_t stream
#define DGM_NOISE_ARGUMENTS noise, seed_tensor, seed, key_step_tensor, key_step, samples, first_sample, stream

#define DGM_STEP_PARAMETERS                                                                                            \
  const at::Tensor &x, const at::Tensor &model_output, const at::Tensor &rows, const OptionalTensor &step_tensor,      \
      int64_t step, DGM_NOISE_PARAMETERS, const OptionalTensor &history, const OptionalTensor &unconditional,          \
      double guidance_scale, const OptionalTensor &known, const OptionalTensor &mask, const OptionalTensor &threshold, \
      bool clips

at::Tensor noise_like(const at::Tensor& like, DGM_NOISE_PARAMETERS, int64_t kind);
std::tuple<at::Tensor, at::Tensor> sampler_step(DGM_STEP_PARAMETERS, bool return_x0);
void sampler_step_out(DGM_STEP_PARAMETERS, const at::Tensor& out, const OptionalTensor& x0_out);
at::Tensor add_noise(const at::Tensor& x0, const at::Tensor& rows, const at::Tensor& t, DGM_NOISE_PARAMETERS);
std::tuple<at::Tensor, at::Tensor> denoising_loss(const at::Tensor& model_output, const at::Tensor& x0,
                                                  const at::Tensor& rows, const at::Tensor& t, DGM_NOISE_PARAMETERS,
                                                  bool with_residual);

}  // namespace dgm::sampler
