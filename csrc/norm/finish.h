// From the sums of parts of a sample to the gradients of parameters, in the order of the parts and samples.
#pragma once

#include "norm/math.h"

namespace dgm::norm {
namespace DGM_ISA_NAMESPACE {
namespace {

constexpr int64_t kBuffer = kFinishColumns + 16;  // a buffer is read and written in whole vectors

// Adds the parts of a sample up, in float64.
DGM_NOINLINE void sample_sums(const FinishArgs& a, int64_t sample, int64_t first, int64_t count, float* to) {
  double totals[kFinishColumns];
  for (int k = 0; k < a.sums; ++k) {
    std::memset(totals, 0, sizeof totals);
    for (int64_t part = 0; part < a.parts; ++part) {
      const float* row = a.partials + ((sample * a.parts + part) * a.sums + k) * a.size + first;
      for (int64_t i = 0; i < count; ++i) totals[i] += static_cast<double>(row[i]);
    }
    for (int64_t i = 0; i < count; ++i) to[k * kFinishColumns + i] = static_cast<float>(totals[i]);
  }
}

DGM_INLINE void emit(const Output& output, int64_t index, int64_t count, const float* from) {
  if (!output.data) return;
  char* to = static_cast<char*>(output.data) + index * element_size(output.dtype);
  convert_from_floats(from, count, output.dtype, to);
}

// With P the sums of gradients and Q those with the normalised rows: to shift P, to scale Q weight + P bias; over the
// samples to bias P (1 + scale), to weight Q (1 + scale).
DGM_NOINLINE void finish_columns(const FinishArgs& a, int64_t first) {
  const int64_t count = a.size - first < kFinishColumns ? a.size - first : kFinishColumns;
  alignas(64) float sums[2 * kFinishColumns + kBuffer], weights[kBuffer], biases[kBuffer], scales[kBuffer];
  alignas(64) float result[kBuffer];
  double to_weight[kFinishColumns] = {}, to_bias[kFinishColumns] = {};
  const float *weight = read(a.weight, first, count, weights), *bias = read(a.bias, first, count, biases);
  const float *plain = sums, *normalized = sums + kFinishColumns;
  for (int64_t sample = 0; sample < a.batch; ++sample) {
    sample_sums(a, sample, first, count, sums);
    const float* scale = read(a.scale, sample, first, count, scales);
    for (int64_t i = 0; i < count; ++i) {
      const double factor = scale ? 1.0 + static_cast<double>(scale[i]) : 1.0;
      to_bias[i] += static_cast<double>(plain[i]) * factor;
      to_weight[i] += static_cast<double>(normalized[i]) * factor;
      result[i] = normalized[i] * (weight ? weight[i] : 1.0f) + (bias ? plain[i] * bias[i] : 0.0f);
    }
    const int64_t index = sample * a.size + first;
    emit(a.to_scale, index, count, result);
    emit(a.to_shift, index, count, plain);
    emit(a.to_gate, index, count, sums + 2 * kFinishColumns);
  }
  for (int64_t i = 0; i < count; ++i) result[i] = static_cast<float>(to_weight[i]);
  emit(a.to_weight, first, count, result);
  for (int64_t i = 0; i < count; ++i) result[i] = static_cast<float>(to_bias[i]);
  emit(a.to_bias, first, count, result);
}

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::norm
