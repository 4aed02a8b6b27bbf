// Sums over components for every point: log-probabilities, posterior means, gradients, and sums of kernels.
#pragma once

#include "density/scores.h"

namespace dgm::density {
namespace DGM_ISA_NAMESPACE {
namespace {

// What a unit covers.
struct Unit {
  int64_t part, first_panel, panels, begin, end;

  Unit(const Mixture& a, const Plan& plan, int64_t index)
      : part(index % plan.parts),
        first_panel(index / plan.parts * plan.panels),
        begin(part * plan.part_components),
        end(begin + plan.part_components) {
    const int64_t left = ceil_divide(a.points, kPanel) - first_panel;
    panels = left < plan.panels ? left : plan.panels;
    if (end > a.components) end = a.components;
  }
  int64_t point(int64_t panel) const { return (first_panel + panel) * kPanel; }
};

DGM_INLINE int64_t points_of_panel(const Mixture& a, int64_t first) {
  return a.points - first < kPanel ? a.points - first : kPanel;
}

// Numbers of a panel's points; `rest` behind the last.
DGM_INLINE void read_points(const float* from, int64_t first, int64_t count, float rest, float* to) {
  for (int64_t n = 0; n < kPanel; ++n) to[n] = n < count ? from[first + n] : rest;
}

// Calls to = function(score, m, half) for all scores of a block, and adds what it gives to `totals`.
template <class Function>
DGM_INLINE void each_score(float* scores, int64_t count, F32 (&totals)[2], const Function& function) {
  for (int64_t m = 0; m < count; ++m)
    for (int half = 0; half < 2; ++half) {
      float* at = scores + m * kPanel + half * kWidth;
      const F32 value = function(load(at), m, half);
      store(at, value);
      totals[half] += value;
    }
}

// Powers of the scores of a block relative to `now`, the greatest so far of each point: their sums go to `sums`, made
// good for what was relative to `most`; `factors` gets by how much.
template <bool kKeep>
DGM_NOINLINE void take_powers(float* scores, int64_t count, const float* now, float* most, float* sums,
                              float* factors) {
  F32 shift[2], sum[2] = {}, other[2] = {};
  for (int half = 0; half < 2; ++half) {
    const F32 greatest = load(now + half * kWidth);
    shift[half] = greatest == kMinusInfinity ? F32{} : greatest;  // of a point that has seen nothing
    store(factors + half * kWidth, power_of_two_below_one(load(most + half * kWidth) - shift[half]));
    store(most + half * kWidth, greatest);
  }
  const auto power = [&](int64_t m, int half) {
    float* at = scores + m * kPanel + half * kWidth;
    const F32 value = power_of_two_below_one(load(at) - shift[half]);
    if constexpr (kKeep) store(at, value);
    return value;
  };
  int64_t m = 0;
  for (; m + 2 <= count; m += 2)  // in two sums, for a chain of additions would wait for each
    for (int half = 0; half < 2; ++half) sum[half] += power(m, half), other[half] += power(m + 1, half);
  if (m < count)
    for (int half = 0; half < 2; ++half) sum[half] += power(m, half);
  for (int half = 0; half < 2; ++half) {
    float* to = sums + half * kWidth;
    store(to, load(to) * load(factors + half * kWidth) + (sum[half] + other[half]));
  }
}

// Log-probabilities of a panel's points in the units of their scores: by factors of float64, for those of float32 are
// off by the same 1e-8 of it at every point.
constexpr double kLn2Wide = 0.693147180559945309417, kLog2EWide = 1.44269504088896340736;

DGM_INLINE void read_lse(const float* from, int64_t first, int64_t count, const float* missing, float* to) {
  for (int64_t n = 0; n < kPanel; ++n) {
    const double lse = n < count ? static_cast<double>(from[first + n]) : 0.0;
    to[n] = static_cast<float>(lse * kLog2EWide - static_cast<double>(missing[n]));
  }
}

// The parts of a panel joined: the greatest of all, what each part counts, and the logarithm of the sum of all.
struct Joined {
  alignas(64) float most[kPanel], total[kPanel], lse[kPanel];

