// Scores of blocks of components at panels of points, in four forms, all in units of log 2.
#pragma once

#include "common/products.h"
#include "density/args.h"

namespace dgm::density {
namespace DGM_ISA_NAMESPACE {

using namespace ::dgm::DGM_ISA_NAMESPACE;

namespace {

constexpr float kRootHalfLog2E = 0.849321800288019042722f;  // sqrt(log2(e) / 2)

// A natural logarithm.
DGM_INLINE float in_units_of_log2(float x) { return x * kLog2E; }

// Rows [first, first + count) less `middle`, if that is given, turned: feature d of row n to `to[d * stride + n]`. Rows
// up to `rows`, a multiple of four, are zero.
DGM_NOINLINE void turn_rows(const float* x, const float* middle, int64_t features, int64_t first, int64_t count,
                            int64_t rows, int64_t stride, float* to) {
  for (int64_t n = 0; n < rows; n += 4)
    for (int64_t d = 0; d < features; d += kWidth) {
      const int64_t left = features - d;
      const F32 shift = middle ? load(middle + d) : F32{};
      F32 v[4];
      DGM_UNROLL
      for (int64_t r = 0; r < 4; ++r)
        v[r] = n + r < count ? load_first(x + (first + n + r) * features + d, left) - shift : F32{};
      store_turned(v, left, to + d * stride + n, stride);
    }
}

// A panel of points begins with [features][kPanel] numbers about the middle.
DGM_INLINE void turn_points(const Mixture& a, int64_t first, int64_t count, float* to) {
  turn_rows(a.x, a.middle, a.features, first, count, kPanel, kPanel, to);
}

// Halves of the squares of a panel's points.
DGM_INLINE void half_squares(const float* points, int64_t features, float* to) {
  F32 sums[2] = {};
  for (int64_t d = 0; d < features; ++d)
    for (int half = 0; half < 2; ++half) {
      const F32 v = load(points + d * kPanel + half * kWidth);
      sums[half] += v * v;
    }
  for (int half = 0; half < 2; ++half) store(to + half * kWidth, sums[half] * 0.5f);
}

// q of a panel's points; 1 where there is none, and behind the last point.
DGM_INLINE void read_factors(const Mixture& a, int64_t first, int64_t count, float* to) {
  for (int64_t n = 0; n < kPanel; ++n) to[n] = a.q && n < count ? a.q[first + n] : 1.0f;
}

// ---- A number a component, by products: x' = (q x, q, q |x|^2 / 2, 1) and y' = (v y, -v |y|^2 / 2, -v, offset), where
// v is A^2 in units of log 2. Where A is the same for all components the term with |x|^2 is, too: it is left out, and
// added to the logarithm of the sum in the end.

class Products {
 public:
  static constexpr int64_t kBlock = kBlockKeys;

  explicit Products(const Mixture& a) : a_(a), depth_(a.features + 3), shared_(a.inv_stride == 0) {}

  int64_t panel_floats() const { return depth_ * kPanel; }
  int64_t block_floats() const { return kTilesTogether * depth_ * kTileRow; }

  void turn(int64_t first, int64_t count, float* to) const {
    turn_points(a_, first, count, to);
    alignas(64) float squares[kPanel];
    half_squares(to, a_.features, squares);
    float* more = to + a_.features * kPanel;
    read_factors(a_, first, count, more);
    for (int half = 0; half < 2; ++half) {
      const F32 q = load(more + half * kWidth);
      if (a_.q)
        for (int64_t d = 0; d < a_.features; ++d) {
          float* at = to + d * kPanel + half * kWidth;
          store(at, load(at) * q);
        }
      store(more + kPanel + half * kWidth, shared_ ? F32{} : load(squares + half * kWidth) * q);
      store(more + 2 * kPanel + half * kWidth, broadcast_float(1.0f));
    }
  }

