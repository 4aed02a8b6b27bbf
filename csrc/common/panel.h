// What the products of two ops share: the size of a tile of sums in registers, and the loops around it.
#pragma once

#include <type_traits>

#include "common/vec.h"

namespace dgm {
namespace DGM_ISA_NAMESPACE {
namespace {

// A panel is two vectors of columns. A tile has as many rows, or positions, as leave registers for its sums: of 32
// registers 28, of 16 registers 12, beside two for the weights and one for the input.
constexpr int kPanel = 2 * kWidth;
#if defined(__AVX512F__)
constexpr int kTile = 14;
#else
constexpr int kTile = 6;
#endif
constexpr int kTileRow = (kTile + 3) / 4 * 4;

DGM_INLINE F32 load_first(const float* from, int64_t count) {
  if (count >= kWidth) return load(from);
  F32 value = {};
  std::memcpy(&value, from, count * sizeof(float));
  return value;
}

DGM_INLINE void store_first(float* to, F32 value, int64_t count) {
  if (count >= kWidth)
    store(to, value);
  else
    std::memcpy(to, &value, count * sizeof(float));
}

// Vectors of four rows turned: lane i of them to the four floats at `to + i * stride`, for at most `lanes` of them.
DGM_INLINE void store_turned(F32* v, int64_t lanes, float* to, int64_t stride) {
  transpose4(v);  // vector j: the four rows at lanes j, j + 4, ...
  if (lanes >= kWidth) {
    DGM_UNROLL
    for (int lane = 0; lane < kWidth; ++lane) store_unaligned(to + lane * stride, quad(v[lane % 4], lane / 4));
  } else {
    for (int lane = 0; lane < lanes; ++lane) store_unaligned(to + lane * stride, quad(v[lane % 4], lane / 4));
  }
}

// Calls function(std::integral_constant<int, n>) for the n that is `positions`, 1 to kTile.
template <int kPositions = kTile, class Function>
DGM_INLINE void with_positions(int64_t positions, Function function) {
  if constexpr (kPositions > 1) {
    if (positions != kPositions) return with_positions<kPositions - 1>(positions, function);
  }
  function(std::integral_constant<int, kPositions>());
}

// Memory of a kernel's own. Not std::vector: its functions would be emitted with this instruction set's code, and the
// linker might pick them for every CPU.
template <class T>
class Array {
 public:
  explicit Array(int64_t size) : data_(new T[size]()) {}
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { delete[] data_; }
  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  T* data_;
};

// `length` in pieces of at most kTile that differ by at most one.
struct Pieces {
  int64_t number, size, longer;
  explicit Pieces(int64_t length)
      : number((length + kTile - 1) / kTile),
        size(number ? length / number : 0),
        longer(number ? length % number : 0) {}
  int64_t begin(int64_t piece) const { return piece * size + (piece < longer ? piece : longer); }
  int64_t length(int64_t piece) const { return size + (piece < longer); }
};

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm
