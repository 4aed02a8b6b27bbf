// What sampler/cuda.cu defines. No torch header in here.
#pragma once

#include <cuda_runtime_api.h>

#include "sampler/args.h"

namespace dgm::sampler::cuda {

// Each launches on the current device and never waits for it. A tensor index out of range gives NaN.
void noise_like(const NoiseLikeArgs& args, cudaStream_t stream);
void step(const StepArgs& args, cudaStream_t stream);
void add_noise(const AddNoiseArgs& args, cudaStream_t stream);
void denoising_loss(const LossArgs& args, cudaStream_t stream);

}  // namespace dgm::sampler::cuda
