// Both passes of group norm with SiLU: a group is read from memory once and stays in the cache where it fits.
#pragma once

#include "norm/math.h"

namespace dgm::norm {
namespace DGM_ISA_NAMESPACE {
namespace {

// What SiLU gets in a channel is (x - mean) slope + offset.
struct Channel {
  float factor, slope, offset;  // factor = weight (1 + scale), slope = rstd factor
};

DGM_INLINE float one(const Operand& operand, int64_t index, float absent) {
  if (!operand.data) return absent;
  float value[kWidth];
  convert_to_floats(static_cast<const char*>(at(operand, index)), operand.dtype, 1, value);
  return value[0];
}

DGM_NOINLINE Channel channel_of(const GroupArgs& a, int64_t sample, int64_t channel, const Statistics& s) {
  const float weight = one(a.weight, channel, 1.0f), bias = one(a.bias, channel, 0.0f);
  const float scale = 1.0f + one({a.scale.data, a.scale.dtype}, sample * a.scale.stride + channel, 0.0f);
  const float shift = one({a.shift.data, a.shift.dtype}, sample * a.shift.stride + channel, 0.0f);
  const float factor = weight * scale, slope = factor * s.rstd;
  return {factor, slope, bias * scale + shift - s.low * slope};
}

// A group: its first element, and its channels.
struct Group {
  int64_t sample, first_channel, channels, index, size;
  Group(const GroupArgs& a, int64_t unit)
      : sample(unit / a.groups),
        first_channel(unit % a.groups * (a.channels / a.groups)),
        channels(a.channels / a.groups),
        index((sample * a.channels + first_channel) * a.elements),
        size(channels * a.elements) {}
};

// 1 / q for q in [1, 2^127], within 2 ulp: a division takes as long as all the rest of SiLU.
DGM_INLINE F32 reciprocal(F32 q) {
#if defined(__AVX512F__)
  const F32 r = reinterpret_cast<F32>(_mm512_rcp14_ps(reinterpret_cast<__m512>(q)));
  return r + r * (1.0f - q * r);
#else
  return 1.0f / q;
#endif
}

template <int N>
DGM_INLINE Pack<F32, N> reciprocal(Pack<F32, N> q) {
  DGM_EACH q.v[i] = reciprocal(q.v[i]);
  return q;
}

constexpr float kMinusLog2E = -1.44269504088896340736f;

// sigmoid(z) from u = -z log2(e), within 2^-23: 1 / (1 + 2^u), with 2^u = 2^n 2^r and a minimax polynomial for
// |r| <= 1/2, relative error 9e-8. The rounding of u counts little: where the exponential is sensitive to it, the
// sigmoid is not, or is small. Beyond |u| = 126 it stays what it is there.
template <class F>
DGM_INLINE F sigmoid_of_power(F u) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  u = at_most(at_least(u, -126.0f), 126.0f);
  const F n = (u + kShift) - kShift, r = u - n;
  F p = r * 0.0013264727f + 0.009671513f;
  p = p * r + 0.055507336f;
  p = p * r + 0.24022242f;
  p = p * r + 0.693147f;
  return reciprocal(scale_by_power(p * r + 1.0f, n) + 1.0f);
}

template <class Whole>
DGM_NOINLINE void silu_channel(const float* x, int64_t ahead, int64_t count, const Channel& c, float mean, float* y) {
  const float slope = c.slope, offset = c.offset, steep = slope * kMinusLog2E, moved = offset * kMinusLog2E;
  int64_t i = 0;
  for (; i + kLockstep * kWidth <= count; i += kLockstep * kWidth) {
    DGM_UNROLL
    for (int j = 0; j < kLockstep; ++j) __builtin_prefetch(x + ahead + i + j * kWidth, 0, 2);
    const auto apart = load_pack<kLockstep>(x + i) - mean;
    const auto value = (apart * slope + offset) * sigmoid_of_power(apart * steep + moved);
    DGM_UNROLL
    for (int j = 0; j < kLockstep; ++j) Whole{}.store(y + i + j * kWidth, value.v[j]);
  }
  for_each_vector(count - i, [&](int64_t j, auto access) {
    const F32 apart = access.load(x + i + j) - mean;
    access.store(y + i + j, (apart * slope + offset) * sigmoid_of_power(apart * steep + moved));
  });
}

DGM_INLINE void forward_group(const GroupArgs& a, int64_t unit, float* buffers) {
  const Group g(a, unit);
  const float* x = read(a.x, g.index, g.size, buffers);
  float* y = place(a.y, g.index, buffers + padded(g.size));
  const Statistics s = statistics(x, g.size, false, a.eps);
  a.mean[unit] = s.mean;
  a.rstd[unit] = s.rstd;
  for (int64_t i = 0; i < g.channels; ++i) {
    const int64_t first = i * a.elements;
    const Channel c = channel_of(a, g.sample, g.first_channel + i, s);
    const auto run = a.stream && is_line(y + first) ? silu_channel<Streamed> : silu_channel<Full>;
    run(x + first, g.size, a.elements, c, s.mean, y + first);
  }
  write(a.y, g.index, g.size, y);
}

// ---- Backward

// The gradient of what SiLU gets to `to`; its sum, and that with the normalised x, to `sums`.
DGM_NOINLINE void channel_gradient(const float* grad, const float* x, int64_t count, const Channel& c,
                                   const Statistics& s, float* to, double (&sums)[2]) {
  const float mean = s.mean, slope = c.slope, offset = c.offset;
  const float steep = slope * kMinusLog2E, moved = offset * kMinusLog2E;
  sums[0] = sums[1] = 0.0;
  for (int64_t first = 0; first < count; first += kChunk) {
    const int64_t length = count - first < kChunk ? count - first : kChunk;
    double part[2];
    const auto term = [=](int64_t j, auto access, F32(&terms)[2]) {
      const int64_t i = first + j;
      const F32 apart = access.load(x + i) - mean, z = apart * slope + offset;
      const F32 sigmoid = sigmoid_of_power(apart * steep + moved);
      const F32 g = access.load(grad + i) * sigmoid * (z * (1.0f - sigmoid) + 1.0f);
      access.store(to + i, g);
      terms[0] = g;
      terms[1] = g * apart;
    };
    add_up(length, part, term);
    sums[0] += part[0];
    sums[1] += part[1] * static_cast<double>(s.rstd);
  }
}

// rstd (a g - first - n second). Meanwhile the next group, `ahead` elements on, is asked for.
template <class Whole>
DGM_NOINLINE void finish_channel(const float* x, const float* g, const float* grad, int64_t ahead, int64_t count,
                                 const Channel& c, const Statistics& s, float first, float second, float* to) {
  const float constant = first * s.rstd, rate = second * s.rstd * s.rstd, mean = s.mean, slope = c.slope;
  for_each_vector<Whole>(count, [=](int64_t i, auto access) {
    __builtin_prefetch(x + ahead + i, 0, 2);
    __builtin_prefetch(grad + ahead + i, 0, 2);
    const F32 apart = access.load(x + i) - mean;
    access.store(to + i, access.load(g + i) * slope - apart * rate - constant);
  });
}

constexpr int kGroupBuffers = 4;

DGM_INLINE void backward_group(const GroupArgs& a, int64_t unit, float* buffers) {
  const Group g(a, unit);
  const int64_t stride = padded(g.size);
  const float* grad = read(a.grad, g.index, g.size, buffers);
  const float* x = read(a.x, g.index, g.size, buffers + stride);
  float* to_x = place(a.to_x, g.index, buffers + 2 * stride);
  // Where the result goes, if it is stored by way of the cache: its lines come while the processor is busy with
  // arithmetic.
  float* inner = a.stream ? apart_from(to_x, buffers + 3 * stride) : to_x;
  const Statistics s = {a.given_mean[unit], 0.0f, a.given_rstd[unit]};
  float* partials = a.partials + 2 * g.sample * a.channels + g.first_channel;
  double first = 0.0, second = 0.0;
  for (int64_t i = 0; i < g.channels; ++i) {
    const Channel c = channel_of(a, g.sample, g.first_channel + i, s);
    const int64_t at = i * a.elements;
    double sums[2];
    channel_gradient(grad + at, x + at, a.elements, c, s, inner + at, sums);
    partials[i] = static_cast<float>(sums[0]);
    partials[a.channels + i] = static_cast<float>(sums[1]);
    first += sums[0] * static_cast<double>(c.factor);
    second += sums[1] * static_cast<double>(c.factor);
  }
  first /= static_cast<double>(g.size);
  second /= static_cast<double>(g.size);
  for (int64_t i = 0; i < g.channels; ++i) {
    const int64_t at = i * a.elements;
    const auto run = a.stream && is_line(to_x + at) ? finish_channel<Streamed> : finish_channel<Full>;
    run(x + at, inner + at, grad + at, g.size, a.elements, channel_of(a, g.sample, g.first_channel + i, s), s,
        static_cast<float>(first), static_cast<float>(second), to_x + at);
  }
  write(a.to_x, g.index, g.size, to_x);
}

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::norm