  void pack(int64_t first, int64_t count, float* to) const {
    for (int64_t tile = 0; tile < count; tile += kTile, to += depth_ * kTileRow) {
      const int64_t number = count - tile < kTile ? count - tile : kTile;
      turn_rows(a_.y, a_.middle, a_.features, first + tile, number, kTileRow, kTileRow, to);
      float squares[kTileRow] = {}, factors[kTileRow];
      for (int64_t m = 0; m < kTileRow; ++m) factors[m] = m < number ? factor(first + tile + m) : 0.0f;
      for (int64_t d = 0; d < a_.features; ++d)
        for (int64_t m = 0; m < kTileRow; ++m) {
          float& y = to[d * kTileRow + m];
          squares[m] += y * y, y *= factors[m];
        }
      float* more = to + a_.features * kTileRow;
      for (int64_t m = 0; m < kTileRow; ++m) {
        more[m] = -0.5f * factors[m] * squares[m];
        more[kTileRow + m] = -factors[m];
        more[2 * kTileRow + m] = m < number ? in_units_of_log2(*a_.offset_of(first + tile + m)) : 0.0f;
      }
    }
  }

  // Rows of kPanel scores for the `count` components of a block; `most`, if wanted, becomes the greatest of each point.
  void scores(const float* panel, const float* block, int64_t count, float* to, float* most) const {
    for (int64_t tile = 0; tile < count; tile += kTile, block += depth_ * kTileRow, to += kTile * kPanel)
      ::dgm::DGM_ISA_NAMESPACE::scores<Single>(block, count - tile < kTile ? count - tile : kTile, panel, depth_, 1.0f,
                                               to, most);
  }

  // Products of a panel of vectors, [features][kPanel], with the components about the middle; A is 1.
  void dots(const float* vectors, const float* block, int64_t count, float* to) const {
    for (int64_t tile = 0; tile < count; tile += kTile, block += depth_ * kTileRow, to += kTile * kPanel)
      ::dgm::DGM_ISA_NAMESPACE::scores<Single>(block, count - tile < kTile ? count - tile : kTile, vectors, a_.features,
                                               1.0f, to);
    // The components were packed times log2(e), which the vectors made good.
  }
  static constexpr float kVectorFactor = kLn2;

  // What was left out of the scores of a panel's points.
  void missing(const float* panel, float* to) const {
    for (int half = 0; half < 2; ++half) {
      F32 sum = {};
      if (shared_)
        for (int64_t d = 0; d < a_.features; ++d) {
          const F32 v = load(panel + d * kPanel + half * kWidth);  // q x
          sum += v * v;
        }
      const F32 q = load(panel + a_.features * kPanel + half * kWidth);
      store(to + half * kWidth, q > 0.0f ? sum / q * (-0.5f * factor(0)) : F32{});
    }
  }

  float factor(int64_t m) const {
    const float inv = a_.inv[m * a_.inv_stride];
    return inv * inv * kLog2E;
  }

 private:
  const Mixture& a_;
  int64_t depth_;
  bool shared_;
};

// ---- A number a component, by differences.

template <int kPositions>
DGM_NOINLINE void tile_differences(const float* y, const float* x, int64_t features, const float* factors,
                                   const float* offsets, const float* q, float* to) {
  Sums<kPositions> sums = {};
  for (int64_t d = 0; d < features; ++d, y += kTileRow, x += kPanel) {
    const F32 low = load(x), high = load(x + kWidth);
    DGM_UNROLL
    for (int m = 0; m < kPositions; ++m) {
      const F32 a = low - y[m], b = high - y[m];
      sums[m][0] += a * a, sums[m][1] += b * b;
    }
  }
  DGM_UNROLL
  for (int m = 0; m < kPositions; ++m)
    for (int half = 0; half < 2; ++half)
      store(to + m * kPanel + half * kWidth, offsets[m] - sums[m][half] * load(q + half * kWidth) * factors[m]);
}

DGM_INLINE void find_most(const float* scores, int64_t count, float* most) {
  if (!most) return;
  for (int half = 0; half < 2; ++half) {
    F32 found = load(most + half * kWidth);
    for (int64_t m = 0; m < count; ++m) found = larger(load(scores + m * kPanel + half * kWidth), found);
    store(most + half * kWidth, found);
  }
}

// Of a tile, what follows its [features][kTileRow] numbers: factors, offsets.
class Differences {
 public:
  static constexpr int64_t kBlock = kTilesTogether * (kTile - 2);  // differences take registers

  explicit Differences(const Mixture& a) : a_(a) {}

  int64_t panel_floats() const { return (a_.features + 1) * kPanel; }
  int64_t block_floats() const { return kTilesTogether * tile_floats(); }

  void turn(int64_t first, int64_t count, float* to) const {
    turn_points(a_, first, count, to);
    read_factors(a_, first, count, to + a_.features * kPanel);
  }

  void pack(int64_t first, int64_t count, float* to) const {
    for (int64_t tile = 0; tile < count; tile += kPositions, to += tile_floats()) {
      const int64_t number = count - tile < kPositions ? count - tile : kPositions;
      turn_rows(a_.y, a_.middle, a_.features, first + tile, number, kTileRow, kTileRow, to);
      float* more = to + a_.features * kTileRow;
      for (int64_t m = 0; m < number; ++m) {
        more[m] = 0.5f * factor(first + tile + m);
        more[kTileRow + m] = in_units_of_log2(*a_.offset_of(first + tile + m));
      }
    }
  }

  void scores(const float* panel, const float* block, int64_t count, float* to, float* most) const {
    const float* rows = to;
    for (int64_t tile = 0; tile < count; tile += kPositions, block += tile_floats(), to += kPositions * kPanel)
      with_positions<kPositions>(count - tile < kPositions ? count - tile : kPositions, [&](auto number) {
        const float* more = block + a_.features * kTileRow;
        tile_differences<number()>(block, panel, a_.features, more, more + kTileRow, panel + a_.features * kPanel, to);
      });
    find_most(rows, count, most);
  }

  void dots(const float* vectors, const float* block, int64_t count, float* to) const {
    for (int64_t tile = 0; tile < count; tile += kPositions, block += tile_floats(), to += kPositions * kPanel)
      ::dgm::DGM_ISA_NAMESPACE::scores<Single>(block, count - tile < kPositions ? count - tile : kPositions, vectors,
                                               a_.features, 1.0f, to);
  }
  static constexpr float kVectorFactor = 1.0f;

  void missing(const float*, float* to) const { std::memset(to, 0, kPanel * sizeof(float)); }

  float factor(int64_t m) const {
    const float inv = a_.inv[m * a_.inv_stride];
    return inv * inv * kLog2E;
  }

 private:
  static constexpr int kPositions = kTile - 2;
  int64_t tile_floats() const { return (a_.features + 2) * kTileRow; }

  const Mixture& a_;
};

// ---- A diagonal a component: the squares of s x - s y, two operations a number like the two products of the expanded
// square, which would lose digits.

constexpr int kDiagonalTile = kTile - 2;

template <int kPositions>
DGM_NOINLINE void tile_diagonals(const float* pairs, const float* x, int64_t features, const float* offsets,
                                 float* to) {
  Sums<kPositions> sums = {};
  for (int64_t d = 0; d < features; ++d, pairs += 2 * kTileRow, x += kPanel) {
    const F32 low = load(x), high = load(x + kWidth);
    DGM_UNROLL
    for (int m = 0; m < kPositions; ++m) {
      const F32 s = pairs[m] - F32{}, shift = pairs[kTileRow + m] - F32{};
      const F32 a = low * s - shift, b = high * s - shift;
      sums[m][0] += a * a, sums[m][1] += b * b;
    }
  }
  DGM_UNROLL
  for (int m = 0; m < kPositions; ++m)
    for (int half = 0; half < 2; ++half) store(to + m * kPanel + half * kWidth, offsets[m] - sums[m][half]);
}

// A tile is [features][2][kTileRow], then offsets.
class Diagonals {
 public:
  static constexpr int64_t kBlock = kTilesTogether * kDiagonalTile;

