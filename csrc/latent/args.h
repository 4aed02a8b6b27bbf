// Arguments of the latent kernels as plain pointers. No torch header in here.
#pragma once

#include "common/dtype.h"

namespace dgm::latent {

constexpr int64_t kChunk = 768;     // elements that are worked on together: a multiple of every kBlock of common/vec.h
constexpr int64_t kCodeRows = 168;  // rows that a unit quantises: a multiple of every kTile of common/panel.h

constexpr int64_t kCodeFeatures = 32;  // features of a codebook's gradient that a unit adds up

// A unit of work is several samples, or a part of a long one; see chunk.h.
struct Shape {
  int64_t batch = 0, elements = 0, parts = 1;
};

// Both passes of a sample and its KL, and those of a KL alone. The prior is N(prior_mu, exp(prior_log_var)), or
// tensors.
struct SampleArgs {
  Shape shape;
  NoiseArgs noise;
  RowsIn mu, log_var, prior_mu_rows, prior_log_var_rows;
  bool log_normal = false;
  bool stream = false;     // results go past the caches
  bool standard = true;    // the prior is N(0, 1)
  float free_bits = 0.0f;  // nats that an element counts for at least, or minus infinity
  float prior_mu = 0.0f, prior_log_var = 0.0f, inverse_sigma = 1.0f;  // 1 / the prior's standard deviation
  RowsOut z;
  double* partials = nullptr;  // [batch, parts] sums of twice the KL
  RowsIn grad;                 // backward
  const float* grad_kl = nullptr;
  RowsOut grad_mu, grad_log_var, grad_prior_mu, grad_prior_log_var;
};

// Importance samples: z and its gradient are [draws, batch, elements], sums and theirs [draws, batch].
struct ImportanceArgs {
  Shape shape;
  NoiseArgs noise;
  int64_t draws = 0;
  bool log_normal = false;
  bool stream = false;  // z goes past the caches
  RowsIn mu, log_var;
  RowsOut z;
  double* partials = nullptr;  // [draws, batch, parts]
  RowsIn grad;                 // backward
  const float* grad_ratio = nullptr;
  RowsOut grad_mu, grad_log_var;
};

// The bound of [draws, samples] log-weights.
struct BoundArgs {
  int64_t draws = 0, samples = 0;
  float log_draws = 0.0f;
  const float* log_weights = nullptr;
  float* bound = nullptr;
  const float* grad = nullptr;  // backward
  float* to_log_weights = nullptr;
};

// Full covariance: `factor` holds [features, features] a sample.
struct TrilArgs {
  Shape shape;
  NoiseArgs noise;
  RowsIn mu, factor;
  RowsOut z;
  float* kl = nullptr;
  RowsIn grad;  // backward
  const float* grad_kl = nullptr;
  RowsOut grad_mu, grad_factor;
};

// Vector quantisation of `rows` vectors.
struct QuantizeArgs {
  int64_t rows = 0, features = 0, codes = 0;
  RowsIn x;
  Operand codebook;
  const float* mean = nullptr;    // of the codes, [features]
  const float* packed = nullptr;  // the codes less their mean, see quantize.h
  int64_t* indices = nullptr;
  RowsOut quantized;
  double* partials = nullptr;  // a unit's sum of squared distances
  RowsIn grad;                 // backward
  float x_factor = 0.0f, code_factor = 0.0f;
  RowsOut grad_x;
  Output grad_codebook;
};

}  // namespace dgm::latent
