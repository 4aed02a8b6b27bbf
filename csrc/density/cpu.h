// CPU kernels of the density op, each built once per instruction set.
#pragma once

#include "common/isa.h"
#include "density/args.h"

namespace dgm::density {

// greatest_square: that of the distances of rows [begin, end) of x from the middle. *_floats: memory that a thread
// needs for units [begin, end) of a plan; *_finish joins the parts of panels (of components, of moments) [begin, end).
DGM_DECLARE_PER_ISA(int64_t panel_width(); int64_t block_of(Form form); int64_t vector_width();
                    float greatest_square(const float* x, const float* middle, int64_t features, int64_t begin,
                                          int64_t end);
                    int64_t log_prob_floats(const LogProbArgs& args);
                    void log_prob(const LogProbArgs& args, float* memory, int64_t begin, int64_t end);
                    void log_prob_finish(const LogProbArgs& args, int64_t begin, int64_t end);
                    void responsibilities(const LogProbArgs& args, float* memory, int64_t begin, int64_t end);
                    int64_t gather_floats(const GatherArgs& args);
                    void gather(const GatherArgs& args, float* memory, int64_t begin, int64_t end);
                    void gather_finish(const GatherArgs& args, int64_t begin, int64_t end);
                    int64_t moments_floats(const MomentArgs& args);
                    void moments(const MomentArgs& args, float* memory, int64_t begin, int64_t end);
                    void moments_finish(const MomentArgs& args, int64_t begin, int64_t end);)

}  // namespace dgm::density
