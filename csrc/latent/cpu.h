// CPU kernels of the latent op, each built once per instruction set.
#pragma once

#include "common/isa.h"
#include "latent/args.h"

namespace dgm::latent {

// Each works on units [begin, end) of what it names.
DGM_DECLARE_PER_ISA(                                                                   //
    void sample(const SampleArgs& args, int64_t begin, int64_t end);                   //
    void sample_backward(const SampleArgs& args, int64_t begin, int64_t end);          //
    void kl(const SampleArgs& args, int64_t begin, int64_t end);                       //
    void kl_backward(const SampleArgs& args, int64_t begin, int64_t end);              //
    void importance(const ImportanceArgs& args, int64_t begin, int64_t end);           //
    void importance_backward(const ImportanceArgs& args, int64_t begin, int64_t end);  //
    void bound(const BoundArgs& args, int64_t begin, int64_t end);                     //
    void bound_backward(const BoundArgs& args, int64_t begin, int64_t end);            //
    void tril(const TrilArgs& args, int64_t begin, int64_t end);                       //
    void tril_backward(const TrilArgs& args, int64_t begin, int64_t end);              //
    void pack_codes(const QuantizeArgs& args, float* mean, float* packed);             //
    int64_t packed_size(int64_t codes, int64_t features);                              //
    void quantize(const QuantizeArgs& args, int64_t begin, int64_t end);               //
    void quantize_backward(const QuantizeArgs& args, int64_t begin, int64_t end);      //
    void codebook_gradient(const QuantizeArgs& args, int64_t begin, int64_t end);)

}  // namespace dgm::latent
