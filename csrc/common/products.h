// Products of panels of queries and tiles of keys, what two ops share: in float32 and, of bfloat16, in pairs.
#pragma once

#include "common/elementary.h"
#include "common/panel.h"

namespace dgm {
namespace DGM_ISA_NAMESPACE {
namespace {

constexpr int64_t kTilesTogether = 8;  // of keys, between two updates of the greatest score
constexpr int64_t kBlockKeys = kTilesTogether * kTile;

DGM_INLINE int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

DGM_INLINE int64_t whole_vectors(int64_t count) { return ceil_divide(count, kWidth) * kWidth; }

// A thread's memory in pieces.
class Scratch {
 public:
  explicit Scratch(float* memory) : next_(memory) {}
  DGM_INLINE_METHOD float* take(int64_t count) {
    float* piece = next_;
    next_ += ceil_divide(count, 16) * 16;
    return piece;
  }
  int64_t taken(const float* memory) const { return next_ - memory; }

 private:
  float* next_;
};

// One lane is one float.
struct Single {
  static constexpr bool kPairs = false;
  static DGM_INLINE_METHOD F32 multiply_add(F32 x, F32 w, F32 sum) { return x * w + sum; }
};

#if defined(__AVX512BF16__)
// One lane is two bfloat16 numbers, whose products are added to one float32 sum.
struct Pair {
  static constexpr bool kPairs = true;
  static DGM_INLINE_METHOD F32 multiply_add(F32 x, F32 w, F32 sum) {
    return reinterpret_cast<F32>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w)));
  }
};

// Two vectors as one of pairs: lane i of both (`low` in the lower half).
DGM_INLINE F32 pair_lanes(F32 low, F32 high) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512bh both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low));
  const __m512i order = load_unaligned<__m512i>(kOrder);
  return reinterpret_cast<F32>(_mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(both)));
}

// Two vectors, one after the other, as one of pairs of neighbours.
DGM_INLINE F32 pair_neighbours(F32 first, F32 second) {
  return reinterpret_cast<F32>(_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first)));
}
#else
using Pair = Single;
DGM_INLINE F32 pair_lanes(F32 low, F32) { return low; }
DGM_INLINE F32 pair_neighbours(F32 first, F32) { return first; }
#endif

// Lanes of a contraction over `count` numbers.
template <class Lane>
DGM_INLINE int64_t depth_of(int64_t count) {
  return Lane::kPairs ? (count + 1) / 2 : count;
}

template <int kPositions, int kVectors = 2>
using Sums = F32[kPositions][kVectors];

// sums[m] += over k of data[k * stride + m * kApart] * weights[k * weight_stride ...], two vectors (or one) of them.
template <class Lane, int kApart, int kPositions, int kVectors>
DGM_INLINE void accumulate(const float* data, int64_t stride, const float* weights, int64_t weight_stride,
                           int64_t count, Sums<kPositions, kVectors>& sums) {
  for (; count > 0; --count, data += stride, weights += weight_stride) {
    F32 w[kVectors];
    DGM_UNROLL
    for (int i = 0; i < kVectors; ++i) w[i] = load(weights + i * kWidth);
    DGM_UNROLL
    for (int m = 0; m < kPositions; ++m) {
      const F32 x = data[m * kApart] - F32{};  // a broadcast; adding 0 would cost an addition, for -0
      DGM_UNROLL
      for (int i = 0; i < kVectors; ++i) sums[m][i] = Lane::multiply_add(x, w[i], sums[m][i]);
    }
  }
}

// A tile of keys times a panel of queries: `to` gets a row of kPanel scores for each key; `largest`, where it is
// wanted, the greatest of every query.
template <class Lane, int kPositions>
DGM_NOINLINE void tile_scores(const float* keys, const float* queries, int64_t depth, float factor, float* to,
                              float* largest) {
  Sums<kPositions> sums = {};
  accumulate<Lane, 1>(keys, kTileRow, queries, kPanel, depth, sums);
  if constexpr (Lane::kPairs) DGM_UNROLL for (auto& row : sums) for (F32& v : row) v *= factor;
  DGM_UNROLL
  for (int m = 0; m < kPositions; ++m)
    for (int half = 0; half < 2; ++half) store(to + m * kPanel + half * kWidth, sums[m][half]);
  if (!largest) return;
  DGM_UNROLL
  for (int half = 0; half < 2; ++half) {
    F32 most = load(largest + half * kWidth);
    DGM_UNROLL
    for (int m = 0; m < kPositions; ++m) most = larger(sums[m][half], most);
    store(largest + half * kWidth, most);
  }
}

