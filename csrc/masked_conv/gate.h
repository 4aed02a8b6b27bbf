// CPU loops of the gated activation, tanh(a) sigmoid(b).
#pragma once

#include "masked_conv/blocks.h"

namespace dgm::masked_conv {
namespace DGM_ISA_NAMESPACE {
namespace {

// With m = exp(-2 |a|) - 1 and e = exp(-b): tanh |a| = m / (-2 - m), sigmoid(b) = 1 / (1 + e), by one division.
template <class F>
DGM_INLINE F gated(F a, F b) {
  const F m = exponential_minus_one_in_range(at_least(absolute(a) * -2.0f, -20.0f));
  return flip_sign(m / ((-2.0f - m) * (exponential(-b) + 1.0f)), bit_cast<U32>(a));
}

template <class F>
struct GateGradient {
  F a, b;
};

// g s (1 - t^2) and g t s (1 - s). With q = exp(-2 |a|): 1 - t^2 = 4 q / (1 + q)^2, which keeps its digits.
template <class F>
DGM_INLINE GateGradient<F> gate_gradient(F g, F a, F b) {
  F whole;
  const F rest = reduced_expm1(at_least(absolute(a) * -2.0f, -105.0f), whole), power = power_of_two(whole);
  const F q = rest * power + power, m = rest * power + (power - 1.0f);
  const F e = exponential_in_range(at_most(at_least(-b, -105.0f), 80.0f));  // e^80: beyond it s and its slope are 0
  const F inverse = reciprocal((m + 2.0f) * (e + 1.0f));
  const F s = (m + 2.0f) * inverse, half = (e + 1.0f) * inverse, gs = g * s;
  return {gs * q * half * half * 4.0f, flip_sign(gs * e * s * (m * half), bit_cast<U32>(-a))};
}

// Where a row's features are in x, and its gate `half` elements behind; where its number for a channel is.
struct GateRow {
  int64_t features, half, channel;

  GateRow(const GateArgs& a, int64_t row) {
    const int64_t sample = row / a.rows_per_sample, rest = row % a.rows_per_sample;
    half = a.rows_per_sample * a.length;
    features = 2 * sample * half + rest * a.length;
    channel = 2 * sample * a.rows_per_sample + rest;
  }
};

// What is added to a row of x, where it is one number.
DGM_INLINE float number_at(const Operand& condition, int64_t index) {
  alignas(64) float value[kWidth];
  convert_to_floats(address(condition, index), condition.dtype, 1, value);
  return value[0];
}

// A block of features and gates, with the condition added.
class GateReader {
 public:
  GateReader(const GateArgs& a, int64_t row) : args_(a), row_(a, row) {
    if (!a.per_channel) return;
    to_features_ = number_at(a.condition, row_.channel);
    to_gate_ = number_at(a.condition, row_.channel + a.rows_per_sample);
  }

  const GateRow& row() const { return row_; }

  // Calls body(element of the block, features, gates).
  template <class Body>
  DGM_INLINE_METHOD void for_each(int64_t first, int64_t count, const Body& body) {
    const int64_t features = row_.features + first, gate = features + row_.half;
    const float *a = x_[0].read(args_.x, features, count), *b = x_[1].read(args_.x, gate, count);
    if (!args_.condition.data || args_.per_channel)
      return for_each_pack(count, [&](int64_t i, auto n) {
        body(i, load_pack<n()>(a + i) + to_features_, load_pack<n()>(b + i) + to_gate_);
      });
    const float* c = condition_[0].read(args_.condition, features, count);
    const float* d = condition_[1].read(args_.condition, gate, count);
    for_each_pack(count, [&](int64_t i, auto n) {
      body(i, load_pack<n()>(a + i) + load_pack<n()>(c + i), load_pack<n()>(b + i) + load_pack<n()>(d + i));
    });
  }

 private:
  const GateArgs& args_;
  GateRow row_;
  float to_features_ = 0.0f, to_gate_ = 0.0f;
  BlockReader x_[2], condition_[2];
};

// Calls body(row, first element, last element) for the parts.
template <class Body>
DGM_INLINE void for_each_part(const GateArgs& a, int64_t begin, int64_t end, const Body& body) {
  const int64_t blocks = (a.length + kChunk - 1) / kChunk;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t part = unit % a.parts, last = blocks * (part + 1) / a.parts * kChunk;
    body(unit / a.parts, blocks * part / a.parts * kChunk, last < a.length ? last : a.length);
  }
}

template <int N>
DGM_INLINE F32 sum_of(Pack<F32, N> x) {
  F32 sum = x.v[0];
  for (int i = 1; i < N; ++i) sum += x.v[i];
  return sum;
}

}  // namespace

void gate(const GateArgs& a, int64_t begin, int64_t end) {
  BlockWriter y;
  for_each_part(a, begin, end, [&](int64_t row, int64_t first, int64_t last) {
    GateReader reader(a, row);
    for (int64_t i = first; i < last; i += kChunk) {
      const int64_t count = last - i < kChunk ? last - i : kChunk;
      float* to = y.open(a.y, row * a.length + i, count);
      reader.for_each(i, count,
                      [&](int64_t j, auto features, auto gates) { store_pack(to + j, gated(features, gates)); });
      y.close();
    }
  });
}

void gate_backward(const GateArgs& a, int64_t begin, int64_t end) {
  BlockReader grads;
  BlockWriter to_features, to_gate;
  for_each_part(a, begin, end, [&](int64_t row, int64_t first, int64_t last) {
    GateReader reader(a, row);
    const GateRow& place = reader.row();
    Sum sums[2];
    for (int64_t i = first; i < last; i += kChunk) {
      const int64_t count = last - i < kChunk ? last - i : kChunk;
      const float* grad = grads.read(a.grad, row * a.length + i, count);
      float* first_half = to_features.open(a.grad_x, place.features + i, count);
      float* second_half = to_gate.open(a.grad_x, place.features + place.half + i, count);
      reader.for_each(i, count, [&](int64_t j, auto features, auto gates) {
        constexpr int kPack = sizeof features / sizeof(F32);
        const auto to_x = gate_gradient(load_pack<kPack>(grad + j), features, gates);
        store_pack(first_half + j, to_x.a);
        store_pack(second_half + j, to_x.b);
        if (a.per_channel) sums[0].add(sum_of(to_x.a)), sums[1].add(sum_of(to_x.b));  // behind the end grad is 0
      });
      to_features.close(), to_gate.close();
    }
    if (!a.per_channel) return;
    a.grad_condition[place.channel] = static_cast<float>(sums[0].value());
    a.grad_condition[place.channel + a.rows_per_sample] = static_cast<float>(sums[1].value());
  });
}

}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::masked_conv
