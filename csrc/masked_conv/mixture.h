// CPU loops of the mixture of discretized logistics: a lane is a pixel.
//
// With u = (x - mean) / s, delta = h / s, L = delta - |u|, t = exp(-|L|) and q = exp(-2 delta), a level inside has
//   F(u + delta) - F(u - delta) = exp(min(L, 0)) (1 - q) s1 / ((s1 + q s2) (1 + t)),  (s1, s2) = L < 0 ? (1, t) : (t,
//   1),
// in which nothing cancels or overflows. The lowest level is F(u + delta), the highest F(delta - u): L without the
// absolute value, and q = 0. What is beside exp(min(L, 0)) is at least 1e-12, so that a component is exp(sum of L)
// times one quotient for all channels, and the mixture takes one logarithm a pixel.
#pragma once

#include "masked_conv/blocks.h"

namespace dgm::masked_conv {
namespace DGM_ISA_NAMESPACE {
namespace {

constexpr float kMinDelta = 1e-12f;    // below it 1 - q is 2 delta, and is taken out of the quotient
constexpr float kMaxDistance = 28.0f;  // beyond it t counts for nothing: the cube of exp(-28) is a normal number

// The rows of a tile: of x, of the parameters (in the backward pass then of their gradients), of each component the
// exponent and the quotient, and of each channel of each component 1 / s.
struct MixtureTile {
  const MixtureArgs& args;
  float *x, *parameters, *exponents, *quotients, *inverse_scales;
  const char* next = nullptr;  // the next tile's parameters in the tensor
  const char* to = nullptr;    // where this tile's gradients go
  int64_t row_bytes = 0;       // from one row of them to the next

  static int64_t rows_of_parameters(const MixtureArgs& a) {
    return a.mixtures * (1 + a.channels * (a.channels == 3 ? 3 : 2));
  }

  MixtureTile(const MixtureArgs& a, float* scratch) : args(a), x(scratch) {
    parameters = x + a.channels * kTilePixels;
    exponents = parameters + rows_of_parameters(a) * kTilePixels;
    quotients = exponents + a.mixtures * kTilePixels;
    inverse_scales = quotients + a.mixtures * kTilePixels;
  }

  void read(const Pixels& pixels) {
    read_tile(args.x, {args.channels, 0, args.channels}, pixels, x);
    const int64_t rows = rows_of_parameters(args);
    read_tile(args.parameters, {rows, 0, rows}, pixels, parameters);
    const int64_t behind = pixels.first + pixels.count;
    next = address(args.parameters, behind / args.plane * rows * args.plane + behind % args.plane);
    if (args.grad_parameters.data)
      to = address(args.grad_parameters, pixels.first / args.plane * rows * args.plane + pixels.first % args.plane);
    row_bytes = args.plane * element_size(args.parameters.dtype);
  }

  // Asks for the parameters of component k for a vector of the next tile, or for the lines that its gradients go to:
  // each is a row, too many for the processor to see them coming.
  template <int kChannels, bool kWrite>
  DGM_INLINE_METHOD void prefetch(int64_t k, int64_t v) const {
    const char* from = (kWrite ? to : next) + k * row_bytes + v * element_size(args.parameters.dtype);
    DGM_UNROLL
    for (int i = 0; i < 1 + kChannels * (kChannels == 3 ? 3 : 2); ++i)
      __builtin_prefetch(from + i * args.mixtures * row_bytes, kWrite);
  }

