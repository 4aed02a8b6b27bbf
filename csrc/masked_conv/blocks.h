// Blocks of a tensor as float32 in memory, for the pixelwise kernels of masked_conv.
#pragma once

#include <type_traits>

#include "common/elementary.h"
#include "common/runs.h"
#include "masked_conv/cpu_pixel.h"

namespace dgm::masked_conv {
namespace DGM_ISA_NAMESPACE {
namespace {

using namespace ::dgm::DGM_ISA_NAMESPACE;

constexpr int64_t kChunk = 768;  // elements of a block at most; whole vectors of every instruction set

DGM_INLINE const char* address(const Operand& from, int64_t index) {
  return static_cast<const char*>(from.data) + index * element_size(from.dtype);
}

DGM_INLINE char* address(const Output& to, int64_t index) {
  return static_cast<char*>(to.data) + index * element_size(to.dtype);
}

DGM_INLINE bool in_place(DType dtype, int64_t count) { return dtype == DType::Float32 && count % kWidth == 0; }

DGM_INLINE int64_t whole_vectors(int64_t count) { return (count + kWidth - 1) / kWidth; }

// `count` elements from `index` on, up to kChunk: where they are, or a copy with zeros up to a whole vector.
class BlockReader {
 public:
  DGM_INLINE_METHOD const float* read(const Operand& from, int64_t index, int64_t count) {
    if (in_place(from.dtype, count)) return reinterpret_cast<const float*>(address(from, index));
    convert_to_floats(address(from, index), from.dtype, count, buffer_);
    return buffer_;
  }

 private:
  alignas(64) float buffer_[kChunk];
};

// Where a block of results goes: into the tensor, or into a buffer that close() converts.
class BlockWriter {
 public:
  DGM_INLINE_METHOD float* open(const Output& to, int64_t index, int64_t count) {
    to_ = address(to, index), dtype_ = to.dtype, count_ = count;
    return in_place(dtype_, count) ? reinterpret_cast<float*>(to_) : buffer_;
  }

  DGM_INLINE_METHOD void close() const {
    if (!in_place(dtype_, count_)) convert_from_floats(buffer_, count_, dtype_, to_);
  }

 private:
  alignas(64) float buffer_[kChunk];
  char* to_ = nullptr;
  DType dtype_ = DType::Float32;
  int64_t count_ = 0;
};

template <int N>
DGM_INLINE Pack<F32, N> reciprocal(Pack<F32, N> x) {
  DGM_EACH x.v[i] = 1.0f / x.v[i];
  return x;
}

// Calls body(element, std::integral_constant<int, vectors in lockstep>).
template <class Body>
DGM_INLINE void for_each_pack(int64_t count, const Body& body) {
  const int64_t vectors = whole_vectors(count);
  int64_t i = 0;
  for (; i + kLockstep <= vectors; i += kLockstep) body(i * kWidth, std::integral_constant<int, kLockstep>{});
  for (; i < vectors; ++i) body(i * kWidth, std::integral_constant<int, 1>{});
}

// ---- Tiles: rows of kTilePixels floats, one a pixel. Tensors are [samples, rows, plane], and their pixels are
// numbered through all samples: a tile may reach into the samples behind.

constexpr int64_t kTilePixels = 64;

struct Rows {
  int64_t all, begin, number;  // rows [begin, begin + number) of the tensor's
};

struct Pixels {
  int64_t plane, first, count;  // of a sample; in the tile
};

DGM_INLINE Pixels pixels_of_tile(int64_t all, int64_t plane, int64_t tile) {
  const int64_t first = tile * kTilePixels, left = all - first;
  return {plane, first, left < kTilePixels ? left : kTilePixels};
}

// Calls body(row of the tile, element of the tensor, place in the tile's row, count). Row after row: what a copy in
// whole vectors writes behind its end is the place of what comes next.
template <class Body>
DGM_INLINE void for_each_run(const Rows& rows, const Pixels& pixels, const Body& body) {
  const int64_t plane = pixels.plane, sample = pixels.first / plane, pixel = pixels.first % plane;
  for (int64_t row = 0; row < rows.number; ++row) {
    int64_t from = (sample * rows.all + rows.begin + row) * plane + pixel, left = plane - pixel;
    for (int64_t place = 0; place < pixels.count; from += left + (rows.all - 1) * plane, left = plane) {
      const int64_t rest = pixels.count - place, length = left < rest ? left : rest;
      body(row, from, place, length);
      place += length;
    }
  }
}

// Floats are copied here where a run is short or a whole row: a call for each would take longer than the copy.
DGM_INLINE bool is_copied(DType dtype, int64_t length) {
  return dtype == DType::Float32 && (length < kWidth || length == kTilePixels);
}

DGM_INLINE void copy_run(const float* from, int64_t length, float* to) {
  if (length == kTilePixels) {
    DGM_UNROLL
    for (int64_t i = 0; i < kTilePixels; i += kWidth) store(to + i, load(from + i));
  } else {
    for (int64_t i = 0; i < length; ++i) to[i] = from[i];
  }
}

DGM_NOINLINE void read_tile(const Operand& from, const Rows& rows, const Pixels& pixels, float* to) {
  for_each_run(rows, pixels, [&](int64_t row, int64_t element, int64_t place, int64_t length) {
    float* target = to + row * kTilePixels + place;
    if (is_copied(from.dtype, length)) return copy_run(static_cast<const float*>(from.data) + element, length, target);
    convert_to_floats(address(from, element), from.dtype, length, target);
  });
}

DGM_NOINLINE void write_tile(const float* from, const Output& to, const Rows& rows, const Pixels& pixels) {
  for_each_run(rows, pixels, [&](int64_t row, int64_t element, int64_t place, int64_t length) {
    const float* source = from + row * kTilePixels + place;
    if (is_copied(to.dtype, length)) return copy_run(source, length, static_cast<float*>(to.data) + element);
    convert_from_floats(source, length, to.dtype, address(to, element));
  });
}

// Whether the rows of a tile are used where they are.
DGM_INLINE bool in_place(DType dtype, const Pixels& p) {
  return in_place(dtype, p.count) && p.first % p.plane + p.count <= p.plane;
}

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::masked_conv
