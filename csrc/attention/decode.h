// One query of each head against cached keys: bound by reading them, split along keys.
#pragma once

#include "attention/rows.h"

namespace dgm::attention {
namespace DGM_ISA_NAMESPACE {
namespace {

constexpr int64_t kRowsAtOnce = 4;

// Four rows of floats: where they lie, or of other dtypes copies.
class FourRows {
 public:
  DGM_INLINE_METHOD FourRows(const Rows& x, int64_t batch, int64_t head, int64_t features)
      : x_(x), batch_(batch), head_(head), features_(features), direct_(x.dtype == DType::Float32) {}

  // Rows from `row` on; of fewer than four the others are like the first.
  DGM_INLINE_METHOD void read(int64_t row, int64_t count) {
    for (int64_t r = 0; r < kRowsAtOnce; ++r) {
      const char* from = row_at(x_, batch_, head_, row + (r < count ? r : 0));
      rows_[r] = direct_ ? reinterpret_cast<const float*>(from) : copies_[r];
      if (!direct_) read_row(x_, from, features_, {}, 0, copies_[r]);
      ask_ahead(x_, from, features_);
    }
  }

  // A vector of features from `d` on, zeros beyond the last one.
  DGM_INLINE_METHOD F32 lanes(int64_t r, int64_t d) const {
    return d + kWidth <= features_ ? load(rows_[r] + d) : load_part(rows_[r] + d, features_ - d);
  }

 private:
  const Rows& x_;
  int64_t batch_, head_, features_;
  bool direct_;
  const float* rows_[kRowsAtOnce];
  alignas(64) float copies_[kRowsAtOnce][kMaxFeatures + kWidth];
};

// Sums of the lanes of four vectors.
DGM_INLINE Quad lane_sums(F32* v) {
  transpose4(v);
  const F32 sums = (v[0] + v[1]) + (v[2] + v[3]);
  Quad total = quad(sums, 0);
  DGM_UNROLL
  for (int i = 1; i < kWidth / 4; ++i) total += quad(sums, i);
  return total;
}

// Keys [begin, end) of a part for one query: scores, then their exponentials, then the values that these weigh.
class Decode {
 public:
  explicit Decode(const DecodeArgs& a) : a_(a) {}

  void unit(int64_t batch, int64_t key_head, int64_t part) {
    begin_ = a_.begin + part * kDecodePart;
    end_ = begin_ + kDecodePart < a_.end ? begin_ + kDecodePart : a_.end;
    const int64_t shared = a_.heads / a_.key_heads;
    for (int64_t head = key_head * shared; head < (key_head + 1) * shared; ++head) {
      float* to = a_.partial + ((batch * a_.heads + head) * a_.parts + part) * (a_.value_features + 2);
      read_row(a_.q, row_at(a_.q, batch, head, 0), a_.features, {}, 0, query_);
      for (int64_t d = 0; d < a_.features; d += kWidth) store(query_ + d, load(query_ + d) * (a_.scale * kLog2E));
      const float most = compute_scores(batch, head, key_head);
      to[a_.value_features] = most;
      to[a_.value_features + 1] = exponentials(most);
      sum_values(batch, key_head, to);
    }
  }

 private:
  // In units of log 2; returns the greatest.
  float compute_scores(int64_t batch, int64_t head, int64_t key_head) {
    FourRows keys(a_.k, batch, key_head, a_.features);
    const float slope = a_.slopes ? a_.slopes[head] * kLog2E : 0.0f;
    const int64_t column = a_.width ? a_.position % a_.width : 0;
    float most = kMinusInfinity;
    for (int64_t key = begin_; key < end_; key += kRowsAtOnce) {
      const int64_t count = end_ - key < kRowsAtOnce ? end_ - key : kRowsAtOnce;
      keys.read(key, count);
      F32 sums[kRowsAtOnce] = {};
      for (int64_t d = 0; d < a_.features; d += kWidth) {
        const F32 q = load(query_ + d);
        DGM_UNROLL
        for (int64_t r = 0; r < kRowsAtOnce; ++r) sums[r] += keys.lanes(r, d) * q;
      }
      const Quad four = lane_sums(sums);
      for (int64_t r = 0; r < count; ++r) {
        float score = four[r];
        if (a_.slopes) score -= slope * static_cast<float>(distance(a_.position, key + r));
        if (a_.width && distance((key + r) % a_.width, column) > a_.radius) score = kMinusInfinity;
        scores_[key - begin_ + r] = score;
        if (score > most) most = score;
      }
    }
    for (int64_t n = end_ - begin_; n % kWidth; ++n) scores_[n] = kMinusInfinity;
    return most;
  }

