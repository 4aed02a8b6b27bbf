// CPU kernels of attention, each built once per instruction set.
#pragma once

#include "attention/args.h"
#include "common/isa.h"

namespace dgm::attention {

// The *_memory functions say how many floats a thread needs; `pairs` multiplies bfloat16 in pairs. forward works on
// units [begin, end) of (sample, head, group of panels of queries), backward on those of (part of the keys, sample, key
// head), then backward_queries, like jvp, on those of (sample, head, panel); decode on those of (sample, key head,
// part), then decode_combine on (sample, head).
DGM_DECLARE_PER_ISA(int64_t panel_width(); int64_t panels(const ForwardArgs& args);
                    int64_t blocks(const ForwardArgs& args); bool has_pairs();
                    int64_t forward_memory(const ForwardArgs& args, bool pairs);
                    void forward(const ForwardArgs& args, bool pairs, float* memory, int64_t begin, int64_t end);
                    int64_t backward_memory(const BackwardArgs& args, bool pairs);
                    void backward(const BackwardArgs& args, bool pairs, float* memory, int64_t begin, int64_t end);
                    void backward_queries(const BackwardArgs& args, int64_t begin, int64_t end);
                    int64_t jvp_memory(const JvpArgs& args);
                    void jvp(const JvpArgs& args, float* memory, int64_t begin, int64_t end);
                    void decode(const DecodeArgs& args, int64_t begin, int64_t end);
                    void decode_combine(const DecodeArgs& args, int64_t begin, int64_t end);)

}  // namespace dgm::attention
