// CPU kernels of the coupling op, each built once per instruction set.
#pragma once

#include "common/isa.h"
#include "coupling/args.h"

namespace dgm::coupling {

// affine and log_prob work on units [begin, end) of a flat index over (sample, part of kPartElements); the spline on
// vectors of spline_width() elements, finish_spline on samples, made_inverse on tiles of made_width() samples
// with args.rows * made_width() floats of scratch.
DGM_DECLARE_PER_ISA(void affine(const AffineArgs& args, int64_t begin, int64_t end);
                    void affine_backward(const AffineArgs& args, int64_t begin, int64_t end); int64_t spline_width();
                    void spline(const SplineArgs& args, int64_t begin, int64_t end);
                    void finish_spline(const SplineArgs& args, int64_t begin, int64_t end);
                    void spline_backward(const SplineArgs& args, int64_t begin, int64_t end);
                    void log_prob(const LogProbArgs& args, int64_t begin, int64_t end); int64_t made_width();
                    void made_inverse(const MadeArgs& args, float* scratch, int64_t begin, int64_t end);)

}  // namespace dgm::coupling