  Joined(const float* mosts, const float* sums, const float* missing, int64_t parts, int64_t stride) {
    for (int half = 0; half < 2; ++half) {
      const int64_t at = half * kWidth;
      F32 greatest = broadcast_float(kMinusInfinity), sum = {};
      for (int64_t part = 0; part < parts; ++part) greatest = larger(load(mosts + part * stride + at), greatest);
      store(most + at, greatest == kMinusInfinity ? F32{} : greatest);
      for (int64_t part = 0; part < parts; ++part)
        sum += load(sums + part * stride + at) * factor(mosts + part * stride, half);
      store(total + at, sum);
      store(lse + at, logarithm(sum == 0.0f ? broadcast_float(1.0f) : sum));
    }
    for (int64_t n = 0; n < kPanel; ++n) {
      const double scale = static_cast<double>(most[n]) + static_cast<double>(missing[n]);
      lse[n] = total[n] == 0.0f ? kMinusInfinity : static_cast<float>(scale * kLn2Wide + static_cast<double>(lse[n]));
    }
  }

  F32 factor(const float* mosts, int half) const {
    return power_of_two_below_one(load(mosts + half * kWidth) - load(most + half * kWidth));
  }
};

// ---- Log-probability

template <class Scorer>
class LogProb {
 public:
  LogProb(const LogProbArgs& a, const Scorer& scorer, float* memory) : a_(a), scorer_(scorer) {
    Scratch scratch(memory);
    panels_ = scratch.take(a.plan.panels * scorer.panel_floats());
    block_ = scratch.take(scorer.block_floats());
    scores_ = scratch.take(Scorer::kBlock * kPanel);
    size_ = scratch.taken(memory);
  }

  int64_t size() const { return size_; }

  void unit(int64_t index) {
    const Unit u(a_.mixture, a_.plan, index);
    float *most = a_.most + u.part * a_.plan.padded, *sums = a_.sums + u.part * a_.plan.padded;
    for (int64_t p = 0; p < u.panels; ++p) {
      turn(u, p);
      if (u.part == 0) scorer_.missing(panel(p), a_.missing + u.point(p));
      for (int64_t n = 0; n < kPanel; ++n) most[u.point(p) + n] = kMinusInfinity, sums[u.point(p) + n] = 0.0f;
    }
    alignas(64) float now[kPanel], factors[kPanel];
    for (int64_t first = u.begin; first < u.end; first += Scorer::kBlock) {
      const int64_t count = packed(first, u.end);
      for (int64_t p = 0; p < u.panels; ++p) {
        std::memcpy(now, most + u.point(p), sizeof now);
        scorer_.scores(panel(p), block_, count, scores_, now);
        take_powers<false>(scores_, count, now, most + u.point(p), sums + u.point(p), factors);
      }
    }
  }

  // Joins the parts of the points of a panel.
  void finish(int64_t index) const {
    const int64_t first = index * kPanel;
    const Joined joined(a_.most + first, a_.sums + first, a_.missing + first, a_.plan.parts, a_.plan.padded);
    std::memcpy(a_.lse + first, joined.lse, points_of_panel(a_.mixture, first) * sizeof(float));
  }

