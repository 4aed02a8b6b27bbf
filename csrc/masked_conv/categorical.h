// CPU loops of the categorical distribution: a lane is a pixel, or, where the levels of a pixel are contiguous, a
// level.
#pragma once

#include "masked_conv/blocks.h"

namespace dgm::masked_conv {
namespace DGM_ISA_NAMESPACE {
namespace {

// Far below any logit, and finite: the difference to a logit of -infinity is no NaN.
constexpr float kLowest = -3.0e38f;
constexpr int kFewLevels = 10;      // measured: with fewer, pixels as lanes are faster though they have to be gathered
constexpr int kLevelsTogether = 8;  // of which the largest is found before the sum is brought to it

// NaN does not count.
DGM_INLINE F32 larger(F32 x, F32 top) { return x > top ? x : top; }

// Sum of exp(logit - top) for a top that rises.
struct RunningSum {
  F32 top = broadcast_float(kLowest), total = {};

  // kCount vectors at a distance of `stride` floats.
  template <int kCount>
  DGM_INLINE_METHOD void add(const float* logits, int64_t stride) {
    F32 next = top;
    DGM_UNROLL
    for (int j = 0; j < kCount; ++j) next = larger(load(logits + j * stride), next);
    total *= exponential_in_range(at_least(top - next, -105.0f));
    DGM_UNROLL
    for (int j = 0; j < kCount; ++j) total += exponential_in_range(at_least(load(logits + j * stride) - next, -105.0f));
    top = next;
  }

  DGM_INLINE_METHOD void add(const float* logits, int64_t stride, int64_t count) {
    if (count == kLevelsTogether) return add<kLevelsTogether>(logits, stride);
    for (int64_t j = 0; j < count; ++j) add<1>(logits + j * stride, stride);
  }
};

// log of a positive sum; of 0, which only logits of -infinity give, NaN.
DGM_INLINE F32 log_of_sum(F32 total) { return logarithm(total > 0.0f ? total : total / total); }

DGM_INLINE float element(const Operand& from, int64_t index) {
  if (from.dtype == DType::Float32) return static_cast<const float*>(from.data)[index];
  alignas(64) float value[kWidth];
  convert_to_floats(address(from, index), from.dtype, 1, value);
  return value[0];
}

DGM_INLINE bool is_level(const CategoricalArgs& a, int64_t level) { return level >= 0 && level < a.levels; }

DGM_INLINE F32 nan() { return broadcast_float(__builtin_nanf("")); }

// ---- A lane is a pixel

// Some levels of a tile of pixels as rows, where they are or in a copy.
class LevelReader {
 public:
  DGM_INLINE_METHOD const float* read(const CategoricalArgs& a, int64_t level, int64_t number, const Pixels& p,
                                      int64_t& stride) {
    if (in_place(a.logits.dtype, p)) {
      stride = a.inner;
      const int64_t at = (p.first / p.plane * a.levels + level) * p.plane + p.first % p.plane;
      return reinterpret_cast<const float*>(address(a.logits, at));
    }
    stride = kTilePixels;
    read_tile(a.logits, {a.levels, level, number}, p, buffer_);
    return buffer_;
  }

