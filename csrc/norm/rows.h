// Both passes of the normalisations over rows: one row is read from memory once and stays in the cache meanwhile.
#pragma once

#include <type_traits>

#include "norm/math.h"

namespace dgm::norm {
namespace DGM_ISA_NAMESPACE {
namespace {

// What the modulation makes of a normalised row: n factor + offset, with factor = weight (1 + scale) and
// offset = bias (1 + scale) + shift; null for 1 and 0.
class Modulation {
 public:
  explicit Modulation(int64_t size) : size_(size), stride_(padded(size)), memory_(7 * stride_) {}

  // For the rows of a sample; nothing changes from one sample to the next if there is no scale and shift.
  void enter(const RowsArgs& a, int64_t sample) {
    if (known_ && !a.scale.data && !a.shift.data && !a.gate.data) return;
    known_ = true;
    float* buffer = memory_.data();
    gate = read(a.gate, sample, 0, size_, buffer);
    const float* weight = read(a.weight, 0, size_, buffer + stride_);
    const float* bias = read(a.bias, 0, size_, buffer + 2 * stride_);
    const float* scale = read(a.scale, sample, 0, size_, buffer + 3 * stride_);
    const float* shift = read(a.shift, sample, 0, size_, buffer + 4 * stride_);
    factor = combine(weight, 1.0f, scale, nullptr, buffer + 5 * stride_);
    offset = combine(bias, 0.0f, scale, shift, buffer + 6 * stride_);
  }

  const float *gate = nullptr, *factor = nullptr, *offset = nullptr;

 private:
  // parameter (1 + scale) + added, where an absent parameter is the number `absent`.
  const float* combine(const float* parameter, float absent, const float* scale, const float* added, float* to) const {
    const bool scaled = scale && (parameter || absent != 0.0f);
    if (!scaled && !added) return parameter;
    for_each_vector(size_, [&](int64_t i, auto access) {
      F32 value = parameter ? access.load(parameter + i) : broadcast_float(absent);
      if (scaled) value = value + value * access.load(scale + i);
      if (added) value = value + access.load(added + i);
      access.store(to + i, value);
    });
    return to;
  }