  // A unit again, now that the sums are known.
  void responsibilities(int64_t index) {
    const Unit u(a_.mixture, a_.plan, index);
    for (int64_t p = 0; p < u.panels; ++p) turn(u, p);
    for (int64_t first = u.begin; first < u.end; first += Scorer::kBlock) {
      const int64_t count = packed(first, u.end);
      for (int64_t p = 0; p < u.panels; ++p) {
        scorer_.scores(panel(p), block_, count, scores_, nullptr);
        const int64_t point = u.point(p), points = points_of_panel(a_.mixture, point);
        F32 totals[2] = {};
        alignas(64) float lse[kPanel];
        read_lse(a_.lse, point, points, a_.missing + point, lse);
        const F32 shift[2] = {load(lse), load(lse + kWidth)};
        each_score(scores_, count, totals,
                   [&](F32 s, int64_t, int half) { return power_of_two_below_one(s - shift[half]); });
        for (int64_t n = 0; n < points; ++n)
          for (int64_t m = 0; m < count; ++m)
            a_.responsibilities[(point + n) * a_.mixture.components + first + m] = scores_[m * kPanel + n];
      }
    }
  }

 private:
  float* panel(int64_t p) const { return panels_ + p * scorer_.panel_floats(); }

  void turn(const Unit& u, int64_t p) const {
    scorer_.turn(u.point(p), points_of_panel(a_.mixture, u.point(p)), panel(p));
  }

  // The components from `first` on, as many as a block holds.
  int64_t packed(int64_t first, int64_t end) const {
    const int64_t count = end - first < Scorer::kBlock ? end - first : Scorer::kBlock;
    scorer_.pack(first, count, block_);
    return count;
  }

  const LogProbArgs& a_;
  Scorer scorer_;
  float *panels_, *block_, *scores_;
  int64_t size_;
};

// ---- Weighted sums

template <class Scorer, Gather kGather>
class Gathering {
  static constexpr bool kMean = kGather == Gather::Mean, kSum = kGather >= Gather::RbfSum;
  static constexpr bool kOfMean = kGather == Gather::MeanGradient;
  static constexpr bool kKnown = kGather == Gather::Gradient || kOfMean;  // the logarithm of the sum is
  static constexpr bool kTriangles = std::is_same_v<Scorer, Triangles>;
  static constexpr bool kNumbers = std::is_same_v<Scorer, Products> || std::is_same_v<Scorer, Differences>;

 public:
  Gathering(const GatherArgs& a, const Scorer& scorer, float* memory)
      : a_(a), scorer_(scorer), features_(a.mixture.features) {
    Scratch scratch(memory);
    panels_ = scratch.take(a.plan.panels * scorer.panel_floats());
    points_ = scratch.take(a.plan.panels * kPointNumbers * kPanel);
    block_ = scratch.take(scorer.block_floats());
    scores_ = scratch.take(Scorer::kBlock * kPanel);
    if constexpr (kOfMean) {
      vectors_ = scratch.take(a.plan.panels * features_ * kPanel);
      dots_ = scratch.take(Scorer::kBlock * kPanel);
    }
    if constexpr (kTriangles) z_ = scratch.take(features_ * kPanel);
    size_ = scratch.taken(memory);
  }

  int64_t size() const { return size_; }

  void unit(int64_t index) {
    const Unit u(a_.mixture, a_.plan, index);
    for (int64_t p = 0; p < u.panels; ++p) start(u, p);
    double total = 0.0;
    for (int64_t first = u.begin; first < u.end; first += Scorer::kBlock) {
      const int64_t count = u.end - first < Scorer::kBlock ? u.end - first : Scorer::kBlock;
      scorer_.pack(first, count, block_);
      for (int64_t p = 0; p < u.panels; ++p) total += visit(u, p, first, count);
    }
    if constexpr (kSum) a_.totals[index] = total;
  }