 private:
  alignas(64) float buffer_[kLevelsTogether * kTilePixels + kWidth];
};

DGM_INLINE int64_t levels_at(const CategoricalArgs& a, int64_t level) {
  return a.levels - level < kLevelsTogether ? a.levels - level : kLevelsTogether;
}

// What the logits of pixels are at their levels; NaN where there is no such level.
DGM_INLINE void logits_of(const CategoricalArgs& a, const Pixels& pixels, float* to) {
  int64_t outer = pixels.first / a.inner, inner = pixels.first % a.inner;
  for (int64_t i = 0; i < pixels.count; ++i) {
    const int64_t level = a.x[pixels.first + i];
    to[i] = is_level(a, level) ? element(a.logits, (outer * a.levels + level) * a.inner + inner) : __builtin_nanf("");
    if (++inner == a.inner) inner = 0, ++outer;
  }
}

DGM_NOINLINE void categorical_tile(const CategoricalArgs& a, const Pixels& pixels) {
  constexpr int kVectorsOfTile = kTilePixels / kWidth;
  const int64_t vectors = whole_vectors(pixels.count);
  RunningSum sums[kVectorsOfTile];
  LevelReader reader;
  for (int64_t level = 0, stride; level < a.levels; level += kLevelsTogether) {
    const int64_t number = levels_at(a, level);
    const float* rows = reader.read(a, level, number, pixels, stride);
    for (int64_t v = 0; v < vectors; ++v) sums[v].add(rows + v * kWidth, stride, number);
  }
  alignas(64) float log_prob[kTilePixels], normaliser[kTilePixels];
  logits_of(a, pixels, log_prob);
  for (int64_t v = 0; v < vectors; ++v) {
    const F32 log_total = log_of_sum(sums[v].total);
    store(log_prob + v * kWidth, load(log_prob + v * kWidth) - sums[v].top - log_total);
    store(normaliser + v * kWidth, log_total);
  }
  std::memcpy(a.log_prob + pixels.first, log_prob, pixels.count * sizeof(float));
  std::memcpy(a.normaliser + pixels.first, normaliser, pixels.count * sizeof(float));
}

// g (one-hot - softmax) of a vector of logits.
DGM_INLINE F32 logit_gradient(F32 grad, F32 logit, F32 top, F32 normaliser, F32 one_hot) {
  return grad * (one_hot - exponential_in_range(at_most(at_least(logit - top - normaliser, -105.0f), 1.0f)));
}

// The largest logit of each pixel of a tile.
DGM_INLINE void find_tops(const CategoricalArgs& a, const Pixels& pixels, LevelReader& reader, float* tops) {
  for (int64_t v = 0; v < kTilePixels; v += kWidth) store(tops + v, broadcast_float(kLowest));
  for (int64_t level = 0, stride; level < a.levels; level += kLevelsTogether) {
    const int64_t number = levels_at(a, level);
    const float* rows = reader.read(a, level, number, pixels, stride);
    for (int64_t v = 0; v < pixels.count; v += kWidth) {
      F32 top = load(tops + v);
      for (int64_t j = 0; j < number; ++j) top = larger(load(rows + j * stride + v), top);
      store(tops + v, top);
    }
  }
}

DGM_NOINLINE void categorical_backward_tile(const CategoricalArgs& a, const Pixels& pixels) {
  const int64_t vectors = whole_vectors(pixels.count);
  alignas(64) float grad[kTilePixels] = {}, normaliser[kTilePixels] = {}, tops[kTilePixels];
  alignas(64) int32_t x[kTilePixels] = {};
  for (int64_t i = 0; i < pixels.count; ++i) {
    const int64_t level = a.x[pixels.first + i];
    x[i] = static_cast<int32_t>(level);
    grad[i] = is_level(a, level) ? a.grad[pixels.first + i] : __builtin_nanf("");
    normaliser[i] = a.given_normaliser[pixels.first + i];
  }
  LevelReader reader;
  find_tops(a, pixels, reader, tops);
  alignas(64) float buffer[kLevelsTogether * kTilePixels + kWidth];
  const bool direct = in_place(a.grad_logits.dtype, pixels);
  for (int64_t level = 0, stride; level < a.levels; level += kLevelsTogether) {
    const int64_t number = levels_at(a, level);
    const float* rows = reader.read(a, level, number, pixels, stride);
    const int64_t at = (pixels.first / a.inner * a.levels + level) * a.inner + pixels.first % a.inner;
    float* to = direct ? reinterpret_cast<float*>(address(a.grad_logits, at)) : buffer;
    const int64_t to_stride = direct ? a.inner : kTilePixels;
    for (int64_t j = 0; j < number; ++j)
      for (int64_t v = 0; v < vectors * kWidth; v += kWidth) {
        const I32 is_x = load_unaligned<I32>(x + v) == static_cast<int32_t>(level + j);
        const F32 one_hot = is_x ? broadcast_float(1.0f) : F32{};
        store(to + j * to_stride + v, logit_gradient(load(grad + v), load(rows + j * stride + v), load(tops + v),
                                                     load(normaliser + v), one_hot));
      }
    if (!direct) write_tile(buffer, a.grad_logits, {a.levels, level, number}, pixels);
  }
}

// ---- A lane is a level: logits of a pixel are contiguous

// Calls body(logits, vectors) for at most kChunk levels of a pixel at a time, -infinity behind the last one.
template <class Body>
DGM_INLINE void for_each_chunk_of(const CategoricalArgs& a, int64_t pixel, const Body& body) {
  alignas(64) float buffer[kChunk];
  for (int64_t level = 0; level < a.levels; level += kChunk) {
    const int64_t count = a.levels - level < kChunk ? a.levels - level : kChunk, vectors = whole_vectors(count);
    const char* from = address(a.logits, pixel * a.levels + level);
    if (in_place(a.logits.dtype, count)) {
      body(reinterpret_cast<const float*>(from), vectors);
      continue;
    }
    convert_to_floats(from, a.logits.dtype, count, buffer);
    for (int64_t i = count; i < vectors * kWidth; ++i) buffer[i] = -__builtin_inff();
    body(buffer, vectors);
  }
}

DGM_INLINE float largest_lane(F32 x) {
  float top = kLowest;
  for (int lane = 0; lane < kWidth; ++lane) top = x[lane] > top ? x[lane] : top;
  return top;
}

DGM_NOINLINE void categorical_row(const CategoricalArgs& a, int64_t pixel) {
  RunningSum sums;
  for_each_chunk_of(a, pixel, [&](const float* logits, int64_t vectors) {
    for (int64_t i = 0; i < vectors; i += kLevelsTogether)
      sums.add(logits + i * kWidth, kWidth, vectors - i < kLevelsTogether ? vectors - i : kLevelsTogether);
  });
  const float top = largest_lane(sums.top);
  const double total = sum(sums.total * exponential_in_range(at_least(sums.top - top, -105.0f)));
  const float log_total = log_of_sum(broadcast_float(static_cast<float>(total)))[0];
  float logit;
  logits_of(a, {1, pixel, 1}, &logit);
  a.log_prob[pixel] = logit - top - log_total;
  a.normaliser[pixel] = log_total;
}

DGM_NOINLINE void categorical_backward_row(const CategoricalArgs& a, int64_t pixel) {
  F32 tops = broadcast_float(kLowest);
  for_each_chunk_of(a, pixel, [&](const float* logits, int64_t vectors) {
    for (int64_t i = 0; i < vectors; ++i) tops = larger(load(logits + i * kWidth), tops);
  });
  I32 lanes;
  for (int lane = 0; lane < kWidth; ++lane) lanes[lane] = lane;
  const int64_t x = a.x[pixel];
  const F32 grad = is_level(a, x) ? broadcast_float(a.grad[pixel]) : nan();
  const F32 top = broadcast_float(largest_lane(tops)), normaliser = broadcast_float(a.given_normaliser[pixel]);
  BlockWriter writer;
  int64_t level = 0;
  for_each_chunk_of(a, pixel, [&](const float* logits, int64_t vectors) {
    const int64_t left = a.levels - level, count = left < kChunk ? left : kChunk;
    float* to = writer.open(a.grad_logits, pixel * a.levels + level, count);
    for (int64_t i = 0; i < vectors * kWidth; i += kWidth) {
      const I32 is_x = lanes == static_cast<int32_t>(x - level - i);
      const F32 one_hot = is_x ? broadcast_float(1.0f) : F32{};
      store(to + i, logit_gradient(grad, load(logits + i), top, normaliser, one_hot));
    }
    writer.close();
    level += count;
  });
}

// Few levels would leave most lanes empty.
DGM_INLINE bool lanes_are_levels(const CategoricalArgs& a) { return a.inner == 1 && a.levels > kFewLevels; }

}  // namespace

int64_t categorical_tile_pixels(const CategoricalArgs& a) { return lanes_are_levels(a) ? 1 : kTilePixels; }

void categorical(const CategoricalArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (lanes_are_levels(a))
      categorical_row(a, i);
    else
      categorical_tile(a, pixels_of_tile(a.outer * a.inner, a.inner, i));
  }
}

void categorical_backward(const CategoricalArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (lanes_are_levels(a))
      categorical_backward_row(a, i);
    else
      categorical_backward_tile(a, pixels_of_tile(a.outer * a.inner, a.inner, i));
  }
}

}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::masked_conv
