// Chunks of samples as runs of floats: what is read, drawn and written, and sums over each of the samples.
#pragma once

#include "common/noise.h"
#include "common/runs.h"
#include "latent/math.h"

namespace dgm::latent {
namespace DGM_ISA_NAMESPACE {
namespace {

constexpr int64_t kPackElements = kLockstep * kWidth;
constexpr int64_t kSlack =
    kPackElements + kWidth;  // behind a chunk: its last pack is whole, a conversion whole vectors

typedef Pack<F32, kLockstep> V;

// Elements [first, first + count) of each of `rows` samples. In a run they lie at a distance of `stride`, a multiple of
// four, as the noise does: a counter makes four numbers of one sample.
struct Chunk {
  int64_t row, rows, first, count;
  int64_t stride() const { return (count + 3) / 4 * 4; }
  int64_t size() const { return rows * stride(); }
  bool is_whole() const { return (rows == 1 || stride() == count) && rows * count % kPackElements == 0; }
};

// Samples that make a chunk, of samples that are not parted.
DGM_INLINE int64_t samples_together(int64_t elements) {
  const int64_t stride = (elements + 3) / 4 * 4;
  return stride == 0 ? kChunk : stride < kChunk ? kChunk / stride : 1;
}

// The chunk of a unit: a part of one sample, or as many samples as a chunk holds.
DGM_INLINE Chunk chunk_of(const Shape& shape, int64_t unit) {
  if (shape.parts > 1) {
    const int64_t first = unit % shape.parts * kChunk, left = shape.elements - first;
    return {unit / shape.parts, 1, first, left < kChunk ? left : kChunk};
  }
  const int64_t together = samples_together(shape.elements), row = unit * together, left = shape.batch - row;
  return {row, left < together ? left : together, 0, shape.elements};
}

template <class Rows>
DGM_INLINE char* place_of(const Rows& rows, const Chunk& c) {
  const int64_t elements = c.row * rows.stride + c.first;
  return const_cast<char*>(static_cast<const char*>(rows.data)) + elements * element_size(rows.dtype);
}

// The samples are one run in memory, too.
template <class Rows>
DGM_INLINE bool is_run(const Rows& rows, const Chunk& c) {
  return c.rows == 1 || (rows.stride == c.count && c.stride() == c.count);
}

// The elements of a chunk as floats: where they are, or a copy; zeros where there is no tensor.
class In {
 public:
  const float* read(const RowsIn& rows, const Chunk& c) {
    if (!rows.data) return zeros(c);
    const char* from = place_of(rows, c);
    const bool run = is_run(rows, c);
    if (run && rows.dtype == DType::Float32 && c.is_whole()) {
      return reinterpret_cast<const float*>(from);
    }
    if (run) {
      convert_to_floats(from, rows.dtype, c.rows * c.count, buffer_);
      clear(c.rows * c.count, c.size() + kPackElements);
    } else {
      for (int64_t i = 0; i < c.rows; ++i) {
        convert_to_floats(from + i * rows.stride * element_size(rows.dtype), rows.dtype, c.count,
                          buffer_ + i * c.stride());
        for (int64_t e = c.count; e < c.stride(); ++e) buffer_[i * c.stride() + e] = 0.0f;
      }
      clear(c.size(), c.size() + kPackElements);
    }
    return buffer_;
  }

  // One number a sample, for all of its elements.
  const float* spread(const float* of_samples, const Chunk& c) {
    if (!of_samples) return zeros(c);
    if (c.stride() < kWidth) {
      for (int64_t i = 0; i < c.rows; ++i)
        for (int64_t e = 0; e < c.stride(); ++e) buffer_[i * c.stride() + e] = of_samples[c.row + i];
    } else {  // in whole vectors: the next row covers what is behind
      for (int64_t i = 0; i < c.rows; ++i)
        for (int64_t e = 0; e < c.stride(); e += kWidth)
          store(buffer_ + i * c.stride() + e, broadcast_float(of_samples[c.row + i]));
    }
    clear(c.size(), c.size() + kPackElements);
    return buffer_;
  }