  int64_t size_, stride_;
  Buffers memory_;
  bool known_ = false;
};

// Rows [first, last) of the sample of a unit, among all rows.
struct Part {
  int64_t sample, first, last;
  Part(const RowsArgs& a, int64_t unit) : sample(unit / a.parts) {
    const int64_t begin = unit % a.parts * kPartRows;
    first = sample * a.tokens + begin;
    last = first + (a.tokens - begin < kPartRows ? a.tokens - begin : kPartRows);
  }
};

// ---- Forward

// The statistics of h = residual + gate x, which goes to `h`.
DGM_NOINLINE Statistics add_residual(const RowsArgs& a, const Modulation& m, const float* x, const float* residual,
                                     float* h) {
  return statistics(a.size, a.rms, a.eps, [x, residual, h, gate = m.gate](int64_t i, auto access) {
    const F32 branch = access.load(x + i);
    const F32 value = access.load(residual + i) + (gate ? access.load(gate + i) * branch : branch);
    access.store(h + i, value);
    return value;
  });
}

// While a row is written the one behind it is asked for: the passes over a row in the cache leave memory idle.
template <class Whole>
DGM_NOINLINE void normalize_row(const RowsArgs& a, const Modulation& m, const Statistics& s, const float* h,
                                const float* x, const float* residual, float* y, float* kept) {
  // Copies: the compiler takes what is stored for what might change the arguments.
  const float mean = s.mean, rstd = s.rstd, rest = -s.low * s.rstd;
  const float *factor = m.factor, *offset = m.offset, *next = x + a.size, *next_residual = residual + a.size;
  for_each_vector<Whole>(a.size, [=](int64_t i, auto access) {
    __builtin_prefetch(next + i);
    const F32 from = access.load(h + i);
    F32 value = (from - mean) * rstd + rest;
    if (factor) value = value * access.load(factor + i);
    if (offset) value = value + access.load(offset + i);
    access.store(y + i, value);
    if (kept) {
      __builtin_prefetch(next_residual + i);
      access.store(kept + i, from);
    }
  });
}

DGM_INLINE void forward_row(const RowsArgs& a, const Modulation& m, int64_t row, float* buffers) {
  const int64_t size = a.size, index = row * size, stride = padded(size);
  const float *x = read(a.x, index, size, buffers), *residual = read(a.residual, index, size, buffers + stride);
  const float* h = x;
  float *y = place(a.y, index, buffers + 2 * stride), *kept = nullptr;
  Statistics s;
  if (!residual) {
    s = statistics(x, size, a.rms, a.eps);
  } else {
    float* sum = apart_from(y, buffers + 3 * stride);
    h = sum;
    s = add_residual(a, m, x, residual, sum);
    if (a.h.dtype == DType::Float32) {
      kept = place(a.h, index, nullptr);
    } else {  // what is normalised is h as it is kept
      write(a.h, index, size, sum);
      read({a.h.data, a.h.dtype}, index, size, sum);
      s = statistics(sum, size, a.rms, a.eps);
    }
  }
  if (a.mean) a.mean[row] = s.mean;
  a.rstd[row] = s.rstd;
  if (a.stream && is_line(y) && is_line(kept))
    normalize_row<Streamed>(a, m, s, h, x, residual, y, kept);
  else
    normalize_row<Full>(a, m, s, h, x, residual, y, kept);
  write(a.y, index, size, y);
}

// ---- Backward

// A row of every tensor that the backward pass reads and writes, as floats.
struct BackwardRow {
  const float *grad, *grad_h, *h, *x;
  float *to_h, *to_x;
  float mean, rstd, first, second;  // mean(g), mean(g n)
};

constexpr int kBackwardBuffers = 6;

DGM_INLINE BackwardRow open_row(const RowsArgs& a, int64_t row, float* buffers) {
  const int64_t size = a.size, index = row * size, stride = padded(size);
  return {read(a.grad, index, size, buffers),
          read(a.grad_h, index, size, buffers + stride),
          read(a.normalized, index, size, buffers + 2 * stride),
          read(a.x, index, size, buffers + 3 * stride),
          place(a.to_h, index, buffers + 4 * stride),
          place(a.to_x, index, buffers + 5 * stride),
          a.given_mean ? a.given_mean[row] : 0.0f,
          a.given_rstd[row],
          0.0f,
          0.0f};
}

DGM_NOINLINE void row_means(const RowsArgs& a, const Modulation& m, BackwardRow& r) {
  double sums[2];
  add_up(a.size, sums,
         [from = r.grad, h = r.h, mean = r.mean, factor = m.factor](int64_t i, auto access, F32(&terms)[2]) {
           const F32 grad = access.load(from + i), g = factor ? grad * access.load(factor + i) : grad;
           terms[0] = g;
           terms[1] = g * (access.load(h + i) - mean);
         });
  r.first = a.rms ? 0.0f : static_cast<float>(sums[0] / static_cast<double>(a.size));
  r.second = static_cast<float>(sums[1] * static_cast<double>(r.rstd) / static_cast<double>(a.size));
}

// Several rows in one pass, so that their sums are added up in registers before they go to `sums`.
template <int kRows, class Whole>
DGM_NOINLINE void finish_rows(const RowsArgs& a, const Modulation& m, const BackwardRow* given, float* sums) {
  BackwardRow r[kRows];  // copies: the compiler takes what is stored for what might change the arguments
  DGM_UNROLL
  for (int k = 0; k < kRows; ++k) r[k] = given[k];
  const int64_t size = a.size, ahead = kRows * size;
  const float *factor = m.factor, *gate = m.gate;
  const int kept = a.sums;
  const auto add = [](float* to, F32 value, auto access) {
    value = access.load(to) + value;
    if constexpr (std::is_same_v<decltype(access), Some>)
      access.store(to, value);
    else
      store(to, value);
  };
  for_each_vector<Whole>(size, [=, &r](int64_t i, auto access) {
    // Loads before stores: at the same place of a row the lower 12 bits of the addresses may agree (see apart_from).
    F32 s0 = {}, s1 = {}, s2 = {}, to_h[kRows];
    DGM_UNROLL
    for (int k = 0; k < kRows; ++k) {
      __builtin_prefetch(r[k].grad + ahead + i, 0, 2);
      __builtin_prefetch(r[k].h + ahead + i, 0, 2);
      const F32 grad = access.load(r[k].grad + i), n = (access.load(r[k].h + i) - r[k].mean) * r[k].rstd;
      const F32 g = factor ? grad * access.load(factor + i) : grad;
      to_h[k] = r[k].rstd * (g - r[k].first - n * r[k].second);
      if (r[k].grad_h) {
        __builtin_prefetch(r[k].grad_h + ahead + i, 0, 2);
        to_h[k] = to_h[k] + access.load(r[k].grad_h + i);
      }
      s0 += grad;
      s1 += grad * n;
      if (gate) {
        __builtin_prefetch(r[k].x + ahead + i, 0, 2);
        s2 += to_h[k] * access.load(r[k].x + i);
      }
    }
    DGM_UNROLL
    for (int k = 0; k < kRows; ++k) {
      access.store(r[k].to_h + i, to_h[k]);
      if (gate) access.store(r[k].to_x + i, to_h[k] * access.load(gate + i));
    }
    if (kept > 0) {
      add(sums + i, s0, access);
      add(sums + size + i, s1, access);
    }
    if (kept > 2) add(sums + 2 * size + i, s2, access);
  });
}

template <int kRows>
DGM_INLINE void backward_rows(const RowsArgs& a, const Modulation& m, int64_t row, float* buffers, float* sums) {
  BackwardRow r[kRows];
  bool lines = a.stream;
  for (int k = 0; k < kRows; ++k) {
    r[k] = open_row(a, row + k, buffers + k * kBackwardBuffers * padded(a.size));
    row_means(a, m, r[k]);
    lines = lines && is_line(r[k].to_h) && is_line(r[k].to_x);
  }
  if (lines)
    finish_rows<kRows, Streamed>(a, m, r, sums);
  else
    finish_rows<kRows, Full>(a, m, r, sums);
  for (int k = 0; k < kRows; ++k) {
    write(a.to_h, (row + k) * a.size, a.size, r[k].to_h);
    write(a.to_x, (row + k) * a.size, a.size, r[k].to_x);
  }
}

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::norm
