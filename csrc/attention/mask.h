// Which keys a panel of queries sees, and what masks and biases do to a tile of scores.
#pragma once

#include "attention/plan.h"

namespace dgm::attention {
namespace DGM_ISA_NAMESPACE {
namespace {

enum class Sight { None, Part, All };

DGM_INLINE I32 broadcast_int(int32_t value) { return I32{} + value; }

DGM_INLINE I32 absolute(I32 x) { return x < 0 ? -x : x; }

// The queries of a panel, one a lane; those beyond the last one are like it.
class Lanes {
 public:
  Lanes() = default;
  Lanes(const MaskArgs& mask, const Panel& panel, int64_t keys) : width_(mask.width), radius_(mask.radius) {
    alignas(64) int32_t begin[kPanel], end[kPanel], position[kPanel], column[kPanel];
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const int64_t query = panel.query[lane < panel.count ? lane : panel.count - 1];
      begin[lane] = mask.bounds ? mask.bounds[2 * query] : 0;
      end[lane] = mask.bounds ? mask.bounds[2 * query + 1] : static_cast<int32_t>(keys);
      position[lane] = static_cast<int32_t>(mask.first + query);
      column[lane] = mask.width ? position[lane] % mask.width : 0;
      extend(lane == 0, begin[lane], end[lane], column[lane]);
    }
    for (int half = 0; half < 2; ++half) {
      begin_[half] = load_unaligned<I32>(begin + half * kWidth), end_[half] = load_unaligned<I32>(end + half * kWidth);
      position_[half] = load_unaligned<I32>(position + half * kWidth);
      column_[half] = load_unaligned<I32>(column + half * kWidth);
    }
  }

  // Keys that any query sees are in [first_key, last_key).
  int64_t first_key() const { return least_begin_; }
  int64_t last_key() const { return most_end_; }

  // How much of the keys [key, key + count) the queries see.
  DGM_INLINE_METHOD Sight sight(int64_t key, int64_t count) const {
    const int64_t last = key + count;
    if (key >= most_end_ || last <= least_begin_) return Sight::None;
    const bool inside = key >= most_begin_ && last <= least_end_;
    if (!width_) return inside ? Sight::All : Sight::Part;
    const int64_t left = key % width_, right = (last - 1) % width_;
    const bool one_row = key / width_ == (last - 1) / width_;
    if (!one_row) return Sight::Part;
    if (left > most_column_ + radius_ || right < least_column_ - radius_) return Sight::None;
    const bool near = most_column_ - left <= radius_ && right - least_column_ <= radius_;
    return inside && near ? Sight::All : Sight::Part;
  }

  // Scores of the keys [key, key + count) that are not seen become minus infinity.
  void hide(int64_t key, int64_t count, float* scores) const {
    for (int64_t n = 0; n < count; ++n)
      for (int half = 0; half < 2; ++half) {
        const I32 j = broadcast_int(static_cast<int32_t>(key + n));
        I32 seen = (j >= begin_[half]) & (j < end_[half]);
        if (width_) {
          const I32 column = broadcast_int(static_cast<int32_t>((key + n) % width_));
          seen &= absolute(column - column_[half]) <= radius_;
        }
        float* to = scores + n * kPanel + half * kWidth;
        store(to, seen ? load(to) : broadcast_float(kMinusInfinity));
      }
  }

  // ALiBi: the scores fall by `slope` for each position between query and key.
  void add_distances(float slope, int64_t key, int64_t count, float* scores) const {
    for (int64_t n = 0; n < count; ++n)
      for (int half = 0; half < 2; ++half) {
        float* to = scores + n * kPanel + half * kWidth;
        const I32 distance = absolute(position_[half] - static_cast<int32_t>(key + n));
        store(to, load(to) - to_float(distance) * slope);
      }
  }

