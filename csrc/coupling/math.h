// Formulas of the coupling op, templated on the scalar F: a CPU vector of float32. (On GPUs the op is Triton's.)
#pragma once

#include "common/elementary.h"
#include "coupling/args.h"

namespace dgm::coupling {
namespace DGM_ISA_NAMESPACE {

using namespace ::dgm::DGM_ISA_NAMESPACE;

constexpr float kSoftclip = 6.9077552790f;  // ln 1000: bound of the log-scale

// s, the logarithm of the scale, and exp(s), or for the inverse exp(-s).
template <class F>
struct LogScale {
  F s, factor;
};

// b = raw + 2, t = exp(-|b|): sigmoid(b) = (b < 0 ? t : 1) / (1 + t).
template <bool kInverse>
DGM_INLINE LogScale<F32> log_of_sigmoid(F32 raw) {
  const F32 b = raw + 2.0f, t = exponential(-absolute(b)), u = t + 1.0f;
  const F32 top = b < 0.0f ? t : broadcast_float(1.0f);
  return {at_most(b, 0.0f) - logarithm1p(t), kInverse ? u / top : top / u};
}

template <bool kInverse, int N>
DGM_INLINE LogScale<Pack<F32, N>> log_of_sigmoid(Pack<F32, N> raw) {
  LogScale<Pack<F32, N>> result;
  DGM_EACH {
    const LogScale<F32> one = log_of_sigmoid<kInverse>(raw.v[i]);
    result.s.v[i] = one.s;
    result.factor.v[i] = one.factor;
  }
  return result;
}

template <ScaleMap kMap, bool kInverse, class F>
DGM_INLINE LogScale<F> log_scale(F raw) {
  if constexpr (kMap == ScaleMap::Tanh) {
    const F s = hyperbolic_tangent(raw);
    return {s, exponential_of_unit(kInverse ? -s : s)};
  } else if constexpr (kMap == ScaleMap::Sigmoid) {
    return log_of_sigmoid<kInverse>(raw);
  } else if constexpr (kMap == ScaleMap::Softclip) {
    const F s = raw / (absolute(raw) * (1.0f / kSoftclip) + 1.0f);
    return {s, exponential_in_range(kInverse ? -s : s)};
  } else {
    return {raw, exponential(kInverse ? -raw : raw)};
  }
}

// The derivative of s by the raw parameter.
template <ScaleMap kMap>
DGM_INLINE F32 log_scale_slope(F32 raw, F32 s) {
  if constexpr (kMap == ScaleMap::Tanh) return 1.0f - s * s;
  if constexpr (kMap == ScaleMap::Sigmoid) return logistic(-(raw + 2.0f));
  if constexpr (kMap == ScaleMap::Softclip) {
    const F32 ratio = 1.0f - absolute(s) * (1.0f / kSoftclip);
    return ratio * ratio;
  }
  return broadcast_float(1.0f);
}

// ---- Rational-quadratic spline (Durkan et al., 2019)

// One bin: its size, lower left corner and the derivatives at its ends; s = h / w.
template <class F>
struct Bin {
  F w, h, x_k, y_k, d0, d1, s;
};

// Where in the bin: xi and 1 - xi, each with all its digits.
template <class F>
struct Place {
  F xi, rest;
};

template <class F>
DGM_INLINE F clamp_to_unit(F x) {
  return at_most(at_least(x, 0.0f), 1.0f);
}

template <class F>
DGM_INLINE Place<F> place_of_x(const Bin<F>& b, F x) {
  const F xi = clamp_to_unit((x - b.x_k) / b.w);
  return {xi, 1.0f - xi};
}

// Solves the quadratic: with root^2 = r^2 + 4 s^2 theta (1 - theta), a sum of squares,
// xi = 2 s theta / (2 s theta + root + r) and 1 - xi = 2 s (1 - theta) / (2 s (1 - theta) + root - r). That of the two
// is taken in which the root and r have one sign.
template <class F>
DGM_INLINE Place<F> place_of_y(const Bin<F>& b, F y) {
  const F theta = clamp_to_unit((y - b.y_k) / b.h), up = 1.0f - theta;
  const F r = b.d0 * up - b.d1 * theta;
  const F large = square_root(r * r + 4.0f * b.s * b.s * theta * up) + absolute(r);
  const auto rising = r >= 0.0f;  // xi = part / (part + large), else 1 - xi is
  const F part = 2.0f * b.s * (rising ? theta : up), sum = part + large;
  return {(rising ? part : large) / sum, (rising ? large : part) / sum};
}

template <class F>
DGM_INLINE F denominator(const Bin<F>& b, F mixed) {
  return b.s * (1.0f - 2.0f * mixed) + (b.d0 + b.d1) * mixed;
}

template <class F>
DGM_INLINE F slope_numerator(const Bin<F>& b, const Place<F>& p, F mixed) {
  return b.d1 * p.xi * p.xi + 2.0f * b.s * mixed + b.d0 * p.rest * p.rest;
}

// log dy/dx, equation 5.
template <class F>
DGM_INLINE F log_slope(const Bin<F>& b, const Place<F>& p) {
  const F mixed = p.xi * p.rest, ratio = b.s / denominator(b, mixed);
  return logarithm(slope_numerator(b, p, mixed) * ratio * ratio);
}

// y, equation 4.
template <class F>
DGM_INLINE F y_at(const Bin<F>& b, const Place<F>& p) {
  return b.y_k + b.h * p.xi * (b.s * p.xi + b.d0 * p.rest) / denominator(b, p.xi * p.rest);
}

template <class F>
struct BinGrad {
  F x, w, h, x_k, y_k, d0, d1;
};

// The gradient of g y + l log(dy/dx) with respect to x.
template <class F>
DGM_INLINE F x_gradient(const Bin<F>& b, const Place<F>& p, F g, F l) {
  const F q = p.xi * p.rest, turn = p.rest - p.xi;  // dq / dxi
  const F inverse_d = 1.0f / denominator(b, q), m = slope_numerator(b, p, q);
  const F to_xi =
      g * b.h * b.s * m * inverse_d * inverse_d +
      2.0f * l * ((b.d1 * p.xi + b.s * turn - b.d0 * p.rest) / m - (b.d0 + b.d1 - 2.0f * b.s) * turn * inverse_d);
  return to_xi / b.w;
}

// The others; `to_x` is the one with respect to x, on which those of the bin's place depend.
template <class F>
DGM_INLINE BinGrad<F> bin_gradient(const Bin<F>& b, const Place<F>& p, F g, F l, F to_x) {
  const F q = p.xi * p.rest, inverse_d = 1.0f / denominator(b, q), flat = 1.0f - 2.0f * q;
  const F a = p.xi * (b.s * p.xi + b.d0 * p.rest) * inverse_d;  // y = y_k + h a
  const F gh = g * b.h * inverse_d, l_m = l / slope_numerator(b, p, q), l_d = 2.0f * l * inverse_d;
  const F to_s =
      gh * q * inverse_d * (b.d1 * p.xi * p.xi - b.d0 * p.rest * p.rest) + 2.0f * (l_m * q + l / b.s) - l_d * flat;
  BinGrad<F> grad;
  grad.x = to_x;
  grad.x_k = -to_x;
  grad.w = -to_x * p.xi - to_s * b.s / b.w;
  grad.h = g * a + to_s / b.w;
  grad.y_k = g;
  grad.d0 = gh * q * (1.0f - a) + l_m * p.rest * p.rest - l_d * q;
  grad.d1 = l_m * p.xi * p.xi - gh * q * a - l_d * q;
  return grad;
}

}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::coupling
