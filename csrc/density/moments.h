// Sums over points for every component: counts, first and second moments about it, weighted by responsibilities.
#pragma once

#include "density/gather.h"

namespace dgm::density {
namespace DGM_ISA_NAMESPACE {
namespace {

constexpr int kMomentTile = 4;  // components that share a reading of the points

// first[m] += w t and second[m] += w t^2 over the points of a panel, t = x - y, one vector of features.
template <int kPositions>
DGM_NOINLINE void tile_moments(const float* weights, const float* x, const float* y, int64_t row, float* first,
                               float* second) {
  F32 sums[kPositions], squares[kPositions], means[kPositions];
  DGM_UNROLL
  for (int m = 0; m < kPositions; ++m)
    means[m] = load(y + m * row), sums[m] = load(first + m * row), squares[m] = load(second + m * row);
  for (int n = 0; n < kPanel; ++n) {
    const F32 v = load(x + n * row);
    DGM_UNROLL
    for (int m = 0; m < kPositions; ++m) {
      const F32 t = v - means[m], wt = t * weights[m * kPanel + n];
      sums[m] += wt, squares[m] += wt * t;
    }
  }
  DGM_UNROLL
  for (int m = 0; m < kPositions; ++m) store(first + m * row, sums[m]), store(second + m * row, squares[m]);
}

// Rows [first, first + count) about the middle, as they lie but for zeros up to whole vectors; zeros up to `rows`.
DGM_NOINLINE void copy_rows(const float* x, const float* middle, int64_t features, int64_t first, int64_t count,
                            int64_t rows, int64_t row, float* to) {
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t d = 0; d < row; d += kWidth)
      store(to + n * row + d,
            n < count ? load_first(x + (first + n) * features + d, features - d) - load(middle + d) : F32{});
}

DGM_INLINE float sum_of_panel(const float* x) { return static_cast<float>(sum(load(x)) + sum(load(x + kWidth))); }

template <class Scorer>
class Moments {
  static constexpr bool kTriangles = std::is_same_v<Scorer, Triangles>;
  static constexpr bool kDiagonals = std::is_same_v<Scorer, Diagonals>;
  static constexpr int64_t kBlock = Scorer::kBlock;

 public:
  Moments(const MomentArgs& a, const Scorer& scorer, float* memory)
      : a_(a), scorer_(scorer), features_(a.mixture.features) {
    Scratch scratch(memory);
    panel_ = scratch.take(scorer.panel_floats()), block_ = scratch.take(scorer.block_floats());
    scores_ = scratch.take(kBlock * kPanel), rows_ = scratch.take(kPanel * a.row);
    components_ = scratch.take(kBlock * a.row);
    counts_ = scratch.take(kBlock * kPanel), weights_ = scratch.take(kBlock * kPanel);
    squares_ = scratch.take(kBlock * kPanel);
    if constexpr (kTriangles) moved_ = scratch.take(kPanel * a.row), weighed_ = scratch.take((features_ + 1) * kPanel);
    size_ = scratch.taken(memory);
  }

  int64_t size() const { return size_; }

  void unit(int64_t index) {
    const int64_t part = index % a_.parts, block = index / a_.parts * kBlock;
    const int64_t left = a_.mixture.components - block, count = left < kBlock ? left : kBlock;
    const int64_t at = part * a_.mixture.components + block;
    begin(at, block, count);
    const int64_t begin = part * a_.part_points, last = begin + a_.part_points;
    const int64_t end = last < a_.mixture.points ? last : a_.mixture.points;
    for (int64_t point = begin; point < end; point += kPanel) visit(at, block, count, point);
    for (int64_t m = 0; m < count; ++m) finish_component(at + m, m);
  }

  // The parts of a component added up.
  void finish(int64_t m) const {
    const int64_t row = kTriangles ? a_.second : a_.row, lowest = kTriangles ? features_ * a_.row : 0;
    const float* first = kTriangles ? a_.moments : a_.first;
    a_.out_count[m] = added(a_.count, 1, m, 0);
    for (int64_t d = 0; d < features_; ++d) a_.out_first[m * features_ + d] = added(first, row, m, lowest + d);
    if constexpr (kTriangles) {
      for (int64_t i = 0; i < features_; ++i)
        for (int64_t j = 0; j <= i; ++j) {
          const float sum = added(a_.moments, a_.second, m, i * a_.row + j);
          float* to = a_.out_second + m * features_ * features_;
          to[i * features_ + j] = to[j * features_ + i] = sum;
        }
    } else {
      const int64_t width = kDiagonals ? features_ : 1;
      for (int64_t d = 0; d < width; ++d) a_.out_second[m * width + d] = added(a_.moments, a_.second, m, d);
    }
  }

 private:
  float added(const float* from, int64_t size, int64_t m, int64_t place) const {
    double sum = 0.0;
    for (int64_t part = 0; part < a_.parts; ++part)
      sum += static_cast<double>(from[(part * a_.mixture.components + m) * size + place]);
    return static_cast<float>(sum);
  }

  void begin(int64_t at, int64_t block, int64_t count) {
    scorer_.pack(block, count, block_);
    copy_rows(a_.mixture.y, a_.mixture.middle, features_, block, count, count, a_.row, components_);
    for (int64_t i = 0; i < kBlock * kPanel; ++i) counts_[i] = weights_[i] = squares_[i] = 0.0f;
    std::memset(a_.first + at * a_.row, 0, count * a_.row * sizeof(float));
    std::memset(a_.moments + at * a_.second, 0, count * a_.second * sizeof(float));
  }

