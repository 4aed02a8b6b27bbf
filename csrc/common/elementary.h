// exp, log and what is made of them, for float32 CPU vectors; every one keeps NaN.
#pragma once

#include "common/philox.h"
#include "common/vec.h"

namespace dgm {
namespace DGM_ISA_NAMESPACE {

constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.693147180559945309417f;
constexpr float kMinusInfinity = -__builtin_inff();

DGM_INLINE F32 broadcast_float(float value) { return F32{} + value; }

DGM_INLINE F32 absolute(F32 x) { return bit_cast<F32>(bit_cast<U32>(x) & 0x7FFFFFFFu); }

// x 2^n for whole n in [-252, 254], in two steps: 2^n itself may be out of range where the product is not.
DGM_INLINE F32 scale_by_power(F32 x, F32 n) {
#if defined(__AVX512F__)
  return reinterpret_cast<F32>(_mm512_scalef_ps(reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(n)));
#else
  const I32 whole = __builtin_convertvector(n, I32);
  const I32 half = whole >> 1;
  return x * bit_cast<F32>((half + 127) << 23) * bit_cast<F32>((whole - half + 127) << 23);
#endif
}

DGM_INLINE F32 power_of_two(F32 n) { return scale_by_power(broadcast_float(1.0f), n); }

template <int N>
DGM_INLINE Pack<F32, N> absolute(Pack<F32, N> x) {
  DGM_EACH x.v[i] = absolute(x.v[i]);
  return x;
}

template <int N>
DGM_INLINE Pack<F32, N> scale_by_power(Pack<F32, N> x, Pack<F32, N> n) {
  DGM_EACH x.v[i] = scale_by_power(x.v[i], n.v[i]);
  return x;
}

template <int N>
DGM_INLINE Pack<F32, N> power_of_two(Pack<F32, N> n) {
  DGM_EACH n.v[i] = power_of_two(n.v[i]);
  return n;
}

// ---- F is one vector, or several in lockstep.

// x = n ln 2 + r with whole n and |r| <= ln 2 / 2; n to `whole`, e^r - 1 by a minimax polynomial.
template <class F>
DGM_INLINE F reduced_expm1(F x, F& whole) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  whole = (x * 1.44269502162933349609f + kShift) - kShift;
  F r = x - whole * 0.693145751953125f;  // ln 2 in two parts, the first with few enough bits for an exact product
  r = r - whole * 1.42860676533018704504e-06f;
  F p = r * 0.0013814601115882397f + 0.008368716575205326f;
  p = p * r + 0.04166838899254799f;
  p = p * r + 0.1666652113199234f;
  p = p * r + 0.4999999403953552f;
  return p * (r * r) + r;
}

// Within 1.1 ulp, for x in [-105, 89].
template <class F>
DGM_INLINE F exponential_in_range(F x) {
  F n;
  const F rest = reduced_expm1(x, n);
  return scale_by_power(rest + 1.0f, n);
}

// For every x: 0 and infinity beyond the range.
template <class F>
DGM_INLINE F exponential(F x) {
  return exponential_in_range(at_most(at_least(x, -105.0f), 89.0f));
}

// For x in [-1, 1], within 3 ulp, by a minimax polynomial alone.
template <class F>
DGM_INLINE F exponential_of_unit(F x) {
  F p = x * 2.4188682800740935e-05f + 0.00020439190848264843f;
  p = p * x + 0.0013908486580476165f;
  p = p * x + 0.00832912977784872f;
  p = p * x + 0.041665319353342056f;
  p = p * x + 0.16666772961616516f;
  p = p * x + 0.5000002980232239f;
  p = p * x + 0.9999999403953552f;
  return p * x + 1.0f;
}

// e^x - 1 for x in [-105, 0], which keeps its digits where x is small.
template <class F>
DGM_INLINE F exponential_minus_one_in_range(F x) {
  F n;
  const F rest = reduced_expm1(x, n), power = power_of_two(n);
  return rest * power + (power - 1.0f);
}

// Within 3 ulp: m / (-2 - m) with m = e^(-2 |x|) - 1.
template <class F>
DGM_INLINE F hyperbolic_tangent(F x) {
  const F m = exponential_minus_one_in_range(at_least(absolute(x) * -2.0f, -20.0f));
  return flip_sign(m / (-2.0f - m), bit_cast<U32>(x));
}

// ---- One vector

// Within 2 ulp for positive normal x. Zero, negative and subnormal numbers have no place here.
DGM_INLINE F32 logarithm(F32 x) {
  F32 e, f;
  split_exponent(x, e, f);
  return x == x ? e * 0.693147182464599609375f + log_of_mantissa(f) : x;
}

DGM_INLINE F32 larger(F32 a, F32 b) { return a > b ? a : b; }

// Whether a lane of x is at least `bound`; NaN is not.
DGM_INLINE bool any_reaches(F32 x, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(x), _mm512_set1_ps(bound), _CMP_GE_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(reinterpret_cast<__m256>(x), _mm256_set1_ps(bound), _CMP_GE_OQ)) != 0;
#else
  bool any = false;
  for (int i = 0; i < kWidth; ++i) any |= x[i] >= bound;
  return any;
#endif
}

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

// log(1 + t) for t in [0, 1]: the rounding of 1 + t is made good, so that small t keep their digits.
DGM_INLINE F32 logarithm1p(F32 t) {
  const F32 u = t + 1.0f;
  return logarithm(u) + (t - (u - 1.0f)) / u;
}

// log(1 + e^x).
DGM_INLINE F32 softplus(F32 x) { return at_least(x, 0.0f) + logarithm1p(exponential(-absolute(x))); }

DGM_INLINE F32 logistic(F32 x) {
  const F32 t = exponential(-absolute(x));
  return (x < 0.0f ? t : broadcast_float(1.0f)) / (t + 1.0f);
}

}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm
