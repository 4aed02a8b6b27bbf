// CPU loops of the latent op; built once per instruction set, without torch headers.
#include "latent/cpu.h"

#include "latent/bound.h"
#include "latent/quantize.h"
#include "latent/sample.h"
#include "latent/tril.h"

namespace dgm::latent {
namespace DGM_ISA_NAMESPACE {

void sample(const SampleArgs& a, int64_t begin, int64_t end) {
  In mu, log_var;
  Out z;
  alignas(64) float terms[kChunk + kSlack];
  for (int64_t unit = begin; unit < end; ++unit) {
    const Chunk c = chunk_of(a.shape, unit);
    SampleRuns r = {};
    r.mu = mu.read(a.mu, c);
    r.log_var = log_var.read(a.log_var, c);
    r.z = z.open(a.z, c);
    r.terms = terms;
    r.stream = a.stream && z.direct();
    Noise noise(a.noise, a.shape, c);
    const auto run = [&](const float* eps, int64_t first, int64_t last) {
      r.eps = eps;
      with_flag(a.log_normal, [&](auto log_normal) {
        with_flag(a.standard, [&](auto standard) { sample_run<log_normal(), standard()>(a, {first, last}, r); });
      });
    };
    r.stream ? noise.for_each_block(0, run, r.mu, r.log_var) : noise.for_each_block(0, run, r.mu, r.log_var, r.z);
    z.close();
    store_sums(terms, c, a.shape, a.partials);
  }
}

void sample_backward(const SampleArgs& a, int64_t begin, int64_t end) {
  In mu, log_var, grad, grad_kl;
  Out grad_mu, grad_log_var;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Chunk c = chunk_of(a.shape, unit);
    SampleRuns r = {};
    r.mu = mu.read(a.mu, c);
    r.log_var = log_var.read(a.log_var, c);
    r.grad = grad.read(a.grad, c);
    r.grad_kl = grad_kl.spread(a.grad_kl, c);
    r.grad_mu = grad_mu.open(a.grad_mu, c);
    r.grad_log_var = grad_log_var.open(a.grad_log_var, c);
    r.stream = a.stream && grad_mu.direct() && grad_log_var.direct();
    Noise noise(a.noise, a.shape, c);
    const auto run = [&](const float* eps, int64_t first, int64_t last) {
      r.eps = eps;
      with_flag(a.log_normal, [&](auto log_normal) {
        with_flag(a.standard, [&](auto standard) {
          with_flag(a.free_bits > 0.0f, [&](auto bounded) {
            sample_backward_run<log_normal(), standard(), bounded()>(a, {first, last}, r);
          });
        });
      });
    };
    r.stream ? noise.for_each_block(0, run, r.mu, r.log_var, r.grad)
             : noise.for_each_block(0, run, r.mu, r.log_var, r.grad, r.grad_mu, r.grad_log_var);
    grad_mu.close();
    grad_log_var.close();
  }
}

void kl(const SampleArgs& a, int64_t begin, int64_t end) {
  In mu, log_var, prior_mu, prior_log_var;
  alignas(64) float terms[kChunk + kSlack];
  for (int64_t unit = begin; unit < end; ++unit) {
    const Chunk c = chunk_of(a.shape, unit);
    KlRuns r = {};
    r.mu = mu.read(a.mu, c);
    r.log_var = log_var.read(a.log_var, c);
    r.prior_mu = prior_mu.read(a.prior_mu_rows, c);
    r.prior_log_var = prior_log_var.read(a.prior_log_var_rows, c);
    r.terms = terms;
    kl_run(a.free_bits, all(c), r);
    store_sums(terms, c, a.shape, a.partials);
  }
}

void kl_backward(const SampleArgs& a, int64_t begin, int64_t end) {
  In mu, log_var, prior_mu, prior_log_var, grad;
  Out grad_mu, grad_log_var, grad_prior_mu, grad_prior_log_var;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Chunk c = chunk_of(a.shape, unit);
    KlRuns r = {};
    r.mu = mu.read(a.mu, c);
    r.log_var = log_var.read(a.log_var, c);
    r.prior_mu = prior_mu.read(a.prior_mu_rows, c);
    r.prior_log_var = prior_log_var.read(a.prior_log_var_rows, c);
    r.grad = grad.spread(a.grad_kl, c);
    r.grad_mu = grad_mu.open(a.grad_mu, c);
    r.grad_log_var = grad_log_var.open(a.grad_log_var, c);
    r.grad_prior_mu = grad_prior_mu.open(a.grad_prior_mu, c);
    r.grad_prior_log_var = grad_prior_log_var.open(a.grad_prior_log_var, c);
    kl_backward_run(a.free_bits, all(c), r);
    grad_mu.close();
    grad_log_var.close();
    grad_prior_mu.close();
    grad_prior_log_var.close();
  }
}

void importance(const ImportanceArgs& a, int64_t begin, int64_t end) {
  In mu, log_var;
  Out z;
  alignas(64) float terms[kChunk + kSlack], sigma[kChunk + kSlack];
  for (int64_t unit = begin; unit < end; ++unit) {
    const Chunk c = chunk_of(a.shape, unit);
    ImportanceRuns r = {};
    r.mu = mu.read(a.mu, c);
    r.log_var = log_var.read(a.log_var, c);
    sigma_run(all(c), r.log_var, sigma);
    r.sigma = sigma;
    r.terms = terms;
    Noise noise(a.noise, a.shape, c);
    Chunk there = c;
    for (int64_t draw = 0; draw < a.draws; ++draw, there.row += a.shape.batch) {
      r.z = z.open(a.z, there);
      r.stream = a.stream && z.direct();
      const auto run = [&](const float* eps, int64_t first, int64_t last) {
        r.eps = eps;
        with_flag(a.log_normal, [&](auto log_normal) { importance_run<log_normal()>({first, last}, r); });
      };
      r.stream ? noise.for_each_block(draw, run) : noise.for_each_block(draw, run, r.z);
      z.close();
      store_sums(terms, there, a.shape, a.partials);
    }
  }
}

void importance_backward(const ImportanceArgs& a, int64_t begin, int64_t end) {
  In mu, log_var, grad, grad_ratio;
  Out grad_mu, grad_log_var;
  alignas(64) float sigma[kChunk + kSlack];
  for (int64_t unit = begin; unit < end; ++unit) {
    const Chunk c = chunk_of(a.shape, unit);
    ImportanceRuns r = {};
    r.mu = mu.read(a.mu, c);
    r.log_var = log_var.read(a.log_var, c);
    sigma_run(all(c), r.log_var, sigma);
    r.sigma = sigma;
    r.to_mu = grad_mu.open(a.grad_mu, c);
    r.to_log_var = grad_log_var.open(a.grad_log_var, c);
    for_each_pack(all(c), [&](int64_t i) {
      store_pack(r.to_mu + i, V{});
      store_pack(r.to_log_var + i, V{});
    });
    Noise noise(a.noise, a.shape, c);
    Chunk there = c;
    for (int64_t draw = 0; draw < a.draws; ++draw, there.row += a.shape.batch) {
      r.grad = grad.read(a.grad, there);
      r.grad_ratio = grad_ratio.spread(a.grad_ratio, there);
      const auto run = [&](const float* eps, int64_t first, int64_t last) {
        r.eps = eps;
        with_flag(a.log_normal, [&](auto log_normal) { importance_backward_run<log_normal()>({first, last}, r); });
      };
      noise.for_each_block(draw, run, r.grad);
    }
    for_each_pack(all(c),
                  [&](int64_t i) { store_pack(r.to_log_var + i, load_pack<kLockstep>(r.to_log_var + i) * 0.5f); });
    grad_mu.close();
    grad_log_var.close();
  }
}

void bound(const BoundArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kWidth) bound_samples(a, i, end - i);
}

void bound_backward(const BoundArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kWidth) bound_samples_backward(a, i, end - i);
}

void tril(const TrilArgs& a, int64_t begin, int64_t end) {
  const int64_t features = a.shape.elements;
  TrilRows rows(features);
  Array<float> z(features + kBlock);
  for (int64_t sample = begin; sample < end; ++sample) {
    tril_sample(a, sample, rows, z.data());
    char* to = static_cast<char*>(a.z.data) + sample * features * element_size(a.z.dtype);
    convert_from_floats(z.data(), features, a.z.dtype, to);
  }
}

void tril_backward(const TrilArgs& a, int64_t begin, int64_t end) {
  const int64_t features = a.shape.elements;
  TrilRows rows(features);
  Array<float> to_mu(features + kBlock), to_row(features + kBlock);
  for (int64_t sample = begin; sample < end; ++sample) {
    tril_sample_backward(a, sample, rows, to_mu.data(), to_row.data());
    char* to = static_cast<char*>(a.grad_mu.data) + sample * features * element_size(a.grad_mu.dtype);
    convert_from_floats(to_mu.data(), features, a.grad_mu.dtype, to);
  }
}

int64_t packed_size(int64_t codes, int64_t features) { return (codes + kPanel - 1) / kPanel * panel_size(features); }

void pack_codes(const QuantizeArgs& a, float* mean, float* packed) { pack(a, mean, packed); }

void quantize(const QuantizeArgs& a, int64_t begin, int64_t end) {
  Quantizer quantizer(a);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * kCodeRows, last = first + kCodeRows;
    a.partials[unit] = quantizer.rows(first, last < a.rows ? last : a.rows);
  }
}

void quantize_backward(const QuantizeArgs& a, int64_t begin, int64_t end) {
  Array<float> x(a.features + kBlock), e(a.features + kBlock), to(a.features + kBlock);
  for (int64_t row = begin; row < end; ++row) row_gradient(a, row, x.data(), e.data(), to.data());
}

void codebook_gradient(const QuantizeArgs& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * kCodeFeatures, left = a.features - first;
    code_gradients(a, first, left < kCodeFeatures ? left : kCodeFeatures);
  }
}

}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::latent
