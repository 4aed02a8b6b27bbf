// CPU kernels of the norm op, each built once per instruction set.
#pragma once

#include "common/isa.h"
#include "norm/args.h"

namespace dgm::norm {

// The passes over rows work on units [begin, end) of a flat index over (sample, part of kPartRows rows), those over
// groups on one over (sample, group), `finish` on blocks of kFinishColumns columns.
DGM_DECLARE_PER_ISA(void rows(const RowsArgs& args, int64_t begin, int64_t end);
                    void rows_backward(const RowsArgs& args, int64_t begin, int64_t end);
                    void group_silu(const GroupArgs& args, int64_t begin, int64_t end);
                    void group_silu_backward(const GroupArgs& args, int64_t begin, int64_t end);
                    void finish(const FinishArgs& args, int64_t begin, int64_t end);)

}  // namespace dgm::norm
