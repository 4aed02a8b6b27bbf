// CPU kernels of masked convolution, each built once per instruction set.
#pragma once

#include "common/isa.h"
#include "masked_conv/args.h"
#include "masked_conv/generate_args.h"

namespace dgm::masked_conv {

// conv works on units [begin, end) of (sample, area, part of the panels) with a zeroed scratch for one padded sample.
// The gradient of the weight first turns samples [begin, end) into rows, then works on units of (panel, tile of inputs,
// group of taps). generate draws samples [first, first + samples).
DGM_DECLARE_PER_ISA(int64_t panel_width(); void conv(const ConvArgs& args, float* scratch, int64_t begin, int64_t end);
                    void weight_grad_rows(const WeightGradArgs& args, int64_t begin, int64_t end);
                    int64_t weight_grad_units(const WeightGradArgs& args);
                    void weight_grad(const WeightGradArgs& args, int64_t begin, int64_t end);
                    void generate(const GenerateArgs& args, int64_t first, int64_t samples);)

}  // namespace dgm::masked_conv
