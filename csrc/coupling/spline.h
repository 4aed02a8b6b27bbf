// CPU loops of the rational-quadratic spline: a lane of a vector is an element, a vector one parameter of each.
#pragma once

#include "coupling/math.h"

namespace dgm::coupling {
namespace DGM_ISA_NAMESPACE {
namespace {

// ---- Rows of parameters to vectors and back

// Four floats of each of kWidth rows; block b of 128 bits in v[r] is from row 4 b + r.
DGM_INLINE void load_four(const float* from, int64_t stride, F32 (&v)[4]) {
  for (int r = 0; r < 4; ++r) {
#if defined(__AVX512F__)
    __m512 all = _mm512_castps128_ps512(_mm_loadu_ps(from + r * stride));
    all = _mm512_insertf32x4(all, _mm_loadu_ps(from + (4 + r) * stride), 1);
    all = _mm512_insertf32x4(all, _mm_loadu_ps(from + (8 + r) * stride), 2);
    v[r] = reinterpret_cast<F32>(_mm512_insertf32x4(all, _mm_loadu_ps(from + (12 + r) * stride), 3));
#else
    float* to = reinterpret_cast<float*>(&v[r]);
    for (int b = 0; b < kWidth / 4; ++b) std::memcpy(to + 4 * b, from + (4 * b + r) * stride, 4 * sizeof(float));
#endif
  }
}

DGM_INLINE void store_four(float* to, int64_t stride, const F32 (&v)[4]) {
  for (int r = 0; r < 4; ++r)
    for (int b = 0; b < kWidth / 4; ++b)
      std::memcpy(to + (4 * b + r) * stride, reinterpret_cast<const float*>(&v[r]) + 4 * b, 4 * sizeof(float));
}

// The `length` parameters of kWidth rows as vectors. The last group of four overlaps the one before it.
DGM_INLINE void transpose_in(const float* from, int64_t stride, int length, F32* to) {
  if (length < 4) {
    for (int k = 0; k < length; ++k)
      for (int lane = 0; lane < kWidth; ++lane) to[k][lane] = from[lane * stride + k];
    return;
  }
  for (int k = 0; k < length; k += 4) {
    const int first = k + 4 <= length ? k : length - 4;
    F32 v[4];
    load_four(from + first, stride, v);
    transpose4(v);
    for (int j = 0; j < 4; ++j) to[first + j] = v[j];
  }
}

DGM_INLINE void transpose_out(const F32* from, int length, float* to, int64_t stride) {
  if (length < 4) {
    for (int k = 0; k < length; ++k)
      for (int lane = 0; lane < kWidth; ++lane) to[lane * stride + k] = from[k][lane];
    return;
  }
  for (int k = 0; k < length; k += 4) {
    const int first = k + 4 <= length ? k : length - 4;
    F32 v[4] = {from[first], from[first + 1], from[first + 2], from[first + 3]};
    transpose4(v);
    store_four(to + first, stride, v);
  }
}

constexpr int kMaxLength = kMaxBins + 1;

// Rows [first, first + count) of parameters; behind them the last one again.
DGM_NOINLINE void load_parameters(const RowsIn& rows, int64_t first, int count, int length, F32* to) {
  const int size = element_size(rows.dtype);
  const char* from = static_cast<const char*>(rows.data) + first * rows.stride * size;
  if (rows.dtype == DType::Float32 && count == kWidth)
    return transpose_in(reinterpret_cast<const float*>(from), rows.stride, length, to);
  alignas(64) float buffer[kWidth * kMaxLength + kWidth];
  for (int lane = 0; lane < kWidth; ++lane) {  // a row is written in whole vectors: the next one covers what is behind
    const int row = lane < count ? lane : count - 1;
    convert_to_floats(from + row * rows.stride * size, rows.dtype, length, buffer + lane * length);
  }
  transpose_in(buffer, length, length, to);
}

DGM_NOINLINE void store_parameters(const F32* from, int64_t first, int count, int length, const RowsOut& rows) {
  char* to = static_cast<char*>(rows.data) + first * length * element_size(rows.dtype);
  if (rows.dtype == DType::Float32 && count == kWidth)
    return transpose_out(from, length, reinterpret_cast<float*>(to), length);
  alignas(64) float buffer[kWidth * kMaxLength + kWidth];
  transpose_out(from, length, buffer, length);
  convert_from_floats(buffer, count * length, rows.dtype, to);
}

// ---- From raw parameters to the bin of an element

// Raw sizes to exponentials; returns 1 / their sum, which is taken in four parts: one long sum would round more.
DGM_INLINE F32 soften(F32* raw, int bins) {
  F32 largest = raw[0], sums[4] = {};
  for (int k = 1; k < bins; ++k) largest = raw[k] > largest ? raw[k] : largest;
  for (int k = 0; k < bins; ++k) sums[k % 4] += raw[k] = exponential(raw[k] - largest);
  return 1.0f / ((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The parameters of kWidth elements: sizes as exponentials, derivatives raw.
struct Parameters {
  F32 widths[kMaxBins], heights[kMaxBins], derivatives[kMaxLength];
  F32 width_scale, height_scale;  // exponentials to shares of the interval
};

// The bin, and what the gradient of the softmax and of the derivatives needs to know of it.
struct Found {
  Bin<F32> bin;
  F32 number;                                     // of the bin
  F32 width_share, height_share;                  // of the interval, of what the softmax divides
  F32 width_shares_before, height_shares_before;  // of the bins before it, together
  F32 raw_d0, raw_d1;
};

// The knots along one axis. Shares of the interval are summed as whole numbers of 2^-30, from the middle: the sum is
// then exact, and a knot is rounded once, where a sum of floats would lose what a steep bin makes much of.
class Axis {
 public:
  DGM_INLINE_METHOD Axis(float bound, float least, int bins, F32 first)
      : unit_(bound * 0x1p-29f), least_(least), free_(1.0f - bins * least), whole_(U32{} - (1u << 29)), share(first) {
    low = knot = broadcast_float(-bound);
    before = sum_ = F32{};
  }

  // To the knot behind a bin of this share of what the softmax divides.
  DGM_INLINE_METHOD void advance(F32 share) {
    whole_ += bit_cast<U32>(nearest((least_ + free_ * share) * 0x1p30f));
    knot = unit_ * to_float(bit_cast<I32>(whole_));
    sum_ += share;
  }

  template <class Mask>
  DGM_INLINE_METHOD void enter(Mask past, F32 next) {
    low = past ? knot : low;
    share = past ? next : share;
    before = past ? sum_ : before;
  }

  DGM_INLINE_METHOD F32 size() const { return (least_ + free_ * share) * (unit_ * 0x1p30f); }

 private:
  float unit_, least_, free_;
  U32 whole_;  // unsigned: what NaN is converted to may overflow
  F32 sum_;

 public:
  F32 low, knot;      // lower end of the bin; the knot that was last reached
  F32 share, before;  // of the bin, and of those before it
};

// Finds the bin in which `u` lies, along x or, with kAlongY, along y.
template <bool kAlongY>
DGM_INLINE Found find_bin(const SplineArgs& a, const Parameters& p, F32 u) {
  F32 w_share = p.widths[0] * p.width_scale, h_share = p.heights[0] * p.height_scale;
  Axis x(a.bound, a.min_width, a.bins, w_share), y(a.bound, a.min_height, a.bins, h_share);
  // With tails the derivatives of the first and the last knot are not parameters.
  const int shift = a.tails ? 1 : 0, last = a.bins - 2 * shift;
  F32 number = {}, raw_d0 = p.derivatives[0], raw_d1 = p.derivatives[1 - shift];
  for (int k = 1; k < a.bins; ++k) {
    x.advance(w_share);
    y.advance(h_share);
    const auto past = u >= (kAlongY ? y.knot : x.knot);
    w_share = p.widths[k] * p.width_scale, h_share = p.heights[k] * p.height_scale;
    x.enter(past, w_share);
    y.enter(past, h_share);
    number = past ? broadcast_float(static_cast<float>(k)) : number;
    raw_d0 = past ? p.derivatives[k - shift] : raw_d0;
    raw_d1 = past ? p.derivatives[k + 1 - shift < last ? k + 1 - shift : last] : raw_d1;
  }
  F32 d0 = a.min_derivative + softplus(raw_d0), d1 = a.min_derivative + softplus(raw_d1);
  if (a.tails) {
    d0 = number == 0.0f ? broadcast_float(1.0f) : d0;
    d1 = number == static_cast<float>(a.bins - 1) ? broadcast_float(1.0f) : d1;
  }
  const F32 w = x.size(), h = y.size();
  return {{w, h, x.low, y.low, d0, d1, h / w}, number, x.share, y.share, x.before, y.before, raw_d0, raw_d1};
}

DGM_INLINE void soften(const SplineArgs& a, Parameters& p) {
  p.width_scale = soften(p.widths, a.bins);
  p.height_scale = soften(p.heights, a.bins);
}

DGM_INLINE void load_all_parameters(const SplineArgs& a, int64_t first, int count, Parameters& p) {
  load_parameters(a.widths, first, count, a.bins, p.widths);
  load_parameters(a.heights, first, count, a.bins, p.heights);
  load_parameters(a.derivatives, first, count, a.tails ? a.bins - 1 : a.bins + 1, p.derivatives);
  soften(a, p);
}

DGM_INLINE int elements_left(const SplineArgs& a, int64_t first) {
  const int64_t left = a.batch * a.elements - first;
  return left < kWidth ? static_cast<int>(left) : kWidth;
}

DGM_INLINE F32 load_elements(const Operand& operand, int64_t first, int count) {
  alignas(64) float buffer[kWidth];
  convert_to_floats(static_cast<const char*>(operand.data) + first * element_size(operand.dtype), operand.dtype, count,
                    buffer);
  return load(buffer);
}

DGM_INLINE void store_elements(const Output& output, int64_t first, int count, F32 value) {
  alignas(64) float buffer[kWidth];
  store(buffer, value);
  convert_from_floats(buffer, count, output.dtype,
                      static_cast<char*>(output.data) + first * element_size(output.dtype));
}

DGM_INLINE auto is_inside(F32 u, float bound) { return absolute(u) <= bound; }

// y and log dy/dx (kInverse: x and log dx/dy) of kWidth elements.
template <bool kInverse>
DGM_INLINE void transform(const SplineArgs& a, const Parameters& p, F32 u, F32& result, F32& slope) {
  const auto inside = is_inside(u, a.bound);
  const Bin<F32> bin = find_bin<kInverse>(a, p, u).bin;
  const Place<F32> place = kInverse ? place_of_y(bin, u) : place_of_x(bin, u);
  const F32 nan = broadcast_float(__builtin_nanf(""));
  const F32 inner = log_slope(bin, place);
  const F32 moved = kInverse ? bin.x_k + bin.w * place.xi : y_at(bin, place);
  result = inside ? at_most(at_least(moved, -a.bound), a.bound) : (a.tails ? u : nan);  // rounding must not leave it
  slope = inside ? (kInverse ? -inner : inner) : (a.tails ? (u == u ? F32{} : u) : nan);
}

DGM_NOINLINE void spline_block(const SplineArgs& a, int64_t first) {
  Parameters p;
  const int count = elements_left(a, first);
  load_all_parameters(a, first, count, p);
  const F32 u = load_elements(a.x, first, count);
  F32 result, slope;
  if (a.inverse)
    transform<true>(a, p, u, result, slope);
  else
    transform<false>(a, p, u, result, slope);
  store_elements(a.y, first, count, result);
  std::memcpy(a.log_slopes + first, &slope, count * sizeof(float));
}

// ---- Backward

// Gradients of the raw sizes, in place of their exponentials: through the knots (those behind bin k move with it), then
// the softmax. `to_low` and `to_size` are the gradients of the bin's lower knot and of its size.
DGM_INLINE void size_gradients(F32* sizes, int bins, F32 scale, float range, F32 number, F32 share, F32 before,
                               F32 to_low, F32 to_size) {
  const F32 mean = to_low * before + to_size * share;
  for (int k = 0; k < bins; ++k) {
    const float place = static_cast<float>(k);
    const F32 direct = number > place ? to_low : (number == place ? to_size : F32{});
    sizes[k] = range * (sizes[k] * scale) * (direct - mean);
  }
}

DGM_INLINE void derivative_gradients(const SplineArgs& a, F32* derivatives, const Found& f, const BinGrad<F32>& grad) {
  const int shift = a.tails ? 1 : 0, length = a.bins + 1 - 2 * shift;
  const F32 to_raw0 = grad.d0 * logistic(f.raw_d0), to_raw1 = grad.d1 * logistic(f.raw_d1);
  for (int k = 0; k < length; ++k) {
    const float knot = static_cast<float>(k + shift);
    derivatives[k] = f.number == knot ? to_raw0 : (f.number + 1.0f == knot ? to_raw1 : F32{});
  }
}

// Gradients of the parameters and of the input.
DGM_INLINE BinGrad<F32> element_gradient(const SplineArgs& a, const Bin<F32>& bin, F32 input, F32 g, F32 l) {
  if (!a.inverse) {
    const Place<F32> place = place_of_x(bin, input);
    return bin_gradient(bin, place, g, l, x_gradient(bin, place, g, l));
  }
  // x = f^-1(y): what reaches x, the share through log f'(x) included, reaches y divided by f', and the parameters as
  // through y = f(x) with the sign turned. To those the gradient of x is -g: the shares through the logarithm cancel.
  const Place<F32> place = place_of_y(bin, input);
  const F32 zero = {}, one = broadcast_float(1.0f);
  const F32 curvature = x_gradient(bin, place, zero, one), slope = x_gradient(bin, place, one, zero);
  const F32 to_y = (g - l * curvature) / slope;
  BinGrad<F32> grad = bin_gradient(bin, place, -to_y, -l, -g);
  grad.x = to_y;
  return grad;
}

DGM_NOINLINE void spline_backward_block(const SplineArgs& a, int64_t first) {
  Parameters p;
  const int count = elements_left(a, first);
  load_all_parameters(a, first, count, p);
  const F32 input = load_elements(a.x, first, count), g = load_elements(a.grad, first, count);
  F32 l = {};
  if (a.grad_logdet)
    for (int lane = 0; lane < count; ++lane) l[lane] = a.grad_logdet[(first + lane) / a.elements];
  const auto inside = is_inside(input, a.bound);
  const Found f = a.inverse ? find_bin<true>(a, p, input) : find_bin<false>(a, p, input);
  BinGrad<F32> grad = element_gradient(a, f.bin, input, g, l);
  const F32 nan = broadcast_float(__builtin_nanf(""));
  const F32 to_x = inside ? grad.x : (a.tails ? g : nan);
  const auto only_inside = [&](F32& x) { x = inside ? x : F32{}; };
  only_inside(grad.w), only_inside(grad.h), only_inside(grad.x_k), only_inside(grad.y_k);
  only_inside(grad.d0), only_inside(grad.d1);
  const float interval = 2.0f * a.bound;
  size_gradients(p.widths, a.bins, p.width_scale, interval * (1.0f - a.bins * a.min_width), f.number, f.width_share,
                 f.width_shares_before, grad.x_k, grad.w);
  size_gradients(p.heights, a.bins, p.height_scale, interval * (1.0f - a.bins * a.min_height), f.number, f.height_share,
                 f.height_shares_before, grad.y_k, grad.h);
  derivative_gradients(a, p.derivatives, f, grad);
  store_elements(a.grad_x, first, count, to_x);
  store_parameters(p.widths, first, count, a.bins, a.grad_widths);
  store_parameters(p.heights, first, count, a.bins, a.grad_heights);
  store_parameters(p.derivatives, first, count, a.tails ? a.bins - 1 : a.bins + 1, a.grad_derivatives);
}

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::coupling
