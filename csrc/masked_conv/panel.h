// The inner loop of convolution and generation: a tile of positions times panels of output channels, in registers.
#pragma once

#include <type_traits>

#include "common/vec.h"

namespace dgm::masked_conv {
namespace DGM_ISA_NAMESPACE {

using namespace ::dgm::DGM_ISA_NAMESPACE;

namespace {

// A panel is two vectors of output channels. A tile has as many positions as leave registers for its sums: of 32
// registers 28, of 16 registers 12, beside two for the weights and one for the input.
constexpr int kPanel = 2 * kWidth;
#if defined(__AVX512F__)
constexpr int kTile = 14;
#else
constexpr int kTile = 6;
#endif
constexpr int kTileRow = (kTile + 3) / 4 * 4;

// `count` inputs of a tile, `stride` floats apart, at each the positions one after the other; for each kPanel weights,
// those of the next panel `panel_stride` floats further on.
struct Source {
  const float* data;
  int64_t stride;
  int64_t count;
  const float* weights;
  int64_t panel_stride;
};

template <int kPositions, int kPanels = 1>
struct Sums {
  F32 v[kPanels][kPositions][2];
};

// Products that are added up one after the other before their sum moves on to a total: the rounding errors of a longer
// chain would exceed those of PyTorch's convolution (of 3072 products 4e-6 of the result, of 128 2e-7). Sums over
// pixels cancel more.
constexpr int64_t kChain = 128, kPixelChain = 16;

template <int kPositions, int kPanels>
DGM_INLINE void move(Sums<kPositions, kPanels>& sums, Sums<kPositions, kPanels>& totals) {
  DGM_UNROLL
  for (int p = 0; p < kPanels; ++p) DGM_UNROLL
  for (int m = 0; m < kPositions; ++m)
    for (int half = 0; half < 2; ++half) {
      totals.v[p][m][half] += sums.v[p][m][half];
      sums.v[p][m][half] = F32{};
    }
}

// totals += over sources and k of data[k * stride + position] * weights[k * kPanel + output]. The order of the sum is
// the same whatever the number of positions and panels: a result does not depend on what is computed beside it.
template <int64_t kLength = kChain, int kPositions, int kPanels>
DGM_INLINE void accumulate(const Source* sources, int64_t number, Sums<kPositions, kPanels>& totals) {
  Sums<kPositions, kPanels> sums = {};
  int64_t left = kLength;
  for (const Source* s = sources; s != sources + number; ++s) {
    const float *data = s->data, *weights = s->weights;
    const int64_t stride = s->stride, panel_stride = s->panel_stride;
    for (int64_t rest = s->count; rest > 0;) {
      const int64_t steps = rest < left ? rest : left;
      for (int64_t k = steps; k > 0; --k, data += stride, weights += kPanel) {
        DGM_UNROLL
        for (int p = 0; p < kPanels; ++p) {
          const F32 w0 = load(weights + p * panel_stride), w1 = load(weights + p * panel_stride + kWidth);
          DGM_UNROLL
          for (int m = 0; m < kPositions; ++m) {
            const F32 x = data[m] - F32{};  // a broadcast; adding 0 would cost an addition, for -0
            sums.v[p][m][0] += x * w0;
            sums.v[p][m][1] += x * w1;
          }
        }
      }
      rest -= steps, left -= steps;
      if (left > 0) continue;
      move(sums, totals);
      left = kLength;
    }
  }
  move(sums, totals);
}

// Positions one after the other for each output, kTileRow floats apart.
template <int kPositions>
DGM_INLINE void transpose(const F32 (&sums)[kPositions][2], float* to) {
  DGM_UNROLL
  for (int half = 0; half < 2; ++half) {
    DGM_UNROLL
    for (int m = 0; m < kPositions; m += 4) {
      F32 four[4] = {};
      DGM_UNROLL
      for (int j = 0; j < 4; ++j)
        if (m + j < kPositions) four[j] = sums[m + j][half];
      transpose4(four);
      DGM_UNROLL
      for (int j = 0; j < 4; ++j) DGM_UNROLL
      for (int lane = 0; lane < kWidth; lane += 4)
        std::memcpy(to + (half * kWidth + lane + j) * kTileRow + m, reinterpret_cast<const float*>(&four[j]) + lane,
                    4 * sizeof(float));
    }
  }
}

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
}  // namespace dgm::masked_conv