  // Joins the parts of the points of a panel, and writes them.
  void finish(int64_t index) const {
    const int64_t first = index * kPanel, count = points_of_panel(a_.mixture, first);
    alignas(64) float scale[kPanel], total[kPanel];
    if constexpr (kMean) {
      const Joined joined(a_.most + first, a_.sums + first, a_.missing + first, a_.plan.parts, a_.plan.padded);
      std::memcpy(a_.out_lse + first, joined.lse, count * sizeof(float));
      for (int half = 0; half < 2; ++half) store(scale + half * kWidth, 1.0f / load(joined.total + half * kWidth));
      std::memset(total, 0, sizeof total);
      return write(index, count, scale, total, &joined);
    }
    add_numbers(a_.sums, first, total);
    for (int64_t n = 0; n < kPanel; ++n) scale[n] = a_.mixture.q && n < count ? a_.mixture.q[first + n] : 1.0f;
    if constexpr (kKnown) {
      alignas(64) float sum[kPanel];
      add_numbers(a_.most, first, sum);
      for (int64_t n = 0; n < kPanel; ++n) scale[n] /= sum[n];
    }
    write(index, count, scale, total, nullptr);
  }

 private:
  // Of the points of a panel: what the scores lack, or what is taken off them; weights.
  static constexpr int64_t kPointNumbers = 2;

  float* panel(int64_t p) const { return panels_ + p * scorer_.panel_floats(); }
  float* sums_of(const Unit& u, int64_t p) const {
    return a_.partials + (u.part * (a_.plan.padded / kPanel) + u.first_panel + p) * a_.width * kPanel;
  }

  void start(const Unit& u, int64_t p) {
    const int64_t first = u.point(p), count = points_of_panel(a_.mixture, first), at = u.part * a_.plan.padded + first;
    scorer_.turn(first, count, panel(p));
    float *shift = points_ + p * kPointNumbers * kPanel, *weight = shift + kPanel;
    scorer_.missing(panel(p), shift);
    if constexpr (!kSum) {
      std::memset(sums_of(u, p), 0, a_.width * kPanel * sizeof(float));
      std::memset(a_.sums + at, 0, kPanel * sizeof(float));
    }
    if constexpr (kMean) {
      if (u.part == 0) std::memcpy(a_.missing + first, shift, kPanel * sizeof(float));
      for (int64_t n = 0; n < kPanel; ++n) a_.most[at + n] = kMinusInfinity;
    }
    if constexpr (kKnown) {
      std::memset(a_.most + at, 0, kPanel * sizeof(float));
      read_lse(a_.lse, first, count, shift, shift);
      read_points(a_.weight, first, count, 0.0f, weight);
    }
    if constexpr (kOfMean) {
      float* vectors = vectors_ + p * features_ * kPanel;
      turn_rows(a_.grad, nullptr, features_, first, count, kPanel, kPanel, vectors);
      for (int64_t i = 0; i < features_ * kPanel; ++i) vectors[i] *= Scorer::kVectorFactor;
    }
  }

  double visit(const Unit& u, int64_t p, int64_t first, int64_t count) {
    if constexpr (kTriangles) {
      triangles(u, p, first, count);
      return 0.0;
    } else if constexpr (kMean) {
      mean(u, p, first, count);
      return 0.0;
    } else {
      F32 totals[2] = {}, sum[2] = {};
      scorer_.scores(panel(p), block_, count, scores_, nullptr);
      weigh(p, first, count, totals, sum);
      if (a_.same) leave_out(u.point(p), first, count, totals);
      if constexpr (kSum) return sum_of_points(u.point(p), totals);
      add(a_.sums + u.part * a_.plan.padded + u.point(p), totals);
      if constexpr (kKnown) add(a_.most + u.part * a_.plan.padded + u.point(p), sum);
      const Run run{a_.rows + first * a_.width, scores_, count};
      weighted_sums<Single>(&run, 1, a_.width, a_.width, nullptr, sums_of(u, p));
      return 0.0;
    }
  }

