// CPU loops of samples with their KL, of a KL alone, and of importance samples, on runs of floats.
#pragma once

#include "latent/chunk.h"

#define DGM_FLAT __attribute__((always_inline))  // of a loop's body: GCC would call it

namespace dgm::latent {
namespace DGM_ISA_NAMESPACE {
namespace {

// Elements of a chunk, whole packs but for its end.
struct Range {
  int64_t begin, end;
};

DGM_INLINE Range all(const Chunk& c) { return {0, c.size()}; }

template <class Body>
DGM_INLINE void for_each_pack(const Range& range, const Body& body) {
  for (int64_t i = range.begin; i < range.end; i += kPackElements) body(i);
}

// The runs of a chunk.
struct SampleRuns {
  const float *mu, *log_var, *eps, *grad, *grad_kl;
  float *z, *terms, *grad_mu, *grad_log_var;
  bool stream;  // results go past the caches
};

// Terms are twice the KL of an element; so is the bound on them.
template <bool kLogNormal, bool kStandard>
DGM_NOINLINE void sample_run(const SampleArgs a, const Range range, const SampleRuns r) {
  for_each_pack(range, [&](int64_t i) DGM_FLAT {
    const V mu = load_pack<kLockstep>(r.mu + i), log_var = load_pack<kLockstep>(r.log_var + i);
    const Scale<V> scale = scale_of(log_var);
    const V u = scale.sigma * load_pack<kLockstep>(r.eps + i) + mu;
    store_pack(r.z + i, kLogNormal ? exponential(u) : u, r.stream);
    const V term = relative<kStandard>(a, scale, mu, log_var).twice_divergence();
    store_pack(r.terms + i, at_least(term, 2.0f * a.free_bits));
  });
}

template <bool kLogNormal, bool kStandard, bool kBounded>
DGM_NOINLINE void sample_backward_run(const SampleArgs a, const Range range, const SampleRuns r) {
  for_each_pack(range, [&](int64_t i) DGM_FLAT {
    const V mu = load_pack<kLockstep>(r.mu + i), log_var = load_pack<kLockstep>(r.log_var + i);
    const Scale<V> scale = scale_of(log_var);
    const Relative<V> posterior = relative<kStandard>(a, scale, mu, log_var);
    const V moved = scale.sigma * load_pack<kLockstep>(r.eps + i);
    V g = load_pack<kLockstep>(r.grad + i), k = load_pack<kLockstep>(r.grad_kl + i);
    if constexpr (kLogNormal) g = g * exponential(moved + mu);
    if constexpr (kBounded) k = unless_below(posterior.twice_divergence(), 2.0f * a.free_bits, k);
    store_pack(r.grad_mu + i, k * (kStandard ? posterior.d : posterior.d * a.inverse_sigma) + g, r.stream);
    const V to_log_var = (g * moved + k * posterior.slope) * 0.5f;
    store_pack(r.grad_log_var + i, to_log_var, r.stream);
  });
}

// ---- KL of two diagonal Gaussians

struct KlRuns {
  const float *mu, *log_var, *prior_mu, *prior_log_var, *grad;
  float *terms, *grad_mu, *grad_log_var, *grad_prior_mu, *grad_prior_log_var;
};

// What an element of both passes is; 1 / prior_sigma goes with it. Not by way of 1 / prior_sigma^2, which may be
// infinite where d is not; sigma from e^-88 on.
DGM_INLINE Relative<V> relative(const KlRuns& r, int64_t i, V& inverse_sigma) {
  const V b = load_pack<kLockstep>(r.prior_log_var + i), a = load_pack<kLockstep>(r.log_var + i) - b;
  inverse_sigma = exponential(at_most(b * -0.5f, 88.0f));
  const V d = (load_pack<kLockstep>(r.mu + i) - load_pack<kLockstep>(r.prior_mu + i)) * inverse_sigma;
  return {d, a, scale_of(a).variance_less_one};
}

DGM_NOINLINE void kl_run(const float free_bits, const Range range, const KlRuns r) {
  for_each_pack(range, [&](int64_t i) DGM_FLAT {
    V inverse_sigma;
    store_pack(r.terms + i, at_least(relative(r, i, inverse_sigma).twice_divergence(), 2.0f * free_bits));
  });
}

DGM_NOINLINE void kl_backward_run(const float free_bits, const Range range, const KlRuns r) {
  for_each_pack(range, [&](int64_t i) DGM_FLAT {
    V inverse_sigma;
    const Relative<V> posterior = relative(r, i, inverse_sigma);
    const V k = unless_below(posterior.twice_divergence(), 2.0f * free_bits, load_pack<kLockstep>(r.grad + i));
    const V to_mu = k * (posterior.d * inverse_sigma);
    store_pack(r.grad_mu + i, to_mu);
    store_pack(r.grad_log_var + i, k * posterior.slope * 0.5f);
    store_pack(r.grad_prior_mu + i, -to_mu);
    store_pack(r.grad_prior_log_var + i, k * (posterior.slope + posterior.d * posterior.d) * -0.5f);
  });
}

// ---- Importance samples. sigma is computed once for all draws.

DGM_NOINLINE void sigma_run(const Range range, const float* log_var, float* sigma) {
  for_each_pack(
      range, [&](int64_t i) DGM_FLAT { store_pack(sigma + i, exponential(load_pack<kLockstep>(log_var + i) * 0.5f)); });
}

struct ImportanceRuns {
  const float *mu, *log_var, *sigma, *eps, *grad, *grad_ratio;
  float *z, *terms, *to_mu, *to_log_var;
  bool stream;
};

template <bool kLogNormal>
DGM_NOINLINE void importance_run(const Range range, const ImportanceRuns r) {
  for_each_pack(range, [&](int64_t i) DGM_FLAT {
    const V eps = load_pack<kLockstep>(r.eps + i),
            u = load_pack<kLockstep>(r.sigma + i) * eps + load_pack<kLockstep>(r.mu + i);
    store_pack(r.z + i, kLogNormal ? exponential(u) : u, r.stream);
    store_pack(r.terms + i, twice_log_ratio(eps, load_pack<kLockstep>(r.log_var + i), u));
  });
}

// Adds a draw's share to the gradients; that of log_var twice as large as it is.
template <bool kLogNormal>
DGM_NOINLINE void importance_backward_run(const Range range, const ImportanceRuns r) {
  for_each_pack(range, [&](int64_t i) DGM_FLAT {
    const V moved = load_pack<kLockstep>(r.sigma + i) * load_pack<kLockstep>(r.eps + i),
            u = moved + load_pack<kLockstep>(r.mu + i);
    const V l = load_pack<kLockstep>(r.grad_ratio + i);
    V g = load_pack<kLockstep>(r.grad + i);
    if constexpr (kLogNormal) g = g * exponential(u);
    g = g - l * u;
    store_pack(r.to_mu + i, load_pack<kLockstep>(r.to_mu + i) + g);
    store_pack(r.to_log_var + i, load_pack<kLockstep>(r.to_log_var + i) + (g * moved + l));
  });
}

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::latent
