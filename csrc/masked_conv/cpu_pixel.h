// CPU kernels of the pixelwise functions of masked_conv, each built once per instruction set.
#pragma once

#include "common/isa.h"
#include "masked_conv/pixel_args.h"

namespace dgm::masked_conv {

// The gate works on units [begin, end) of (row, part); the others on tiles of so many pixels, the mixture with a
// scratch of mixture_scratch() floats.
DGM_DECLARE_PER_ISA(void gate(const GateArgs& args, int64_t begin, int64_t end);
                    void gate_backward(const GateArgs& args, int64_t begin, int64_t end); int64_t mixture_tile_pixels();
                    int64_t mixture_scratch(const MixtureArgs& args);
                    void mixture(const MixtureArgs& args, float* scratch, int64_t begin, int64_t end);
                    void mixture_backward(const MixtureArgs& args, float* scratch, int64_t begin, int64_t end);
                    int64_t categorical_tile_pixels(const CategoricalArgs& args);
                    void categorical(const CategoricalArgs& args, int64_t begin, int64_t end);
                    void categorical_backward(const CategoricalArgs& args, int64_t begin, int64_t end);)

}  // namespace dgm::masked_conv