  void visit(int64_t at, int64_t block, int64_t count, int64_t point) {
    const int64_t points = points_of_panel(a_.mixture, point);
    scorer_.turn(point, points, panel_);
    copy_rows(a_.mixture.x, a_.mixture.middle, features_, point, points, kPanel, a_.row, rows_);
    alignas(64) float missing[kPanel], weight[kPanel], shift[kPanel];
    scorer_.missing(panel_, missing);
    read_lse(a_.lse, point, points, missing, shift);
    read_points(a_.weight, point, points, 0.0f, weight);
    if constexpr (kTriangles) {
      for (int64_t m = 0; m < count; ++m) triangle(at + m, m, shift, weight);
    } else {
      scorer_.scores(panel_, block_, count, scores_, nullptr);
      weigh(block, count, point, points, shift, weight, missing);
      if constexpr (kDiagonals)
        diagonals(at, count);
      else
        for (int64_t m = 0; m < count; m += kTile)
          outer_sums<Single>(scores_ + m * kPanel, count - m < kTile ? count - m : kTile, rows_, a_.row,
                             a_.first + (at + m) * a_.row);
    }
  }

  // Scores become weights; with a number a component, the squares of the distances are read off them.
  void weigh(int64_t block, int64_t count, int64_t point, int64_t points, const float* shift, const float* weight,
             const float* missing) {
    alignas(64) float q[kPanel];
    read_factors(a_.mixture, point, points, q);
    for (int64_t m = 0; m < count; ++m)
      for (int half = 0; half < 2; ++half) {
        const int64_t at = m * kPanel + half * kWidth;
        const F32 s = load(scores_ + at);
        const F32 w = power_of_two_below_one(s - load(shift + half * kWidth)) * load(weight + half * kWidth);
        store(counts_ + at, load(counts_ + at) + w);
        if constexpr (!kDiagonals) {
          const F32 wq = w * load(q + half * kWidth);
          const float factor = 2.0f / scorer_.factor(block + m), offset = *a_.mixture.offset_of(block + m) * kLog2E;
          const F32 square = (offset - s - load(missing + half * kWidth)) * factor;
          store(weights_ + at, load(weights_ + at) + wq);
          store(squares_ + at,
                load(squares_ + at) + (w == 0.0f ? F32{} : w * square));  // of weight 0, 0 times infinity
          store(scores_ + at, wq);
        } else {
          store(scores_ + at, w);
        }
      }
  }

  void diagonals(int64_t at, int64_t count) {
    for (int64_t m = 0; m < count; m += kMomentTile)
      with_positions<kMomentTile>(count - m < kMomentTile ? count - m : kMomentTile, [&](auto number) {
        for (int64_t d = 0; d < a_.row; d += kWidth)
          tile_moments<number()>(scores_ + m * kPanel, rows_ + d, components_ + m * a_.row + d, a_.row,
                                 a_.first + (at + m) * a_.row + d, a_.moments + (at + m) * a_.second + d);
      });
  }

  // Rows of w t (and, as the last one, of w) times rows of t: the lower triangle of the second moments, and the first.
  void triangle(int64_t at, int64_t m, const float* shift, const float* weight) {
    const float *component = block_ + m * scorer_.component_floats(), *mean = components_ + m * a_.row;
    float* t = panel_ + features_ * kPanel;
    scorer_.differences(panel_, component, t);
    scorer_.score(t, component, scores_, nullptr);
    float* last = weighed_ + features_ * kPanel;
    for (int half = 0; half < 2; ++half) {
      const int64_t lane = half * kWidth;
      const F32 w = power_of_two_below_one(load(scores_ + lane) - load(shift + lane)) * load(weight + lane);
      store(last + lane, w);
      store(counts_ + m * kPanel + lane, load(counts_ + m * kPanel + lane) + w);
      for (int64_t d = 0; d < features_; ++d) store(weighed_ + d * kPanel + lane, load(t + d * kPanel + lane) * w);
    }
    for (int64_t n = 0; n < kPanel; ++n)
      for (int64_t d = 0; d < a_.row; d += kWidth)
        store(moved_ + n * a_.row + d, load(rows_ + n * a_.row + d) - load(mean + d));
    float* out = a_.moments + at * a_.second;
    for (int64_t row = 0; row <= features_; row += kTile) {
      const int64_t number = features_ + 1 - row < kTile ? features_ + 1 - row : kTile;
      const int64_t columns = row + number > features_ ? a_.row : whole_vectors(row + number);
      with_positions(number, [&](auto positions) {
        int64_t d = 0;
        for (; d + kPanel <= columns; d += kPanel)
          tile_outer<Single, positions(), 2>(weighed_ + row * kPanel, moved_ + d, a_.row, out + row * a_.row + d);
        if (d < columns)
          tile_outer<Single, positions(), 1>(weighed_ + row * kPanel, moved_ + d, a_.row, out + row * a_.row + d);
      });
    }
  }

  // What is known only when all points have been seen.
  void finish_component(int64_t at, int64_t m) {
    a_.count[at] = sum_of_panel(counts_ + m * kPanel);
    if constexpr (kTriangles || kDiagonals) return;
    const float weight = sum_of_panel(weights_ + m * kPanel);
    for (int64_t d = 0; d < features_; ++d) a_.first[at * a_.row + d] -= weight * components_[m * a_.row + d];
    a_.moments[at * a_.second] = sum_of_panel(squares_ + m * kPanel);
  }

  const MomentArgs& a_;
  Scorer scorer_;
  int64_t features_, size_;
  float *panel_, *block_, *scores_, *rows_, *components_, *counts_, *weights_, *squares_;
  float *moved_ = nullptr, *weighed_ = nullptr;
};

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::density