 private:
  void extend(bool is_first, int64_t begin, int64_t end, int64_t column) {
    if (is_first) {
      least_begin_ = most_begin_ = begin, least_end_ = most_end_ = end, least_column_ = most_column_ = column;
      return;
    }
    if (begin < least_begin_) least_begin_ = begin;
    if (begin > most_begin_) most_begin_ = begin;
    if (end < least_end_) least_end_ = end;
    if (end > most_end_) most_end_ = end;
    if (column < least_column_) least_column_ = column;
    if (column > most_column_) most_column_ = column;
  }

  int32_t width_ = 0, radius_ = 0;
  I32 begin_[2], end_[2], position_[2], column_[2];
  int64_t least_begin_ = 0, most_begin_ = 0, least_end_ = 0, most_end_ = 0, least_column_ = 0, most_column_ = 0;
};

// The part of a matrix [queries, keys] for a panel and a tile, as floats, a row of kPanel for each key.
DGM_NOINLINE void turn_scores(const Scores& x, int64_t batch, int64_t head, const Panel& panel, const KeyTile& tile,
                              float* to) {
  alignas(64) float rows[kPanel][kTileRow + kWidth];
  const int64_t bytes = element_size(x.dtype);
  const char* from = static_cast<const char*>(x.data) + (batch * x.batch + head * x.head + tile.key * x.key) * bytes;
  for (int64_t lane = 0; lane < kPanel; ++lane) {
    const char* row = from + panel.query[lane < panel.count ? lane : panel.count - 1] * x.query * bytes;
    if (x.key == 1) {
      convert_to_floats(row, x.dtype, tile.count, rows[lane]);
      continue;
    }
    for (int64_t n = 0; n < tile.count; ++n) {
      alignas(64) float one[kWidth];
      convert_to_floats(row + n * x.key * bytes, x.dtype, 1, one);
      rows[lane][n] = one[0];
    }
  }
  for (int64_t lane = 0; lane < kPanel; lane += kWidth)
    for (int64_t n = 0; n < tile.count; n += 4) {
      constexpr int64_t kRow = kTileRow + kWidth;
      F32 v[4];  // vector j: keys n .. n + 3 of queries j, j + 4, ...
      DGM_UNROLL
      for (int j = 0; j < 4; ++j) v[j] = load_quads(rows[lane + j] + n, 4 * kRow);
      transpose4(v);
      for (int64_t j = 0; j < 4 && n + j < tile.count; ++j) store(to + (n + j) * kPanel + lane, v[j]);
    }
}

// A bias in units of log 2. What is finite stays so: where it is the smallest number for all keys, the result is the
// mean of all values. The backward pass has the probabilities from lse, of which a float has too few digits there.
DGM_INLINE F32 in_logs_of_two(F32 bias) {
  const F32 scaled = at_least(bias * kLog2E, -1e38f);
  return bias == kMinusInfinity ? bias : scaled;
}

// Whether a mask or a bias is read for every score.
DGM_INLINE bool adjusts_all(const MaskArgs& mask) { return mask.slopes || mask.bias.data || mask.keep.data; }

// Applies everything that masks or adds to the scores of a tile, in units of log 2.
DGM_NOINLINE void adjust(const MaskArgs& mask, const Lanes& lanes, Sight sight, int64_t batch, int64_t head,
                         const Panel& panel, const KeyTile& tile, float* scores) {
  alignas(64) float other[kTile * kPanel];
  if (mask.slopes) lanes.add_distances(mask.slopes[head] * kLog2E, tile.key, tile.count, scores);
  if (mask.bias.data) {
    turn_scores(mask.bias, batch, head, panel, tile, other);
    for (int64_t i = 0; i < tile.count * kPanel; i += kWidth)
      store(scores + i, in_logs_of_two(load(other + i)) + load(scores + i));
  }
  if (mask.keep.data) {
    turn_scores(mask.keep, batch, head, panel, tile, other);
    for (int64_t i = 0; i < tile.count * kPanel; i += kWidth)
      store(scores + i, load(other + i) != 0.0f ? load(scores + i) : broadcast_float(kMinusInfinity));
  }
  if (sight == Sight::Part) lanes.hide(tile.key, tile.count, scores);
}

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::attention