template <class Lane>
DGM_INLINE void scores(const float* keys, int64_t positions, const float* queries, int64_t depth, float factor,
                       float* to, float* largest = nullptr) {
  with_positions(positions,
                 [&](auto number) { tile_scores<Lane, number()>(keys, queries, depth, factor, to, largest); });
}

// The directional derivative of a tile of scores: keys times tangents of queries plus tangents of keys times queries.
template <int kPositions>
DGM_NOINLINE void tile_tangents(const float* keys, const float* tangent_keys, const float* queries,
                                const float* tangent_queries, int64_t depth, float* to) {
  Sums<kPositions> sums = {};
  accumulate<Single, 1>(keys, kTileRow, tangent_queries, kPanel, depth, sums);
  accumulate<Single, 1>(tangent_keys, kTileRow, queries, kPanel, depth, sums);
  DGM_UNROLL
  for (int m = 0; m < kPositions; ++m)
    for (int half = 0; half < 2; ++half) store(to + m * kPanel + half * kWidth, sums[m][half]);
}

// A run of keys that are seen: rows of values (or of keys) and, at the same keys, rows of kPanel weights.
struct Run {
  const float* rows;
  const float* weights;
  int64_t depth;
};

// out[feature] = out[feature] * factors + over runs and keys of rows[key][feature] * weights[key], kPositions features.
template <class Lane, int kPositions>
DGM_NOINLINE void tile_sums(const Run* runs, int64_t number, int64_t feature, int64_t row, const float* factors,
                            float* out) {
  Sums<kPositions> sums = {};
  for (const Run* run = runs; run != runs + number; ++run)
    accumulate<Lane, 1>(run->rows + feature, row, run->weights, kPanel, run->depth, sums);
  DGM_UNROLL
  for (int m = 0; m < kPositions; ++m)
    for (int half = 0; half < 2; ++half) {
      float* to = out + (feature + m) * kPanel + half * kWidth;
      const F32 before = load(to);
      store(to, sums[m][half] + (factors ? before * load(factors + half * kWidth) : before));
    }
}

// The same for all features; `row` is the distance of the rows, `factors` is null for 1.
template <class Lane>
DGM_INLINE void weighted_sums(const Run* runs, int64_t number, int64_t features, int64_t row, const float* factors,
                              float* out) {
  const Pieces pieces(features);
  for (int64_t piece = 0; piece < pieces.number; ++piece)
    with_positions(pieces.length(piece), [&](auto positions) {
      tile_sums<Lane, positions()>(runs, number, pieces.begin(piece), row, factors, out);
    });
}

// out[key][feature] += over the queries of a panel of weights[key][query] * rows[query][feature]; lanes of the weights
// and of the rows are queries, or pairs of them.
template <class Lane, int kPositions, int kVectors>
DGM_NOINLINE void tile_outer(const float* weights, const float* rows, int64_t row, float* out) {
  constexpr int kDepth = Lane::kPairs ? kPanel / 2 : kPanel;
  Sums<kPositions, kVectors> sums = {};
  accumulate<Lane, kDepth>(weights, 1, rows, row, kDepth, sums);
  DGM_UNROLL
  for (int m = 0; m < kPositions; ++m)
    for (int i = 0; i < kVectors; ++i) store(out + m * row + i * kWidth, load(out + m * row + i * kWidth) + sums[m][i]);
}

// The same for all features; `row`, the distance of the rows of `rows` and of `out`, is a multiple of kWidth.
template <class Lane>
DGM_INLINE void outer_sums(const float* weights, int64_t positions, const float* rows, int64_t row, float* out) {
  with_positions(positions, [&](auto number) {
    int64_t feature = 0;
    for (; feature + kPanel <= row; feature += kPanel)
      tile_outer<Lane, number(), 2>(weights, rows + feature, row, out + feature);
    if (feature < row) tile_outer<Lane, number(), 1>(weights, rows + feature, row, out + feature);
  });
}

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm
