// Rows of queries, keys and values, brought to the form that the inner loop reads, and results back to rows.
#pragma once

#include "attention/plan.h"

namespace dgm::attention {
namespace DGM_ISA_NAMESPACE {
namespace {

// Unit `index` of `units` in an order that puts light and heavy ones of a causal mask side by side, so that threads,
// each of which takes a range, have as much to do.
DGM_INLINE int64_t folded(int64_t index, int64_t units) { return index % 2 ? units - 1 - index / 2 : index / 2; }

DGM_INLINE const char* row_at(const Rows& x, int64_t batch, int64_t head, int64_t row) {
  return static_cast<const char*>(x.data) + (batch * x.batch + head * x.head + row * x.row) * element_size(x.dtype);
}

// Asks for the row that will be read some rows later: the processor's own prefetching ends with every page, 16 rows of
// 64 floats.
DGM_INLINE void ask_ahead(const Rows& x, const char* row, int64_t features) {
  constexpr int64_t kRowsAhead = 32;
  const char* ahead = row + kRowsAhead * x.row * element_size(x.dtype);
  for (int64_t byte = 0; byte < features * element_size(x.dtype); byte += 64) __builtin_prefetch(ahead + byte);
}

// Turns pairs of features by the angles of a position; by their opposites, for gradients, if `back`.
DGM_NOINLINE void rotate(const RopeArgs& rope, int64_t position, bool back, float* x) {
  const float* table = rope.table + position * rope.pairs * 2;
  for (int64_t r = 0; r < rope.pairs; ++r) {
    const int64_t first = rope.interleaved ? 2 * r : r, second = rope.interleaved ? 2 * r + 1 : r + rope.pairs;
    const float a = x[first], b = x[second], c = table[2 * r], s = back ? -table[2 * r + 1] : table[2 * r + 1];
    x[first] = a * c - b * s, x[second] = a * s + b * c;
  }
}

// A row as floats, zeros up to a whole vector; rotated where there is a rope.
DGM_INLINE void read_row(const Rows& x, const char* from, int64_t features, const RopeArgs& rope, int64_t position,
                         float* to) {
  convert_to_floats(from, x.dtype, features, to);
  if (!rope.table) return;
  rotate(rope, position, false, to);
  if (!rope.rounds) return;
  alignas(64) uint16_t rounded[kMaxFeatures + kWidth];
  convert_from_floats(to, features, DType::BFloat16, reinterpret_cast<char*>(rounded));
  convert_to_floats(reinterpret_cast<const char*>(rounded), DType::BFloat16, features, to);
}

// A row of bfloat16 as pairs, zeros up to a whole vector.
DGM_INLINE void read_pairs(const Rows& x, const char* from, int64_t features, const RopeArgs& rope, int64_t position,
                           float* to) {
  const int64_t pairs = (features + 1) / 2, last = features / 2;  // an odd one is in the last pair
  std::memset(to + last, 0, (whole_vectors(pairs) - last) * sizeof(float));
  if (!rope.table) {
    std::memcpy(to, from, features * sizeof(uint16_t));
    return;
  }
  alignas(64) float wide[kMaxFeatures + kWidth];
  read_row(x, from, features, rope, position, wide);
  convert_from_floats(wide, features, DType::BFloat16, reinterpret_cast<char*>(to));
}

// A row's lanes, whole vectors of them: where they lie if the tensor holds them so, else in `copy`.
template <class Lane>
DGM_INLINE const float* lanes_of(const Rows& x, const char* from, int64_t features, const RopeArgs& rope,
                                 int64_t position, float* copy) {
  if constexpr (Lane::kPairs) {
    if (features % (2 * kWidth) == 0 && !rope.table) return reinterpret_cast<const float*>(from);
    read_pairs(x, from, features, rope, position, copy);
  } else {
    if (x.dtype == DType::Float32 && features % kWidth == 0 && !rope.table) return reinterpret_cast<const float*>(from);
    read_row(x, from, features, rope, position, copy);
  }
  return copy;
}

// `count` rows turned: lane d of row n to `to[d * stride + n]`. Rows up to `rows`, a multiple of four, are zero.
template <class Lane>
DGM_NOINLINE void turn_rows(const Rows& x, int64_t batch, int64_t head, const Places& places, int64_t count,
                            int64_t rows, int64_t features, const RopeArgs& rope, int64_t position, float factor,
                            int64_t stride, float* to) {
  alignas(64) float copies[4][kMaxFeatures + kWidth];
  const int64_t depth = depth_of<Lane>(features);
  for (int64_t n = 0; n < rows; n += 4) {
    const float* four[4];
    for (int64_t r = 0; r < 4; ++r) {
      four[r] = copies[r];
      if (n + r >= count) {
        std::memset(copies[r], 0, whole_vectors(depth) * sizeof(float));
        continue;
      }
      const int64_t place = places[n + r];
      const char* from = row_at(x, batch, head, place);
      ask_ahead(x, from, features);
      four[r] = lanes_of<Lane>(x, from, features, rope, position + place, copies[r]);
    }
    for (int64_t d = 0; d < depth; d += kWidth) {
      F32 v[4] = {load(four[0] + d), load(four[1] + d), load(four[2] + d), load(four[3] + d)};
      if constexpr (!Lane::kPairs) DGM_UNROLL for (int r = 0; r < 4; ++r) v[r] *= factor;
      store_turned(v, depth - d, to + d * stride + n, stride);
    }
  }
}

// Tiles [begin, end) of a head's keys, or values, as [tile][lane][kTileRow].
template <class Lane>
DGM_NOINLINE void make_tiles(const Rows& x, int64_t batch, int64_t head, const Tiling& tiling, int64_t begin,
                             int64_t end, int64_t features, const RopeArgs& rope, float* to) {
  for (int64_t index = begin; index < end; ++index, to += depth_of<Lane>(features) * kTileRow) {
    const KeyTile tile = tiling[index];
    turn_rows<Lane>(x, batch, head, {nullptr, tile.key}, tile.count, kTileRow, features, rope, 0, 1.0f, kTileRow, to);
  }
}

// Rows [begin, end) of a head as floats, `row` floats apart: the tensor's own memory if that is what it holds, else
// `to`, with zeros behind the features.
DGM_NOINLINE const float* dense_rows(const Rows& x, int64_t batch, int64_t head, int64_t begin, int64_t end,
                                     int64_t features, const RopeArgs& rope, int64_t row, float* to) {
  if (x.dtype == DType::Float32 && x.row == row && row == features && !rope.table)
    return reinterpret_cast<const float*>(row_at(x, batch, head, begin));
  alignas(64) float wide[kMaxFeatures + kWidth];
  for (int64_t n = begin; n < end; ++n) {
    const char* from = row_at(x, batch, head, n);
    float* dense = to + (n - begin) * row;
    std::memcpy(dense, lanes_of<Single>(x, from, features, rope, n, wide), features * sizeof(float));
    std::memset(dense + features, 0, (row - features) * sizeof(float));
  }
  return to;
}

// Two rows of bfloat16 as pairs of numbers at the same feature; without a second row its half is zero.
DGM_INLINE void pair_rows(const Rows& x, int64_t batch, int64_t head, int64_t first, int64_t second, int64_t features,
                          const RopeArgs& rope, int64_t position, float* to) {
  alignas(64) float copies[2][kMaxFeatures + kWidth];
  const auto row = [&](int64_t place, float* copy) {
    const char* from = row_at(x, batch, head, place);
    if (!rope.table) return reinterpret_cast<const uint16_t*>(from);
    read_pairs(x, from, features, rope, position + place, copy);
    return reinterpret_cast<const uint16_t*>(copy);
  };
  const uint16_t *low = row(first, copies[0]), *high = second < 0 ? low : row(second, copies[1]);
  const uint32_t kept = second < 0 ? 0 : 0xFFFF0000u;
  uint32_t* pairs = reinterpret_cast<uint32_t*>(to);
  for (int64_t d = 0; d < features; ++d) pairs[d] = low[d] | (static_cast<uint32_t>(high[d]) << 16 & kept);
}

// Tiles [begin, end) of keys, or values, of bfloat16, as pairs of neighbouring keys: [tile][keys / 2][features].
DGM_NOINLINE void make_pairs(const Rows& x, int64_t batch, int64_t head, const Tiling& tiling, int64_t begin,
                             int64_t end, int64_t features, const RopeArgs& rope, float* to) {
  for (int64_t index = begin; index < end; ++index, to += kTile / 2 * features) {
    const KeyTile tile = tiling[index];
    for (int64_t n = 0; n < tile.count; n += 2) {
      const int64_t first = tile.key + n, second = n + 1 < tile.count ? first + 1 : -1;
      pair_rows(x, batch, head, first, second, features, rope, 0, to + n / 2 * features);
    }
  }
}

DGM_INLINE char* row_at(const OutputRows& x, int64_t batch, int64_t head, int64_t row) {
  return static_cast<char*>(x.data) + (batch * x.batch + head * x.head + row * x.row) * element_size(x.dtype);
}

// Panel [features][kPanel] to rows: query n gets its features times `factors[n]`, turned back by its position. Of the
// panel whole vectors of features are read.
DGM_NOINLINE void write_panel(const float* sums, const Panel& panel, int64_t features, const float* factors,
                              const RopeArgs& rope, int64_t position, const OutputRows& out, int64_t batch,
                              int64_t head) {
  alignas(64) float copies[4][kMaxFeatures + kWidth];
  const bool direct = out.dtype == DType::Float32 && features % kWidth == 0 && !rope.table;
  for (int64_t n = 0; n < panel.count; n += 4) {
    const int64_t some = panel.count - n < 4 ? panel.count - n : 4;
    float* rows[4];
    for (int64_t r = 0; r < 4; ++r)
      rows[r] = direct && r < some ? reinterpret_cast<float*>(row_at(out, batch, head, panel.query[n + r])) : copies[r];
    for (int64_t d = 0; d < features; d += kWidth) {
      F32 v[4];  // vector j: queries n .. n + 3 of features d + j, d + j + 4, ...
      DGM_UNROLL
      for (int j = 0; j < 4; ++j) v[j] = load_quads(sums + (d + j) * kPanel + n, 4 * kPanel);
      transpose4(v);
      DGM_UNROLL
      for (int r = 0; r < 4; ++r) store(rows[r] + d, v[r] * factors[n + r]);
    }
    for (int64_t r = 0; r < some && !direct; ++r) {
      const int64_t query = panel.query[n + r];
      if (rope.table) rotate(rope, position + query, true, rows[r]);
      convert_from_floats(rows[r], features, out.dtype, row_at(out, batch, head, query));
    }
  }
}

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::attention
