// CPU loops of masked convolution and of its gradients.
#pragma once

#include "masked_conv/args.h"
#include "masked_conv/panel.h"

namespace dgm::masked_conv {
namespace DGM_ISA_NAMESPACE {
namespace {

constexpr int64_t kRowsTogether = 32;  // of an image, in one sum of the weight's gradient

DGM_INLINE int64_t panels_of(int64_t channels) { return (channels + kPanel - 1) / kPanel; }

DGM_INLINE const char* sample_of(const Operand& x, int64_t sample, int64_t elements) {
  return static_cast<const char*>(x.data) + sample * elements * element_size(x.dtype);
}

// `count` elements as floats; nothing behind them is written to.
DGM_INLINE void read_row(const char* from, DType dtype, int64_t count, float* to) {
  if (dtype == DType::Float32) {
    std::memcpy(to, from, count * sizeof(float));
    return;
  }
  alignas(64) float row[kBlock];
  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t some = count - i < kBlock ? count - i : kBlock;
    convert_to_floats(from + i * element_size(dtype), dtype, some, row);
    std::memcpy(to + i, row, some * sizeof(float));
  }
}

// A part of a picture: rows [top, bottom), columns [begin, end).
struct Area {
  int64_t top, bottom, begin, end;
};

// Part `index` of the pixels of a sample: whole rows, of a picture of one row whole tiles.
DGM_INLINE Area area_of(const ConvArgs& a, int64_t index) {
  if (a.height > 1) return {a.height * index / a.areas, a.height * (index + 1) / a.areas, 0, a.width};
  const Pieces pieces(a.width);
  const int64_t first = pieces.number * index / a.areas, last = pieces.number * (index + 1) / a.areas;
  return {0, 1, pieces.begin(first), pieces.begin(last)};
}

// What an area reads of the sample, into the middle of `padded`, whose border stays as it is.
DGM_NOINLINE void copy_padded(const ConvArgs& a, int64_t sample, const Area& area, float* padded) {
  const int64_t below = a.padded_height - a.above - a.height, right = a.padded_width - a.left - a.width;
  const int64_t top = area.top > a.above ? area.top - a.above : 0,
                begin = area.begin > a.left ? area.begin - a.left : 0;
  const int64_t bottom = area.bottom + below < a.height ? area.bottom + below : a.height;
  const int64_t end = area.end + right < a.width ? area.end + right : a.width;
  const char* from = sample_of(a.x, sample, a.inputs * a.height * a.width);
  for (int64_t c = 0; c < a.inputs; ++c)
    for (int64_t y = top; y < bottom; ++y) {
      const char* row = from + ((c * a.height + y) * a.width + begin) * element_size(a.x.dtype);
      float* to = padded + (c * a.padded_height + a.above + y) * a.padded_width + a.left + begin;
      read_row(row, a.x.dtype, end - begin, to);
    }
}

// `positions` pixels of one panel from the sums: `to` is the first pixel of the panel's first channel.
template <int kPositions>
DGM_INLINE void write_tile(const F32 (&sums)[kPositions][2], int64_t channels, DType dtype, char* to, int64_t plane) {
  alignas(64) float rows[kPanel * kTileRow];
  transpose(sums, rows);
  for (int64_t o = 0; o < channels; ++o, to += plane * element_size(dtype)) {
    const float* row = rows + o * kTileRow;
    if (dtype == DType::Float32)
      std::memcpy(to, row, kPositions * sizeof(float));
    else
      convert_from_floats(row, kPositions, dtype, to);
  }
}

template <int kPositions>
DGM_NOINLINE void conv_tile(const Source* sources, int64_t number, const float* bias, int64_t channels, DType dtype,
                            char* to, int64_t plane) {
  Sums<kPositions> sums = {};
  accumulate(sources, number, sums);
  if (bias) {
    const F32 b0 = load(bias), b1 = load(bias + kWidth);
    DGM_UNROLL
    for (int m = 0; m < kPositions; ++m) sums.v[0][m][0] += b0, sums.v[0][m][1] += b1;
  }
  write_tile(sums.v[0], channels, dtype, to, plane);
}

DGM_NOINLINE void conv_panel(const ConvArgs& a, const float* padded, int64_t sample, int64_t panel, const Area& area,
                             Source* sources) {
  const Pieces pieces(area.end - area.begin);
  const int64_t plane = a.height * a.width, padded_plane = a.padded_height * a.padded_width;
  const int64_t first = panel * kPanel, left = a.outputs - first, channels = left < kPanel ? left : kPanel;
  const float* bias = a.bias ? a.bias + first : nullptr;
  char* to = static_cast<char*>(a.y.data) + (sample * a.outputs + first) * plane * element_size(a.y.dtype);
  for (int64_t y = area.top; y < area.bottom; ++y) {
    for (int64_t piece = 0; piece < pieces.number; ++piece) {
      const int64_t x = area.begin + pieces.begin(piece);
      int64_t number = 0;
      for (int64_t t = 0; t < a.number; ++t) {
        const Block& block = a.blocks[panel * a.number + t];
        const int64_t row = y + a.above + a.taps[t].dy;
        const bool outside = y + a.taps[t].dy < 0 || y + a.taps[t].dy >= a.height;
        if (block.count == 0 || outside) continue;
        const float* data = padded + block.begin * padded_plane + row * a.padded_width + x + a.left + a.taps[t].dx;
        sources[number++] = {data, padded_plane, block.count, a.packed + block.offset, 0};
      }
      char* pixel = to + (y * a.width + x) * element_size(a.y.dtype);
      with_positions(pieces.length(piece), [&](auto positions) {
        conv_tile<positions()>(sources, number, bias, channels, a.y.dtype, pixel, plane);
      });
    }
  }
}

// Channels [0, channels) of a sample's planes as rows of `stride` floats, one a pixel; lanes of a row beyond are zero.
DGM_NOINLINE void planes_to_rows(const Operand& x, const char* from, int64_t channels, int64_t plane, int64_t stride,
                                 float* to) {
  alignas(64) float planes[4][kBlock];
  const int64_t bytes = element_size(x.dtype);
  for (int64_t c = 0; c < stride; c += 4) {
    for (int64_t first = 0; first < plane; first += kBlock) {
      const int64_t count = plane - first < kBlock ? plane - first : kBlock;
      for (int64_t j = 0; j < 4; ++j) {
        if (c + j < channels)
          convert_to_floats(from + ((c + j) * plane + first) * bytes, x.dtype, count, planes[j]);
        else
          std::memset(planes[j], 0, sizeof planes[j]);
      }
      for (int64_t i = 0; i < count; i += kWidth) {
        F32 four[4] = {load(planes[0] + i), load(planes[1] + i), load(planes[2] + i), load(planes[3] + i)};
        transpose4(four);  // vector j: channels c .. c + 3 of pixels j, j + 4, ...
        for (int64_t p = 0; p < kWidth && i + p < count; ++p)
          std::memcpy(to + (first + i + p) * stride + c, reinterpret_cast<const float*>(&four[p % 4]) + p / 4 * 4,
                      4 * sizeof(float));
      }
    }
  }
}

// Sums over the pixels of a sample of grad[pixel] * x[pixel + tap], for a tile of inputs and a panel of outputs.
template <int kPositions>
DGM_NOINLINE void correlate(const WeightGradArgs& a, const Tap& tap, const float* x, int64_t x_stride,
                            const float* grad, float* totals) {
  const int64_t begin = tap.dx < 0 ? -tap.dx : 0, end = tap.dx > 0 ? a.width - tap.dx : a.width;
  if (begin >= end) return;
  Sums<kPositions> sums = {};
  const int64_t top = tap.dy < 0 ? -tap.dy : 0, bottom = tap.dy > 0 ? a.height - tap.dy : a.height;
  Source rows[kRowsTogether];
  for (int64_t y = top; y < bottom;) {
    int64_t number = 0;
    for (; number < kRowsTogether && y < bottom; ++number, ++y) {
      const float* from = x + ((y + tap.dy) * a.width + begin + tap.dx) * x_stride;
      rows[number] = {from, x_stride, end - begin, grad + (y * a.width + begin) * kPanel, 0};
    }
    accumulate<kPixelChain>(rows, number, sums);
  }
  DGM_UNROLL
  for (int m = 0; m < kPositions; ++m)
    for (int half = 0; half < 2; ++half) {
      float* total = totals + m * kPanel + half * kWidth;
      store(total, load(total) + sums.v[0][m][half]);
    }
}

// Whether a tap connects the output, of a panel, and the input, of a tile.
DGM_INLINE bool connects(const WeightGradArgs& a, Rule rule, int64_t output, int64_t input) {
  const int64_t of_output = output * a.groups / a.outputs, of_input = input * a.groups / a.inputs;
  const int64_t after = a.exchanged ? of_input : of_output, before = a.exchanged ? of_output : of_input;
  if (rule == Rule::Less) return before < after;
  return rule == Rule::LessEqual ? before <= after : rule == Rule::Full;
}

DGM_INLINE int64_t padded_inputs(const WeightGradArgs& a) { return (a.inputs + 3) / 4 * 4; }

// Taps [first, last) of inputs [input, input + positions) and one panel of outputs.
DGM_NOINLINE void weight_grad_unit(const WeightGradArgs& a, int64_t panel, int64_t input, int64_t positions,
                                   int64_t first, int64_t last, float* totals) {
  constexpr int64_t kTotals = kTile * kPanel;
  const int64_t plane = a.height * a.width, stride = padded_inputs(a), begin = panel * kPanel;
  const int64_t outputs = a.outputs - begin < kPanel ? a.outputs - begin : kPanel;
  // Groups are intervals: if these two are not connected, none are.
  const int64_t output = a.exchanged ? begin : begin + outputs - 1;
  const int64_t nearest_input = a.exchanged ? input + positions - 1 : input;
  std::memset(totals, 0, (last - first) * kTotals * sizeof(float));
  for (int64_t sample = 0; sample < a.batch; ++sample) {
    const float* x = a.x_rows + sample * plane * stride + input;
    const float* grad = a.grad_rows + (panel * a.batch + sample) * plane * kPanel;
    for (int64_t t = first; t < last; ++t)
      if (connects(a, a.taps[t].rule, output, nearest_input))
        with_positions(positions,
                       [&](auto n) { correlate<n()>(a, a.taps[t], x, stride, grad, totals + (t - first) * kTotals); });
  }
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t i = 0; i < positions; ++i)
      for (int64_t t = first; t < last; ++t)
        if (connects(a, a.taps[t].rule, begin + o, input + i))
          a.result[(begin + o) * a.output_stride + (input + i) * a.input_stride + a.taps[t].index] =
              totals[(t - first) * kTotals + i * kPanel + o];
}

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::masked_conv