  explicit Diagonals(const Mixture& a) : a_(a) {}

  int64_t panel_floats() const { return a_.features * kPanel; }
  int64_t block_floats() const { return kTilesTogether * tile_floats(); }
  void turn(int64_t first, int64_t count, float* to) const { turn_points(a_, first, count, to); }

  void pack(int64_t first, int64_t count, float* to) const {
    for (int64_t tile = 0; tile < count; tile += kDiagonalTile, to += tile_floats()) {
      const int64_t number = count - tile < kDiagonalTile ? count - tile : kDiagonalTile;
      for (int64_t m = 0; m < number; ++m) {
        const int64_t row = (first + tile + m) * a_.features;
        for (int64_t d = 0; d < a_.features; ++d) {
          const float s = a_.inv[row + d] * kRootHalfLog2E;
          to[2 * d * kTileRow + m] = s;
          to[(2 * d + 1) * kTileRow + m] = (a_.y[row + d] - a_.middle[d]) * s;
        }
        to[2 * a_.features * kTileRow + m] = in_units_of_log2(*a_.offset_of(first + tile + m));
      }
    }
  }

  void scores(const float* panel, const float* block, int64_t count, float* to, float* most) const {
    const float* rows = to;
    for (int64_t tile = 0; tile < count; tile += kDiagonalTile, block += tile_floats(), to += kDiagonalTile * kPanel)
      with_positions<kDiagonalTile>(count - tile < kDiagonalTile ? count - tile : kDiagonalTile, [&](auto number) {
        tile_diagonals<number()>(block, panel, a_.features, block + 2 * a_.features * kTileRow, to);
      });
    find_most(rows, count, most);
  }

  void missing(const float*, float* to) const { std::memset(to, 0, kPanel * sizeof(float)); }

 private:
  int64_t tile_floats() const { return (2 * a_.features + 1) * kTileRow; }

  const Mixture& a_;
};

// ---- A lower triangular matrix a component: z = A (x - y), row by row as far as the triangle goes.

// The products of kPositions rows of A, from row `begin` of it, with the differences; `z` gets them if it is wanted.
template <int kPositions>
DGM_NOINLINE void tile_triangles(const float* rows, const float* t, int64_t depth, F32 (&squares)[2], float* z) {
  Sums<kPositions> sums = {};
  accumulate<Single, 1>(rows, kTileRow, t, kPanel, depth, sums);
  DGM_UNROLL
  for (int m = 0; m < kPositions; ++m)
    for (int half = 0; half < 2; ++half) {
      squares[half] += sums[m][half] * sums[m][half];
      if (z) store(z + m * kPanel + half * kWidth, sums[m][half]);
    }
}

// A component is its mean, its offset, and for every kTile rows of A their [columns][kTileRow] numbers.
class Triangles {
 public:
  static constexpr int64_t kBlock = 8;

  explicit Triangles(const Mixture& a) : a_(a), component_(whole_vectors(a.features) + 16) {
    for (int64_t row = 0; row < a.features; row += kTile) component_ += last(row) * kTileRow;
  }

  int64_t panel_floats() const { return 2 * a_.features * kPanel; }
  int64_t block_floats() const { return kBlock * component_; }
  int64_t component_floats() const { return component_; }
  void turn(int64_t first, int64_t count, float* to) const { turn_points(a_, first, count, to); }

