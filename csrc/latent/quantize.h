// CPU loops of vector quantisation: a tile of rows against panels of codes, whose distances stay in registers.
#pragma once

#include "latent/tril.h"

namespace dgm::latent {
namespace DGM_ISA_NAMESPACE {
namespace {

static_assert(kCodeRows % kTile == 0);

// The codes less their mean, a panel after the other: [feature][code of the panel], then |e|^2 / 2 of each, infinite
// where there is no code.
DGM_INLINE int64_t panel_size(int64_t features) { return (features + 1) * kPanel; }

DGM_NOINLINE void pack(const QuantizeArgs& a, float* mean, float* packed) {
  Array<float> code(a.features + kBlock);
  Array<double> sums(a.features);
  const RowsIn codebook = {a.codebook.data, a.codebook.dtype, a.features};
  for (int64_t k = 0; k < a.codes; ++k) {
    const float* e = floats_at(codebook, k * a.features, a.features, code.data());
    for (int64_t d = 0; d < a.features; ++d) sums[d] += static_cast<double>(e[d]);
  }
  for (int64_t d = 0; d < a.features; ++d) mean[d] = static_cast<float>(sums[d] / static_cast<double>(a.codes));
  const int64_t panels = (a.codes + kPanel - 1) / kPanel;
  for (int64_t k = 0; k < panels * kPanel; ++k) {
    float* to = packed + k / kPanel * panel_size(a.features) + k % kPanel;
    const bool exists = k < a.codes;
    const float* e = exists ? floats_at(codebook, k * a.features, a.features, code.data()) : nullptr;
    double squares = 0.0;
    for (int64_t d = 0; d < a.features; ++d) {
      const float shifted = exists ? e[d] - mean[d] : 0.0f;
      to[d * kPanel] = shifted;
      squares += static_cast<double>(shifted) * static_cast<double>(shifted);
    }
    to[a.features * kPanel] = exists ? static_cast<float>(0.5 * squares) : __builtin_inff();
  }
}

// The least value of every lane and its code, of kRows rows.
template <int kRows>
struct Nearest {
  F32 value[kRows][2];
  I32 code[kRows][2];
};

DGM_INLINE I32 lane_numbers() {
  I32 lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = i;
  return lanes;
}

// `x` is [feature][kTileRow].
template <int kRows>
DGM_INLINE void panel_distances(const float* x, const float* panel, int64_t features, F32 (&s)[kRows][2]) {
  const float* norms = panel + features * kPanel;
  DGM_UNROLL
  for (int m = 0; m < kRows; ++m) s[m][0] = load(norms), s[m][1] = load(norms + kWidth);
  for (int64_t d = 0; d < features; ++d, x += kTileRow, panel += kPanel) {
    const F32 low = load(panel), high = load(panel + kWidth);
    DGM_UNROLL
    for (int m = 0; m < kRows; ++m) {
      s[m][0] -= low * x[m];
      s[m][1] -= high * x[m];
    }
  }
}

template <int kRows>
DGM_INLINE int64_t least_of(const Nearest<kRows>& nearest, int m) {
  float least = __builtin_inff();
  int32_t code = 0;
  for (int half = 0; half < 2; ++half)
    for (int lane = 0; lane < kWidth; ++lane) {
      const float value = nearest.value[m][half][lane];
      const int32_t candidate = nearest.code[m][half][lane];
      if (value < least || (value == least && candidate < code)) least = value, code = candidate;
    }
  return code;
}

template <int kRows>
DGM_NOINLINE void nearest_codes(const QuantizeArgs& a, const float* x, int64_t* indices) {
  Nearest<kRows> nearest;
  for (int m = 0; m < kRows; ++m)
    for (int half = 0; half < 2; ++half) {
      nearest.value[m][half] = F32{} + __builtin_inff();
      nearest.code[m][half] = I32{};
    }
  I32 code = lane_numbers();
  const float* panel = a.packed;
  for (int64_t k = 0; k < a.codes; k += kPanel, panel += panel_size(a.features), code += kPanel) {
    F32 s[kRows][2];
    panel_distances<kRows>(x, panel, a.features, s);
    DGM_UNROLL
    for (int m = 0; m < kRows; ++m) {
      DGM_UNROLL
      for (int half = 0; half < 2; ++half) {  // a later code must be nearer, so that the first of equal ones stays
        F32& value = nearest.value[m][half];
        I32& index = nearest.code[m][half];
        const auto nearer = s[m][half] < value;
        value = nearer ? s[m][half] : value;
        index = nearer ? code + half * kWidth : index;
      }
    }
  }
  for (int m = 0; m < kRows; ++m) indices[m] = least_of(nearest, m);
}

// A row's code to `quantized`; returns the squared distance.
DGM_INLINE double finish_row(const QuantizeArgs& a, int64_t row, const float* x, float* buffer) {
  const int64_t features = a.features;
  const float* e = floats_at({a.codebook.data, a.codebook.dtype, 0}, a.indices[row] * features, features, buffer);
  char* to = static_cast<char*>(a.quantized.data) + row * features * element_size(a.quantized.dtype);
  convert_from_floats(e, features, a.quantized.dtype, to);
  Sum squares;
  int64_t d = 0;
  for (; d + kWidth <= features; d += kWidth) {
    const F32 difference = load(x + d) - load(e + d);
    squares.add(difference * difference);
  }
  if (d < features) {
    const F32 difference = load_part(x + d, features - d) - load_part(e + d, features - d);
    squares.add(difference * difference);
  }
  return squares.value();
}

class Quantizer {
 public:
  explicit Quantizer(const QuantizeArgs& args)
      : a_(args), tile_(args.features * kTileRow), row_(args.features + kBlock), code_(args.features + kBlock) {}