  // Parameter `which` (mean, log-scale, coefficient) of a channel: its row of the first component.
  template <int kChannels>
  DGM_INLINE_METHOD float* of_channel(int channel, int which) const {
    constexpr int kNumbers = kChannels == 3 ? 3 : 2;
    return parameters + (1 + channel * kNumbers + which) * args.mixtures * kTilePixels;
  }
};

// What of a component's parameters does not need x: 1 / s, and coefficients as tanh, in their place. Here several are
// in lockstep; beside all else of a component the processor would wait for one after the other.
template <int kChannels>
DGM_INLINE void prepare(const MixtureTile& tile, int64_t count) {
  const int64_t rows = tile.args.mixtures * kTilePixels;
  for (int channel = 0; channel < kChannels; ++channel) {
    const float* log_scales = tile.of_channel<kChannels>(channel, 1);
    float* inverse = tile.inverse_scales + channel * rows;
    for (int64_t row = 0; row < rows; row += kTilePixels)
      for_each_pack(count, [&](int64_t i, auto n) {
        const auto log_scale = at_least(load_pack<n()>(log_scales + row + i), kMinLogScale);
        store_pack(inverse + row + i, exponential_in_range(at_least(-log_scale, -105.0f)));
      });
    if constexpr (kChannels < 3) continue;
    float* coefficients = tile.of_channel<3>(channel, 2);
    for (int64_t row = 0; row < rows; row += kTilePixels)
      for_each_pack(count, [&](int64_t i, auto n) {
        store_pack(coefficients + row + i, hyperbolic_tangent(load_pack<n()>(coefficients + row + i)));
      });
  }
}

// A channel's value; `edge` is -1 at the lowest level, 1 at the highest, else 0.
struct Value {
  F32 x, edge;
};

DGM_INLINE Value value_of(F32 x, float half) {
  const F32 one = broadcast_float(1.0f);
  return {x, x < -1.0f + half ? -one : (x > 1.0f - half ? one : F32{})};
}

// One channel of one component at its value.
struct Logistic {
  F32 u, delta, inverse_scale;
  F32 widest;    // delta, or kMinDelta
  F32 mass, q;   // 1 - q and q; at an edge 1 and 0
  F32 distance;  // L
  F32 t, s1, s2;
  F32 exponent;
};

DGM_INLINE Logistic logistic_at(const Value& value, F32 mean, F32 log_scale, F32 inverse_scale, float half,
                                float max_log_scale) {
  Logistic l;
  l.inverse_scale = inverse_scale;
  l.u = (value.x - mean) * l.inverse_scale;
  l.delta = l.inverse_scale * half;
  l.widest = at_least(l.delta, kMinDelta);
  const auto inside = value.edge == 0.0f;
  l.distance = l.delta - (inside ? absolute(l.u) : l.u * value.edge);
  F32 whole;
  const F32 rest = reduced_expm1(at_least(l.widest * -2.0f, -105.0f), whole), power = power_of_two(whole);
  l.mass = inside ? (1.0f - power) - rest * power : broadcast_float(1.0f);
  l.q = inside ? rest * power + power : F32{};
  l.t = exponential_in_range(-at_most(absolute(l.distance), kMaxDistance));
  const auto outer = l.distance < 0.0f;
  l.s1 = outer ? broadcast_float(1.0f) : l.t;
  l.s2 = outer ? l.t : broadcast_float(1.0f);
  const F32 beyond = at_least(log_scale - max_log_scale, 0.0f);
  l.exponent = at_most(l.distance, 0.0f) - (inside ? beyond : F32{});
  return l;
}

// A component at a pixel. Coefficients are tanh of the parameters: of red in green, of red and of green in blue.
template <int kChannels>
struct Component {
  Logistic channels[kChannels];
  F32 coefficients[3];
  F32 exponent, quotient;
};

// The component whose parameters are in row k of each kind, for the vector at `at`.
template <int kChannels>
DGM_INLINE Component<kChannels> component_at(const MixtureTile& tile, const Value (&values)[kChannels], int64_t at,
                                             float max_log_scale) {
  Component<kChannels> c;
  F32 means[kChannels];
  for (int i = 0; i < kChannels; ++i) means[i] = load(tile.of_channel<kChannels>(i, 0) + at);
  if constexpr (kChannels == 3) {
    for (int i = 0; i < 3; ++i) c.coefficients[i] = load(tile.of_channel<3>(i, 2) + at);
    means[1] += c.coefficients[0] * values[0].x;
    means[2] += c.coefficients[1] * values[0].x + c.coefficients[2] * values[1].x;
  }
  F32 above = broadcast_float(1.0f), below = broadcast_float(1.0f);
  c.exponent = F32{};
  DGM_UNROLL
  for (int i = 0; i < kChannels; ++i) {
    const F32 log_scale = load(tile.of_channel<kChannels>(i, 1) + at);
    const F32 inverse_scale = load(tile.inverse_scales + i * tile.args.mixtures * kTilePixels + at);
    const Logistic l = logistic_at(values[i], means[i], log_scale, inverse_scale, tile.args.half, max_log_scale);
    c.channels[i] = l;
    c.exponent += l.exponent;
    above *= l.mass * l.s1;
    below *= (l.s1 + l.q * l.s2) * (l.t + 1.0f);
  }
  c.quotient = above / below;
  return c;
}

DGM_INLINE F32 largest(const float* rows, int64_t count) {
  F32 top = load(rows);
  for (int64_t k = 1; k < count; ++k) {
    const F32 next = load(rows + k * kTilePixels);
    top = next > top ? next : top;
  }
  return top;
}

// rows[k] = factors[k] exp(rows[k] - top), and their sum.
DGM_INLINE F32 exponentials(float* rows, const float* factors, int64_t count, F32 top) {
  F32 total = {};
  for (int64_t k = 0; k < count; ++k, rows += kTilePixels) {
    F32 term = exponential_in_range(at_least(load(rows) - top, -105.0f));
    if (factors) term *= load(factors + k * kTilePixels);
    store(rows, term);
    total += term;
  }
  return total;
}

// What a vector of pixels comes to. Rows of logits then hold exp(logit - top), rows of exponents the shares of `total`.
struct Mixed {
  F32 log_prob, total, prior_total;
};

template <int kChannels, class Visit>
DGM_INLINE Mixed mix(const MixtureTile& tile, int64_t v, const Visit& visit) {
  const MixtureArgs& a = tile.args;
  const float max_log_scale = logarithm(broadcast_float(a.half / kMinDelta))[0];
  Value values[kChannels];
  for (int i = 0; i < kChannels; ++i) values[i] = value_of(load(tile.x + i * kTilePixels + v), a.half);
  float* logits = tile.parameters + v;
  const F32 top = largest(logits, a.mixtures);
  for (int64_t k = 0; k < a.mixtures; ++k) {
    const int64_t at = k * kTilePixels + v;
    const Component<kChannels> c = component_at<kChannels>(tile, values, at, max_log_scale);
    store(tile.exponents + at, c.exponent + (load(tile.parameters + at) - top));
    store(tile.quotients + at, c.quotient);
    visit(at, values, c);
    tile.prefetch<kChannels, false>(k, v);
  }
  const F32 highest = largest(tile.exponents + v, a.mixtures);
  Mixed mixed;
  mixed.prior_total = exponentials(logits, nullptr, a.mixtures, top);
  mixed.total = exponentials(tile.exponents + v, tile.quotients + v, a.mixtures, highest);
  mixed.log_prob = highest + logarithm(mixed.total / mixed.prior_total);
  return mixed;
}

// ---- Backward

// The sign of d|u| / du, or of what is in the place of |u| at an edge.
DGM_INLINE F32 value_sign(const Value& value, F32 u) {
  const F32 one = broadcast_float(1.0f);
  return value.edge == 0.0f ? flip_sign(one, bit_cast<U32>(u)) : value.edge;
}

// Gradients of the logarithm of a component's share with respect to its parameters, in place of those.
template <int kChannels>
DGM_INLINE void component_gradient(const MixtureTile& tile, int64_t at, const Value (&values)[kChannels],
                                   const Component<kChannels>& c) {
  F32 to_mean[kChannels];
  DGM_UNROLL
  for (int i = 0; i < kChannels; ++i) {
    const Logistic& l = c.channels[i];
    const F32 inner = l.s1 + l.q * l.s2, outer = l.t + 1.0f, inverse = 1.0f / (inner * outer * l.mass);
    const F32 by_u = (l.q * l.s2 * l.s2 - l.s1 * l.s1) * l.mass * inverse;  // times the sign of u, or the edge
    const F32 signed_by_u = value_sign(values[i], l.u) * by_u;
    const F32 by_delta = (l.q * l.s2 * outer + l.s1 * inner) * l.mass * inverse;
    const F32 of_mass = 2.0f * l.widest * l.q * inner * outer * inverse;
    to_mean[i] = -l.inverse_scale * signed_by_u;
    float* log_scale = tile.of_channel<kChannels>(i, 1) + at;
    const F32 to_log_scale = -(l.u * signed_by_u + l.delta * by_delta + of_mass);
    store(log_scale, load(log_scale) < kMinLogScale ? F32{} : to_log_scale);
    store(tile.of_channel<kChannels>(i, 0) + at, to_mean[i]);
  }
  if constexpr (kChannels == 3) {
    const F32 to[3] = {to_mean[1] * values[0].x, to_mean[2] * values[0].x, to_mean[2] * values[1].x};
    for (int i = 0; i < 3; ++i)
      store(tile.of_channel<3>(i, 2) + at, to[i] * (1.0f - c.coefficients[i] * c.coefficients[i]));
  }
}

// Every row by its component's share of the mixture; of the logits also less their share of the prior.
template <int kChannels>
DGM_INLINE void scale_gradients(const MixtureTile& tile, int64_t v, const Mixed& mixed, F32 grad) {
  const int64_t mixtures = tile.args.mixtures;
  const F32 posterior = grad / mixed.total, prior = grad / mixed.prior_total;
  for (int64_t k = 0; k < mixtures; ++k) {
    const int64_t at = k * kTilePixels + v;
    const F32 share = load(tile.exponents + at) * posterior;
    store(tile.parameters + at, share - load(tile.parameters + at) * prior);
    for (int row = 1; row < 1 + kChannels * (kChannels == 3 ? 3 : 2); ++row) {
      float* place = tile.parameters + row * mixtures * kTilePixels + at;
      store(place, load(place) * share);
    }
  }
}

template <int kChannels>
DGM_NOINLINE void mixture_tile(const MixtureTile& tile, int64_t count, float* log_prob) {
  prepare<kChannels>(tile, count);
  for (int64_t v = 0; v < count; v += kWidth) store(log_prob + v, mix<kChannels>(tile, v, [](auto&&...) {}).log_prob);
}

template <int kChannels>
DGM_NOINLINE void mixture_backward_tile(const MixtureTile& tile, int64_t count, const float* grad) {
  prepare<kChannels>(tile, count);
  for (int64_t v = 0; v < count; v += kWidth) {
    const Mixed mixed = mix<kChannels>(tile, v, [&](int64_t at, const auto& values, const auto& component) {
      component_gradient(tile, at, values, component);
      tile.prefetch<kChannels, true>((at - v) / kTilePixels, v);
    });
    scale_gradients<kChannels>(tile, v, mixed, load(grad + v));
  }
}

}  // namespace

int64_t mixture_tile_pixels() { return kTilePixels; }

int64_t mixture_scratch(const MixtureArgs& a) {
  return (a.channels + MixtureTile::rows_of_parameters(a) + (2 + a.channels) * a.mixtures) * kTilePixels + kWidth;
}

void mixture(const MixtureArgs& a, float* scratch, int64_t begin, int64_t end) {
  MixtureTile tile(a, scratch);
  const auto run = a.channels == 3 ? mixture_tile<3> : mixture_tile<1>;
  alignas(64) float log_prob[kTilePixels];
  for (int64_t i = begin; i < end; ++i) {
    const Pixels pixels = pixels_of_tile(a.pixels, a.plane, i);
    tile.read(pixels);
    run(tile, pixels.count, log_prob);
    std::memcpy(a.log_prob + pixels.first, log_prob, pixels.count * sizeof(float));
  }
}

void mixture_backward(const MixtureArgs& a, float* scratch, int64_t begin, int64_t end) {
  MixtureTile tile(a, scratch);
  const auto run = a.channels == 3 ? mixture_backward_tile<3> : mixture_backward_tile<1>;
  const int64_t rows = MixtureTile::rows_of_parameters(a);
  alignas(64) float grad[kTilePixels] = {};
  for (int64_t i = begin; i < end; ++i) {
    const Pixels pixels = pixels_of_tile(a.pixels, a.plane, i);
    tile.read(pixels);
    std::memcpy(grad, a.grad + pixels.first, pixels.count * sizeof(float));
    run(tile, pixels.count, grad);
    write_tile(tile.parameters, a.grad_parameters, {rows, 0, rows}, pixels);
  }
}

}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::masked_conv
