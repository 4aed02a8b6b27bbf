// Arguments of the pixelwise kernels of masked_conv as plain pointers. No torch header in here.
#pragma once

#include "common/dtype.h"

namespace dgm::masked_conv {

constexpr float kMinLogScale = -7.0f;  // of a logistic

// The gated activation, both passes. A row of the result has `length` elements: a sample's, or, where the condition is
// one number a channel, a channel's. A row is worked on in `parts`.
struct GateArgs {
  int64_t rows = 0, rows_per_sample = 1, length = 0, parts = 1;
  Operand x, condition;      // the condition is like x, or
  bool per_channel = false;  // [batch, 2 * rows_per_sample]
  Output y;
  Operand grad;  // backward
  Output grad_x;
  float* grad_condition = nullptr;  // of a condition per channel
};

// The mixture of discretized logistics, both passes. Pixels of all samples are numbered through.
struct MixtureArgs {
  int64_t pixels = 0, plane = 1, mixtures = 0;  // in all, of a sample; components
  int channels = 1;                             // 1 or 3
  float half = 0.0f;                            // half the distance of two levels
  Operand x, parameters;
  float* log_prob = nullptr;
  const float* grad = nullptr;  // backward
  Output grad_parameters;
};

// The categorical distribution, both passes: logits [outer, levels, inner]. The normaliser is the logarithm of the sum
// of exp(logit - largest logit): of the largest logit itself, added to it, large logits would leave it too few digits.
struct CategoricalArgs {
  int64_t outer = 0, levels = 0, inner = 0;
  const int64_t* x = nullptr;
  Operand logits;
  float *log_prob = nullptr, *normaliser = nullptr;
  const float *grad = nullptr, *given_normaliser = nullptr;  // backward
  Output grad_logits;
};

}  // namespace dgm::masked_conv