  // Weights that are powers relative to the greatest score so far. Components whose weights could not change a mean
  // even if all others had them too, which with many features are nearly all, are left out of it.
  void mean(const Unit& u, int64_t p, int64_t first, int64_t count) {
    const int64_t at = u.part * a_.plan.padded + u.point(p);
    alignas(64) float now[kPanel], factors[kPanel];
    std::memcpy(now, a_.most + at, sizeof now);
    scorer_.scores(panel(p), block_, count, scores_, now);
    take_powers<true>(scores_, count, now, a_.most + at, a_.sums + at, factors);
    const float least = 0x1p-26f / static_cast<float>(a_.mixture.components);
    Run runs[Scorer::kBlock];
    int64_t number = 0, end = -1;  // end: where the last run ends
    for (int64_t m = 0; m < count; ++m) {
      const float* weights = scores_ + m * kPanel;
      if (!any_reaches(larger(load(weights), load(weights + kWidth)), least)) continue;
      if (m != end) runs[number++] = {a_.rows + (first + m) * a_.width, weights, 0};
      ++runs[number - 1].depth;
      end = m + 1;
    }
    bool rescales = false;
    for (int64_t n = 0; n < kPanel; ++n) rescales |= factors[n] != 1.0f;
    if (number || rescales) weighted_sums<Single>(runs, number, a_.width, a_.width, factors, sums_of(u, p));
  }

  static void add(float* to, const F32 (&sum)[2]) {
    for (int half = 0; half < 2; ++half) store(to + half * kWidth, load(to + half * kWidth) + sum[half]);
  }

  // `sum` gets the sums of the responsibilities. They would be 1, but for the rounding of the logarithm that they are
  // relative to.
  void weigh(int64_t p, int64_t first, int64_t count, F32 (&totals)[2], [[maybe_unused]] F32 (&sum)[2]) {
    const float *shifts = points_ + p * kPointNumbers * kPanel, *weights = shifts + kPanel;
    const F32 shift[2] = {load(shifts), load(shifts + kWidth)}, weight[2] = {load(weights), load(weights + kWidth)};
    if constexpr (kOfMean) scorer_.dots(vectors_ + p * features_ * kPanel, block_, count, dots_);
    each_score(scores_, count, totals, [&](F32 s, [[maybe_unused]] int64_t m, int half) {
      if constexpr (kKnown) {
        const F32 r = power_of_two_below_one(s - shift[half]);
        sum[half] += r;
        if constexpr (kOfMean) return r * (load(dots_ + m * kPanel + half * kWidth) + weight[half]);
        if constexpr (kNumbers) return r * weight[half] * (scorer_.factor(first + m) * kLn2);
        return r * weight[half];
      } else {
        return kernel(s + shift[half]);
      }
    });
  }

  // Of rbf kernels s is -|x - y|^2 / 2 in units of log 2.
  DGM_INLINE_METHOD F32 kernel(F32 s) const {
    F32 value = {};
    if constexpr (kGather == Gather::RbfSum || kGather == Gather::RbfGradient) {
      s = at_most(s, 0.0f);
      for (int32_t i = 0; i < a_.numbers; ++i) {
        const F32 k = power_of_two_below_one(s * (2.0f * a_.number[i]));
        value += kGather == Gather::RbfSum ? k : k * (2.0f * a_.number[i]);
      }
    } else {
      const F32 base = s * a_.number[0] + a_.number[1];
      const int degree = static_cast<int>(a_.number[2]);
      value = broadcast_float(kGather == Gather::PolynomialSum ? 1.0f : a_.number[2] * a_.number[0]);
      for (int i = kGather == Gather::PolynomialSum ? 0 : 1; i < degree; ++i) value *= base;
    }
    return value;
  }

  // Takes the pairs of a point with itself off.
  void leave_out(int64_t point, int64_t first, int64_t count, F32 (&totals)[2]) {
    if (point + kPanel <= first || point >= first + count) return;
    for (int64_t n = 0; n < kPanel; ++n) {
      const int64_t m = point + n - first;
      if (m >= 0 && m < count) scores_[m * kPanel + n] = 0.0f;
    }
    totals[0] = totals[1] = F32{};
    each_score(scores_, count, totals, [](F32 s, int64_t, int) { return s; });
  }