  // Rows [first, last); returns their sum of squared distances.
  double rows(int64_t first, int64_t last) {
    double squares = 0.0;
    for (int64_t row = first; row < last; row += kTile) {
      const int64_t count = last - row < kTile ? last - row : kTile;
      for (int64_t m = 0; m < count; ++m) {
        const float* x = floats_of(row + m);
        for (int64_t d = 0; d < a_.features; ++d) tile_[d * kTileRow + m] = x[d] - a_.mean[d];
      }
      with_positions(count, [&](auto rows) { nearest_codes<rows()>(a_, tile_.data(), a_.indices + row); });
      for (int64_t m = 0; m < count; ++m) squares += finish_row(a_, row + m, floats_of(row + m), code_.data());
    }
    return squares;
  }

 private:
  const float* floats_of(int64_t row) { return floats_at(a_.x, row * a_.x.stride, a_.features, row_.data()); }

  const QuantizeArgs& a_;
  Array<float> tile_, row_, code_;
};

// ---- Gradients

// g + factor (x - e)
DGM_NOINLINE void row_gradient(const QuantizeArgs& a, int64_t row, float* x_buffer, float* e_buffer, float* to) {
  const int64_t features = a.features;
  const float* x = floats_at(a.x, row * a.x.stride, features, x_buffer);
  const float* e = floats_at({a.codebook.data, a.codebook.dtype, 0}, a.indices[row] * features, features, e_buffer);
  const RowsOut& out = a.grad_x;
  char* place = static_cast<char*>(out.data) + row * features * element_size(out.dtype);
  if (a.grad.data) {
    const char* grad = static_cast<const char*>(a.grad.data) + row * a.grad.stride * element_size(a.grad.dtype);
    convert_to_floats(grad, a.grad.dtype, features, to);
    for (int64_t d = 0; d < features; ++d) to[d] += a.x_factor * (x[d] - e[d]);
  } else {
    for (int64_t d = 0; d < features; ++d) to[d] = a.x_factor * (x[d] - e[d]);
  }
  convert_from_floats(to, features, out.dtype, place);
}

// factor sum (e - x) over the rows of every code, of features [first, first + count), in float64.
DGM_NOINLINE void code_gradients(const QuantizeArgs& a, int64_t first, int64_t count) {
  Array<double> sums(a.codes * count);
  float x_buffer[kCodeFeatures + kBlock], e_buffer[kCodeFeatures + kBlock];
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t code = a.indices[row];
    const float* x = floats_at(a.x, row * a.x.stride + first, count, x_buffer);
    const float* e = floats_at({a.codebook.data, a.codebook.dtype, 0}, code * a.features + first, count, e_buffer);
    double* sum = &sums[code * count];
    for (int64_t d = 0; d < count; ++d) sum[d] += static_cast<double>(e[d] - x[d]);
  }
  const int size = element_size(a.grad_codebook.dtype);
  for (int64_t code = 0; code < a.codes; ++code) {
    for (int64_t d = 0; d < count; ++d)
      x_buffer[d] = static_cast<float>(sums[code * count + d] * static_cast<double>(a.code_factor));
    char* to = static_cast<char*>(a.grad_codebook.data) + (code * a.features + first) * size;
    convert_from_floats(x_buffer, count, a.grad_codebook.dtype, to);
  }
}

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::latent
