// The formulas of attention on vectors: powers of two for the softmax, and rotations of pairs of features.
#pragma once

#include "common/elementary.h"

namespace dgm::attention {
namespace DGM_ISA_NAMESPACE {

using namespace ::dgm::DGM_ISA_NAMESPACE;

namespace {

constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.693147180559945309417f;
constexpr float kMinusInfinity = -__builtin_inff();

DGM_INLINE F32 larger(F32 a, F32 b) { return a > b ? a : b; }

DGM_INLINE F32 nearest_whole(F32 x) {
#if defined(__AVX512F__)
  return reinterpret_cast<F32>(_mm512_roundscale_ps(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#else
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  return (x + kShift) - kShift;
#endif
}

// 2^x for x <= 0, within 2 ulp: x = n + r with whole n and |r| <= 1/2, 2^r by a minimax polynomial whose error is 9e-8.
// Minus infinity gives 0.
DGM_INLINE F32 power_of_two_below_one(F32 x) {
  x = at_least(x, -160.0f);  // whose power is 0
  const F32 n = nearest_whole(x), r = x - n;
  F32 p = r * 0.00132647f + 0.0096715f;
  p = p * r + 0.05550734f;
  p = p * r + 0.24022242f;
  p = p * r + 0.69314698f;
  return scale_by_power(p * r + 1.0f, n);
}

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::attention