  double sum_of_points(int64_t point, const F32 (&totals)[2]) const {
    const int64_t points = points_of_panel(a_.mixture, point);
    double sum = 0.0;
    for (int64_t n = 0; n < points; ++n) sum += static_cast<double>(totals[n / kWidth][n % kWidth]);
    return sum;
  }

  // The gradient -sum_m w_m A^T A (x - y).
  void triangles(const Unit& u, int64_t p, int64_t first, int64_t count) {
    const float *shifts = points_ + p * kPointNumbers * kPanel, *weights = shifts + kPanel;
    float* t = panel(p) + features_ * kPanel;
    for (int64_t m = 0; m < count; ++m) {
      const float* component = block_ + m * scorer_.component_floats();
      scorer_.differences(panel(p), component, t);
      scorer_.score(t, component, scores_, z_);
      for (int half = 0; half < 2; ++half) {
        const F32 r = power_of_two_below_one(load(scores_ + half * kWidth) - load(shifts + half * kWidth));
        float* sum = a_.most + u.part * a_.plan.padded + u.point(p) + half * kWidth;
        store(sum, load(sum) + r);
        const F32 w = r * load(weights + half * kWidth) * (-1.0f / kRootHalfLog2E);
        for (int64_t i = 0; i < features_; ++i) {
          float* at = z_ + i * kPanel + half * kWidth;
          store(at, load(at) * w);
        }
      }
      const Run run{a_.rows + (first + m) * features_ * features_, z_, features_};
      weighted_sums<Single>(&run, 1, features_, features_, nullptr, sums_of(u, p));
    }
  }

  // A number of each point of a panel, its parts added up.
  void add_numbers(const float* from, int64_t first, float* to) const {
    for (int64_t n = 0; n < kPanel; ++n) {
      to[n] = 0.0f;
      for (int64_t part = 0; part < a_.plan.parts; ++part) to[n] += from[part * a_.plan.padded + first + n];
    }
  }

  void write(int64_t index, int64_t count, const float* scale, const float* total, const Joined* joined) const {
    const int64_t stride = a_.plan.padded / kPanel * a_.width * kPanel, first = index * kPanel;
    const float *partials = a_.partials + index * a_.width * kPanel, *middle = a_.mixture.middle;
    for (int64_t d = 0; d < features_; ++d) {
      alignas(64) float sum[kPanel], other[kPanel];
      add_parts(partials + d * kPanel, stride, joined, index, sum);
      const bool diagonal = a_.width == 2 * features_;  // A^T A y and, behind it, A^T A
      if (diagonal) add_parts(partials + (features_ + d) * kPanel, stride, joined, index, other);
      for (int64_t n = 0; n < count; ++n) {
        const float x = a_.mixture.x[(first + n) * features_ + d] - middle[d];
        const float off = diagonal ? x * other[n] : kSubtracts ? x * total[n] : 0.0f;
        a_.out[(first + n) * features_ + d] = scale[n] * (sum[n] - off);
      }
    }
  }

  void add_parts(const float* partials, int64_t stride, const Joined* joined, int64_t index, float* to) const {
    for (int half = 0; half < 2; ++half) {
      F32 sum = {};
      for (int64_t part = 0; part < a_.plan.parts; ++part) {
        const F32 value = load(partials + part * stride + half * kWidth);
        sum += joined ? value * joined->factor(a_.most + part * a_.plan.padded + index * kPanel, half) : value;
      }
      store(to + half * kWidth, sum);
    }
  }

  // Whether what was weighed are components themselves, and not their differences from a point.
  static constexpr bool kSubtracts = kNumbers && !kMean;

  const GatherArgs& a_;
  Scorer scorer_;
  int64_t features_, size_;
  float *panels_, *points_, *block_, *scores_, *vectors_ = nullptr, *dots_ = nullptr, *z_ = nullptr;
};

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::density
