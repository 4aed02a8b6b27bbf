// Formulas of the latent op, templated on the scalar F: CPU vectors of float32 in lockstep. (On GPUs it is Triton's.)
#pragma once

#include "common/elementary.h"
#include "latent/args.h"

namespace dgm::latent {
namespace DGM_ISA_NAMESPACE {

using namespace ::dgm::DGM_ISA_NAMESPACE;

template <int N>
DGM_INLINE Pack<F32, N> if_zero(Pack<F32, N> number, Pack<F32, N> yes, Pack<F32, N> no) {
  DGM_EACH no.v[i] = number.v[i] == 0.0f ? yes.v[i] : no.v[i];
  return no;
}

// What counts: nothing where the term is below the bound. A NaN is not.
template <int N>
DGM_INLINE Pack<F32, N> unless_below(Pack<F32, N> term, float bound, Pack<F32, N> value) {
  DGM_EACH value.v[i] = term.v[i] < bound ? F32{} : value.v[i];
  return value;
}

// sigma = exp(log_var / 2), and exp(log_var) - 1 with its digits where the variance is near 1.
template <class F>
struct Scale {
  F sigma, variance_less_one;
};

template <class F>
DGM_INLINE Scale<F> scale_of(F log_var) {
  F whole;
  const F rest = reduced_expm1(at_most(at_least(log_var * 0.5f, -105.0f), 89.0f), whole);
  const F sigma = scale_by_power(rest + 1.0f, whole);
  const F less_one = if_zero(whole, rest, sigma - 1.0f);
  return {sigma, less_one * (less_one + 2.0f)};
}

// The posterior as the prior sees it: d = (mu - prior_mu) / prior_sigma, a = log_var - prior_log_var and exp(a) - 1,
// one function, which keeps its digits where the two variances are near each other. Twice the KL is exp(a) - 1 - a +
// d^2.
template <class F>
struct Relative {
  F d, a, slope;
  DGM_INLINE_METHOD F twice_divergence() const { return slope - a + d * d; }
};

template <bool kStandard, class F>
DGM_INLINE Relative<F> relative(const SampleArgs& args, const Scale<F>& scale, F mu, F log_var) {
  if constexpr (kStandard) {
    return {mu, log_var, scale.variance_less_one};
  } else {
    const F a = log_var - args.prior_log_var;
    return {(mu - args.prior_mu) * args.inverse_sigma, a, scale_of(a).variance_less_one};
  }
}

// eps^2 + log_var - u^2
template <class F>
DGM_INLINE F twice_log_ratio(F eps, F log_var, F u) {
  return eps * eps + log_var - u * u;
}

}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::latent