  void pack(int64_t first, int64_t count, float* to) const {
    for (int64_t m = first; m < first + count; ++m, to += component_) {
      for (int64_t d = 0; d < a_.features; ++d) to[d] = a_.y[m * a_.features + d] - a_.middle[d];
      float* at = to + whole_vectors(a_.features);
      *at = in_units_of_log2(*a_.offset_of(m));
      at += 16;
      for (int64_t row = 0; row < a_.features; row += kTile) {
        for (int64_t i = row; i < last(row); ++i)
          for (int64_t d = 0; d < last(row); ++d)
            at[d * kTileRow + i - row] =
                d <= i ? a_.inv[(m * a_.features + i) * a_.features + d] * kRootHalfLog2E : 0.0f;
        at += last(row) * kTileRow;
      }
    }
  }

  // x - y of a panel, [features][kPanel].
  void differences(const float* panel, const float* component, float* to) const {
    for (int64_t d = 0; d < a_.features; ++d)
      for (int half = 0; half < 2; ++half) {
        const int64_t at = d * kPanel + half * kWidth;
        store(to + at, load(panel + at) - component[d]);
      }
  }

  // The scores of one component; `z`, if it is wanted, gets A t in units of sqrt(log 2), [features][kPanel].
  void score(const float* t, const float* component, float* to, float* z) const {
    F32 squares[2] = {};
    const float* at = component + whole_vectors(a_.features);
    const float offset = *at;
    at += 16;
    for (int64_t row = 0; row < a_.features; row += kTile) {
      with_positions(last(row) - row, [&](auto number) {
        tile_triangles<number()>(at, t, last(row), squares, z ? z + row * kPanel : nullptr);
      });
      at += last(row) * kTileRow;
    }
    for (int half = 0; half < 2; ++half) store(to + half * kWidth, offset - squares[half]);
  }

  void scores(float* panel, const float* block, int64_t count, float* to, float* most) const {
    float* t = panel + a_.features * kPanel;
    for (int64_t m = 0; m < count; ++m) {
      differences(panel, block + m * component_, t);
      score(t, block + m * component_, to + m * kPanel, nullptr);
    }
    find_most(to, count, most);
  }

  void missing(const float*, float* to) const { std::memset(to, 0, kPanel * sizeof(float)); }

 private:
  // The row behind the last one of the tile that begins at `row`; as many columns are not zero.
  int64_t last(int64_t row) const { return row + kTile < a_.features ? row + kTile : a_.features; }

  const Mixture& a_;
  int64_t component_;
};

// ---- Plain products x.y, of kernels that are no function of the distance.

class Dots {
 public:
  static constexpr int64_t kBlock = kBlockKeys;

  explicit Dots(const Mixture& a) : a_(a) {}

  int64_t panel_floats() const { return a_.features * kPanel; }
  int64_t block_floats() const { return kTilesTogether * a_.features * kTileRow; }
  void turn(int64_t first, int64_t count, float* to) const { turn_points(a_, first, count, to); }

  void pack(int64_t first, int64_t count, float* to) const {
    for (int64_t tile = 0; tile < count; tile += kTile, to += a_.features * kTileRow)
      turn_rows(a_.y, a_.middle, a_.features, first + tile, count - tile < kTile ? count - tile : kTile, kTileRow,
                kTileRow, to);
  }

  void scores(const float* panel, const float* block, int64_t count, float* to, float*) const {
    for (int64_t tile = 0; tile < count; tile += kTile, block += a_.features * kTileRow, to += kTile * kPanel)
      ::dgm::DGM_ISA_NAMESPACE::scores<Single>(block, count - tile < kTile ? count - tile : kTile, panel, a_.features,
                                               1.0f, to);
  }

  void missing(const float*, float* to) const { std::memset(to, 0, kPanel * sizeof(float)); }

 private:
  const Mixture& a_;
};

// Calls `call` with the scorer of the mixture's form, which is not Dots.
template <class Call>
DGM_INLINE void with_scorer(const Mixture& a, const Call& call) {
  switch (a.form) {
    case Form::Products:
      return call(Products(a));
    case Form::Differences:
      return call(Differences(a));
    case Form::Diagonals:
      return call(Diagonals(a));
    default:
      return call(Triangles(a));
  }
}

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::density