 private:
  void clear(int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) buffer_[i] = 0.0f;
  }

  const float* zeros(const Chunk& c) {
    clear(0, c.size() + kPackElements);
    return buffer_;
  }

  alignas(64) float buffer_[kChunk + kSlack];
};

class Out {
 public:
  float* open(const RowsOut& rows, const Chunk& c) {
    rows_ = rows, chunk_ = c;
    direct_ = rows.data && rows.dtype == DType::Float32 && is_run(rows, c) && c.is_whole();
    return direct_ ? reinterpret_cast<float*>(place_of(rows, c)) : buffer_;
  }

  // What is written goes to the tensor, not to a buffer that close() converts.
  bool direct() const { return direct_; }

  void close() const {
    if (direct_ || !rows_.data) return;
    char* to = place_of(rows_, chunk_);
    if (is_run(rows_, chunk_)) return convert_from_floats(buffer_, chunk_.rows * chunk_.count, rows_.dtype, to);
    for (int64_t i = 0; i < chunk_.rows; ++i)
      convert_from_floats(buffer_ + i * chunk_.stride(), chunk_.count, rows_.dtype,
                          to + i * rows_.stride * element_size(rows_.dtype));
  }

 private:
  alignas(64) float buffer_[kChunk + kSlack];
  RowsOut rows_;
  Chunk chunk_ = {};
  bool direct_ = false;
};

// The noise of a chunk, one step of the key after the other.
class Noise {
 public:
  Noise(const NoiseArgs& noise, const Shape& shape, const Chunk& c)
      : noise_(noise), shape_(shape), chunk_(c), stream_(noise, shape.batch, c.row, c.first, c.count) {}

  // Calls run(eps, begin, end) for the blocks of the chunk, one after the other: what is stored past the caches leaves
  // while the next block is drawn. Meanwhile memory is asked for what will be read, or written by way of the caches:
  // `more` are runs of this chunk.
  template <class Run, class... Pointers>
  void for_each_block(int64_t step, const Run& run, Pointers... more) {
    const int64_t size = chunk_.size();
    if (!noise_.drawn) {
      Chunk there = chunk_;
      there.row += step * shape_.batch;
      return run(given_.read({noise_.given.data, noise_.given.dtype, shape_.elements}, there), 0, size);
    }
    stream_.start(step);
    for (int64_t i = 0; i < size; i += kBlock) {
      for (int64_t e = i; e < i + kBlock; e += kWidth) (__builtin_prefetch(more + e), ...);
      stream_.block(buffer_ + i);
      run(buffer_, i, i + kBlock < size ? i + kBlock : size);
    }
  }

 private:
  const NoiseArgs& noise_;
  const Shape shape_;
  const Chunk chunk_;
  NormalStream stream_;
  In given_;
  alignas(64) float buffer_[kChunk + kBlock];
};

DGM_INLINE double total(const float* x, int64_t count) {
  double result = 0.0;
  int64_t i = 0;
  if (count >= kWidth) {
    Sum sum;
    for (; i + 4 * kWidth <= count; i += 4 * kWidth)
      sum.add((load(x + i) + load(x + i + kWidth)) + (load(x + i + 2 * kWidth) + load(x + i + 3 * kWidth)));
    for (; i + kWidth <= count; i += kWidth) sum.add(load(x + i));
    result = sum.value();
  }
  for (; i < count; ++i) result += static_cast<double>(x[i]);
  return result;
}

// Sums of a run over each of its samples.
DGM_INLINE void store_sums(const float* terms, const Chunk& c, const Shape& shape, double* to) {
  for (int64_t i = 0; i < c.rows; ++i)
    to[(c.row + i) * shape.parts + c.first / kChunk] = total(terms + i * c.stride(), c.count);
}

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::latent
