// Arguments of the norm kernels as plain pointers. No torch header in here.
#pragma once

#include "common/dtype.h"

namespace dgm::norm {

constexpr int64_t kPartRows = 64;  // rows of one sample that are worked on, and their sums kept, together

// A row of each sample, at a distance of `stride` elements; `data` is null where an optional one is absent.
struct SampleRows {
  const void* data = nullptr;
  DType dtype = DType::Float32;
  int64_t stride = 0;
};

// Both passes over rows of `size` elements, `tokens` of them a sample; gate, scale and shift have one row a sample.
struct RowsArgs {
  int64_t batch = 0, tokens = 0, parts = 0, size = 0;
  bool rms = false;
  bool stream = false;  // store results past the caches: they are too large to be found there later
  float eps = 0.0f;
  Operand x, residual, weight, bias;  // backward: x only with a gate
  SampleRows gate, scale, shift;
  Output y, h;
  float *mean = nullptr, *rstd = nullptr;
  const float *given_mean = nullptr, *given_rstd = nullptr;  // backward
  Operand grad, grad_h, normalized;                          // `normalized`: h, or x without a residual
  Output to_h, to_x;
  int sums = 0;               // rows of partials: of the gradients, with the normalised rows, with x
  float* partials = nullptr;  // [batch, parts, sums, size]
};

// Both passes over groups of channels of `elements` each.
struct GroupArgs {
  int64_t batch = 0, channels = 0, elements = 0, groups = 0;
  bool stream = false;
  float eps = 0.0f;
  Operand x, weight, bias;
  SampleRows scale, shift;
  Output y;
  float *mean = nullptr, *rstd = nullptr;
  const float *given_mean = nullptr, *given_rstd = nullptr;  // backward
  Operand grad;
  Output to_x;
  float* partials = nullptr;  // [batch, 1, 2, channels]
};

// From partial sums to gradients: over the parts of a sample those of shift, scale and gate, over the samples those of
// weight and bias. An output without data is not wanted.
struct FinishArgs {
  int64_t batch = 0, parts = 0, size = 0;
  int sums = 0;
  const float* partials = nullptr;
  Operand weight, bias;
  SampleRows scale;
  Output to_weight, to_bias, to_scale, to_shift, to_gate;
};

constexpr int64_t kFinishColumns = 256;  // that a call of `finish` works on at a time

}  // namespace dgm::norm
