// The importance-weighted bound, log mean exp over draws, and its gradient; a lane is a sample.
#pragma once

#include "common/panel.h"
#include "latent/math.h"

namespace dgm::latent {
namespace DGM_ISA_NAMESPACE {
namespace {

DGM_INLINE F32 infinite_is_zero(F32 x) { return absolute(x) == __builtin_inff() ? F32{} : x; }

DGM_INLINE void bound_samples(const BoundArgs& a, int64_t first, int64_t count) {
  F32 most = broadcast_float(-__builtin_inff()), sum = {};
  for (int64_t k = 0; k < a.draws; ++k) most = larger(load_first(a.log_weights + k * a.samples + first, count), most);
  const F32 shift = infinite_is_zero(most);
  for (int64_t k = 0; k < a.draws; ++k)
    sum += exponential(load_first(a.log_weights + k * a.samples + first, count) - shift);
  const F32 bound = shift + logarithm(at_least(sum, 1e-30f)) - a.log_draws;
  store_first(a.bound + first, shift == most || sum != sum ? bound : most, count);
}

DGM_INLINE void bound_samples_backward(const BoundArgs& a, int64_t first, int64_t count) {
  const F32 shift = infinite_is_zero(load_first(a.bound + first, count) + a.log_draws);
  const F32 grad = load_first(a.grad + first, count);
  for (int64_t k = 0; k < a.draws; ++k) {
    const int64_t at = k * a.samples + first;
    store_first(a.to_log_weights + at, exponential(load_first(a.log_weights + at, count) - shift) * grad, count);
  }
}

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::latent
