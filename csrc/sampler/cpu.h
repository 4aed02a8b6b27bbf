// What sampler/cpu.cpp defines, once per instruction set. No torch header in here.
#pragma once

#include "common/isa.h"
#include "sampler/args.h"

namespace dgm::sampler {

// Each works on units [begin, end) of a flat index over (sample, part of the sample); a part has block_elements(), in
// the loss kLossPart elements.
DGM_DECLARE_PER_ISA(int64_t block_elements(); void noise_like(const NoiseLikeArgs& args, int64_t begin, int64_t end);
                    void step(const StepArgs& args, int64_t begin, int64_t end);
                    void add_noise(const AddNoiseArgs& args, int64_t begin, int64_t end);
                    void denoising_loss(const LossArgs& args, int64_t begin, int64_t end);)

}  // namespace dgm::sampler