  static DGM_INLINE_METHOD int64_t distance(int64_t a, int64_t b) { return a > b ? a - b : b - a; }

  float exponentials(float most) {
    const float shift = most == kMinusInfinity ? 0.0f : most;
    F32 sum = {};
    for (int64_t n = 0; n < end_ - begin_; n += kWidth) {
      const F32 p = power_of_two_below_one(load(scores_ + n) - shift);
      store(scores_ + n, p);
      sum += p;
    }
    return static_cast<float>(dgm::DGM_ISA_NAMESPACE::sum(sum));
  }

  void sum_values(int64_t batch, int64_t key_head, float* to) {
    FourRows values(a_.v, batch, key_head, a_.value_features);
    alignas(64) float sums[kMaxFeatures + kWidth];
    std::memset(sums, 0, whole_vectors(a_.value_features) * sizeof(float));
    for (int64_t key = begin_; key < end_; key += kRowsAtOnce) {
      const int64_t count = end_ - key < kRowsAtOnce ? end_ - key : kRowsAtOnce;
      values.read(key, count);
      F32 weights[kRowsAtOnce] = {};
      for (int64_t r = 0; r < count; ++r) weights[r] = broadcast_float(scores_[key - begin_ + r]);
      for (int64_t d = 0; d < a_.value_features; d += kWidth) {
        const F32 low = values.lanes(0, d) * weights[0] + values.lanes(1, d) * weights[1];
        const F32 high = values.lanes(2, d) * weights[2] + values.lanes(3, d) * weights[3];
        store(sums + d, load(sums + d) + (low + high));
      }
    }
    std::memcpy(to, sums, a_.value_features * sizeof(float));
  }

  const DecodeArgs& a_;
  int64_t begin_ = 0, end_ = 0;
  alignas(64) float query_[kMaxFeatures + kWidth];
  alignas(64) float scores_[kDecodePart + kWidth];
};

// The parts of a head, in their order, to one result.
DGM_INLINE void combine_parts(const DecodeArgs& a, int64_t batch, int64_t head) {
  const int64_t size = a.value_features + 2;
  const float* parts = a.partial + (batch * a.heads + head) * a.parts * size;
  float most = kMinusInfinity, denominator = 0.0f;
  for (int64_t part = 0; part < a.parts; ++part) {
    const float found = parts[part * size + a.value_features];
    most = found > most ? found : most;
  }
  alignas(64) float sums[kMaxFeatures + kWidth];
  std::memset(sums, 0, whole_vectors(a.value_features) * sizeof(float));
  for (int64_t part = 0; part < a.parts; ++part) {
    const float* from = parts + part * size;
    const float shift = most == kMinusInfinity ? 0.0f : most;
    const float factor = power_of_two_below_one(broadcast_float(from[a.value_features] - shift))[0];
    denominator += factor * from[a.value_features + 1];
    for (int64_t d = 0; d < a.value_features; ++d) sums[d] += factor * from[d];
  }
  const float inverse = denominator == 0.0f ? 0.0f : 1.0f / denominator;
  for (int64_t d = 0; d < a.value_features; ++d) sums[d] *= inverse;
  convert_from_floats(sums, a.value_features, a.out.dtype, row_at(a.out, batch, head, 0));
}

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::attention
