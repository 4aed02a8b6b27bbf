// CPU inversion of a masked autoregressive network: a lane is a sample; a unit is computed once, when what it reads is
// known. The network comes as a program, which launch.cpp writes: groups of units with the weights that count for them.
#pragma once

#include "coupling/affine.h"
#include "coupling/spline.h"

namespace dgm::coupling {
namespace DGM_ISA_NAMESPACE {
namespace {

// Vectors of samples in a tile: with four units at a time, as many sums as there are registers for.
#if defined(__AVX512F__)
constexpr int kTile = 4;
#else
constexpr int kTile = 2;
#endif

DGM_INLINE F32 activated(Activation activation, F32 x) {
  switch (activation) {
    case Activation::Tanh:
      return hyperbolic_tangent(x);
    case Activation::Elu:
      return x < 0.0f ? exponential_minus_one_in_range(at_most(at_least(x, -105.0f), 0.0f)) : x;
    case Activation::Silu:
      return x * logistic(x);
    default:
      return at_least(x, 0.0f);
  }
}

// Rows of kVecs vectors: `units` rows from `inputs` rows.
template <int kVecs, int kUnits>
DGM_INLINE void compute_units(const MadeArgs& a, const MadeGroup& group, float* rows) {
  constexpr int kRow = kVecs * kWidth;
  const float* weight = a.packed + group.weights;
  F32 sums[kUnits][kVecs];
  DGM_UNROLL
  for (int u = 0; u < kUnits; ++u) DGM_UNROLL
  for (int t = 0; t < kVecs; ++t) sums[u][t] = broadcast_float(weight[u]);
  weight += kUnits;
  const float* from = rows + static_cast<int64_t>(group.from) * kRow;
  for (int k = 0; k < group.inputs; ++k, weight += kUnits, from += kRow) {
    F32 input[kVecs];
    DGM_UNROLL
    for (int t = 0; t < kVecs; ++t) input[t] = load(from + t * kWidth);
    DGM_UNROLL
    for (int u = 0; u < kUnits; ++u) {
      const F32 w = broadcast_float(weight[u]);
      DGM_UNROLL
      for (int t = 0; t < kVecs; ++t) sums[u][t] += w * input[t];
    }
  }
  float* to = rows + static_cast<int64_t>(group.to) * kRow;
  for (int u = 0; u < kUnits; ++u)
    for (int t = 0; t < kVecs; ++t)
      store(to + u * kRow + t * kWidth, group.hidden ? activated(a.activation, sums[u][t]) : sums[u][t]);
}

template <int kVecs>
DGM_NOINLINE void compute_groups(const MadeArgs& a, int64_t begin, int64_t end, float* rows) {
  for (int64_t i = begin; i < end; ++i) {
    const MadeGroup& group = a.groups[i];
    if (group.units == 4)
      compute_units<kVecs, 4>(a, group, rows);
    else if (group.units == 2)
      compute_units<kVecs, 2>(a, group, rows);
    else
      compute_units<kVecs, 1>(a, group, rows);
  }
}

// The feature from its z and the parameters, rows of kVecs vectors; what log dx/dz is, is added to `logdet`.
template <int kVecs>
DGM_NOINLINE void invert_feature(const MadeArgs& a, const float* parameters, const float* z, float* x, F32* logdet) {
  constexpr int kRow = kVecs * kWidth;
  for (int t = 0; t < kVecs; ++t, parameters += kWidth) {
    const F32 u = load(z + t * kWidth);
    F32 result, slope;
    if (a.spline.bins) {
      Parameters p;
      const int bins = a.spline.bins;
      for (int k = 0; k < bins; ++k) p.widths[k] = load(parameters + k * kRow);
      for (int k = 0; k < bins; ++k) p.heights[k] = load(parameters + (bins + k) * kRow);
      for (int k = 0; k + 1 < bins; ++k) p.derivatives[k] = load(parameters + (2 * bins + k) * kRow);
      soften(a.spline, p);
      transform<true>(a.spline, p, u, result, slope);
    } else {
      const F32 shift = load(parameters), raw = load(parameters + kRow);
      with_map(a.map, [&](auto map) {
        const LogScale<F32> scale = log_scale<map(), true>(raw);
        result = (u - shift) * scale.factor;
        slope = -scale.s;
      });
    }
    store(x + t * kWidth, result);
    logdet[t] += slope;
  }
}

// Samples [first, first + count), as many as kVecs vectors hold. `rows` are first the features by degree, which the
// program reads as units, then the hidden units, the parameters of one feature, and z.
template <int kVecs>
DGM_INLINE void invert_tile(const MadeArgs& a, int64_t first, int64_t count, float* rows) {
  constexpr int kRow = kVecs * kWidth;
  float* parameters = rows + a.parameter_row * kRow;
  float* z = parameters + static_cast<int64_t>(a.parameters) * kRow;
  alignas(64) float sample[kChunk + kWidth];
  for (int64_t lane = 0; lane < kRow; ++lane) {  // lanes without a sample do as the last one
    const int64_t row = first + (lane < count ? lane : count - 1);
    for (int64_t e = 0; e < a.features; e += kChunk) {
      const int64_t some = a.features - e < kChunk ? a.features - e : kChunk;
      const int64_t from = (row * a.features + e) * element_size(a.z.dtype);
      convert_to_floats(static_cast<const char*>(a.z.data) + from, a.z.dtype, some, sample);
      for (int64_t j = 0; j < some; ++j) z[(e + j) * kRow + lane] = sample[j];
    }
  }
  F32 logdet[kVecs] = {};
  compute_groups<kVecs>(a, 0, a.steps[0].begin, rows);  // units that read nothing
  for (int64_t i = 0; i < a.features; ++i) {
    const MadeStep& step = a.steps[i];
    compute_groups<kVecs>(a, step.begin, step.hidden, rows);
    invert_feature<kVecs>(a, parameters, z + step.feature * kRow, rows + i * kRow, logdet);
    compute_groups<kVecs>(a, step.hidden, step.end, rows);
  }
  for (int64_t lane = 0; lane < count; ++lane) {
    for (int64_t i = 0; i < a.features; ++i) {
      alignas(64) float value[kWidth] = {rows[i * kRow + lane]};
      const int64_t to = ((first + lane) * a.features + a.steps[i].feature) * element_size(a.x.dtype);
      convert_from_floats(value, 1, a.x.dtype, static_cast<char*>(a.x.data) + to);
    }
    a.logdet[first + lane] = logdet[lane / kWidth][lane % kWidth];
  }
}

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::coupling
