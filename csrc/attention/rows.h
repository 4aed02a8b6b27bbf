// Rows of queries, keys and values, brought to the form that the inner loop reads, and results back to rows.
#pragma once

#include "attention/args.h"
#include "attention/products.h"

namespace dgm::attention {
namespace DGM_ISA_NAMESPACE {
namespace {

constexpr int64_t kMaxFeatures = 1024;  // of a row in a buffer; launch.cpp refuses more

DGM_INLINE int64_t panels_of(int64_t queries) { return ceil_divide(queries, kPanel); }

// Memory for a thread, in pieces.
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

// Rows of a panel, of which the last one may have fewer.
DGM_INLINE int64_t rows_in(int64_t panel, int64_t rows) {
  const int64_t left = rows - panel * kPanel;
  return left < kPanel ? left : kPanel;
}

// Unit `index` of `units` in an order that puts light and heavy ones of a causal mask side by side, so that threads,
// each of which takes a range, have as much to do.
DGM_INLINE int64_t folded(int64_t index, int64_t units) { return index % 2 ? units - 1 - index / 2 : index / 2; }

DGM_INLINE int64_t whole_vectors(int64_t count) { return ceil_divide(count, kWidth) * kWidth; }

DGM_INLINE const char* row_at(const Rows& x, int64_t batch, int64_t head, int64_t row) {
  return static_cast<const char*>(x.data) + (batch * x.batch + head * x.head + row * x.row) * element_size(x.dtype);
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
  for (int64_t i = 0; i < features; i += kBlock)
    convert_to_floats(from + i * element_size(x.dtype), x.dtype, features - i < kBlock ? features - i : kBlock, to + i);
  if (rope.table) rotate(rope, position, false, to);
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

// Rows [first, first + count) turned: lane d of row n to `to[d * stride + n]`. Rows up to `rows`, a multiple of four,
// are zero.
template <class Lane>
DGM_NOINLINE void turn_rows(const Rows& x, int64_t batch, int64_t head, int64_t first, int64_t count, int64_t rows,
                            int64_t features, const RopeArgs& rope, int64_t position, float factor, int64_t stride,
                            float* to) {
  alignas(64) float copies[4][kMaxFeatures + kWidth];
  const int64_t depth = depth_of<Lane>(features);
  for (int64_t n = 0; n < rows; n += 4) {
    const float* four[4];
    for (int64_t r = 0; r < 4; ++r) {
      const char* from = row_at(x, batch, head, first + n + r);
      four[r] = copies[r];
      if (n + r < count)
        four[r] = lanes_of<Lane>(x, from, features, rope, position + n + r, copies[r]);
      else
        std::memset(copies[r], 0, whole_vectors(depth) * sizeof(float));
    }
    for (int64_t d = 0; d < depth; d += kWidth) {
      F32 v[4] = {load(four[0] + d), load(four[1] + d), load(four[2] + d), load(four[3] + d)};
      if constexpr (!Lane::kPairs) DGM_UNROLL for (int r = 0; r < 4; ++r) v[r] *= factor;
      transpose4(v);  // vector j: rows n .. n + 3 of lanes d + j, d + j + 4, ...
      float* at = to + d * stride + n;
      if (d + kWidth <= depth) {
        DGM_UNROLL
        for (int lane = 0; lane < kWidth; ++lane) store_unaligned(at + lane * stride, quad(v[lane % 4], lane / 4));
      } else {
        for (int lane = 0; d + lane < depth; ++lane) store_unaligned(at + lane * stride, quad(v[lane % 4], lane / 4));
      }
    }
  }
}

// Rows [begin, end) of a head in tiles [tile][lane][kTileRow].
template <class Lane>
DGM_NOINLINE void make_tiles(const Rows& x, int64_t batch, int64_t head, int64_t begin, int64_t end, int64_t features,
                             const RopeArgs& rope, float* to) {
  const int64_t depth = depth_of<Lane>(features);
  for (int64_t first = begin; first < end; first += kTile, to += depth * kTileRow) {
    const int64_t some = end - first < kTile ? end - first : kTile;
    turn_rows<Lane>(x, batch, head, first, some, kTileRow, features, rope, first, 1.0f, kTileRow, to);
  }
}

// Rows [begin, end) of a head as floats, `row` floats apart: the tensor's own memory if that is what it holds, else
// `to`, with zeros behind the features.
DGM_NOINLINE const float* dense_rows(const Rows& x, int64_t batch, int64_t head, int64_t begin, int64_t end,
                                     int64_t features, const RopeArgs& rope, int64_t position, int64_t row, float* to) {
  if (x.dtype == DType::Float32 && x.row == row && row == features && !rope.table)
    return reinterpret_cast<const float*>(row_at(x, batch, head, begin));
  alignas(64) float wide[kMaxFeatures + kWidth];
  for (int64_t n = begin; n < end; ++n) {
    read_row(x, row_at(x, batch, head, n), features, rope, position + n, wide);
    float* dense = to + (n - begin) * row;
    std::memcpy(dense, wide, features * sizeof(float));
    std::memset(dense + features, 0, (row - features) * sizeof(float));
  }
  return to;
}

// Values of bfloat16 as pairs of neighbouring keys: [keys / 2][features].
DGM_NOINLINE void pair_rows(const Rows& x, int64_t batch, int64_t head, int64_t count, int64_t features, float* to) {
  for (int64_t n = 0; n < count; n += 2, to += features) {
    const uint16_t* low = reinterpret_cast<const uint16_t*>(row_at(x, batch, head, n));
    const uint16_t* high = n + 1 < count ? reinterpret_cast<const uint16_t*>(row_at(x, batch, head, n + 1)) : nullptr;
    uint32_t* pairs = reinterpret_cast<uint32_t*>(to);
    for (int64_t d = 0; d < features; ++d)
      pairs[d] = low[d] | static_cast<uint32_t>(high ? high[d] : uint16_t{0}) << 16;
  }
}

DGM_INLINE char* row_at(const OutputRows& x, int64_t batch, int64_t head, int64_t row) {
  return static_cast<char*>(x.data) + (batch * x.batch + head * x.head + row * x.row) * element_size(x.dtype);
}

// Panel [features][kPanel] to rows: query n of `count` gets its features times `factors[n]`, turned back by its
// position. Of the panel whole vectors of features are read.
DGM_NOINLINE void write_panel(const float* panel, int64_t count, int64_t features, const float* factors,
                              const RopeArgs& rope, int64_t position, const OutputRows& out, char* to) {
  alignas(64) float copies[4][kMaxFeatures + kWidth];
  const bool direct = out.dtype == DType::Float32 && features % kWidth == 0 && !rope.table;
  for (int64_t n = 0; n < count; n += 4) {
    const int64_t some = count - n < 4 ? count - n : 4;
    char* row = to + n * out.row * element_size(out.dtype);
    float* rows[4];
    for (int64_t r = 0; r < 4; ++r)
      rows[r] = direct && r < some ? reinterpret_cast<float*>(row) + r * out.row : copies[r];
    for (int64_t d = 0; d < features; d += kWidth) {
      const float* from = panel + d * kPanel + n;
      F32 v[4];  // vector j: queries n .. n + 3 of features d + j, d + j + 4, ...
      DGM_UNROLL
      for (int j = 0; j < 4; ++j) v[j] = load_quads(from + j * kPanel, 4 * kPanel);
      transpose4(v);
      DGM_UNROLL
      for (int r = 0; r < 4; ++r) store(rows[r] + d, v[r] * factors[n + r]);
    }
    for (int64_t r = 0; r < some && !direct; ++r) {
      if (rope.table) rotate(rope, position + n + r, true, rows[r]);
      convert_from_floats(rows[r], features, out.dtype, row + r * out.row * element_size(out.dtype));
    }
  }
}

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::attention
