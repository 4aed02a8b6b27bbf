// The inner loop of convolution and generation: a tile of positions times panels of output channels, in registers.
#pragma once

#include "common/panel.h"

namespace dgm::masked_conv {
namespace DGM_ISA_NAMESPACE {

using namespace ::dgm::DGM_ISA_NAMESPACE;

namespace {

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

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::masked_conv
