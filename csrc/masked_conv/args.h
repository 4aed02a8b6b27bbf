// Arguments of the masked convolution kernels as plain pointers. No torch header in here.
#pragma once

#include "common/dtype.h"

namespace dgm::masked_conv {

// Which channels a tap connects, given the groups of its output and its input channel.
enum class Rule : int32_t { Dead, Full, Less, LessEqual };

// A live tap: its index in a kernel of height * width weights, and the offset of the pixel that it reads.
struct Tap {
  int64_t index, dy, dx;
  Rule rule;
};

// The weights of a tap for a panel of results: inputs [begin, begin + count), packed from `offset` on.
struct Block {
  int64_t begin, count, offset;
};

// Convolution of x with taps: the forward pass, and, with results and inputs exchanged and the taps turned over, the
// gradient of the input.
struct ConvArgs {
  int64_t batch = 0, inputs = 0, outputs = 0, height = 0, width = 0;
  int64_t above = 0, left = 0, padded_height = 0, padded_width = 0;  // of the copy with a border of zeros
  const Tap* taps = nullptr;
  int64_t number = 0;             // of taps
  const Block* blocks = nullptr;  // [panels, taps]
  const float* packed = nullptr;
  const float* bias = nullptr;  // a whole number of panels
  Operand x;
  Output y;
  int64_t areas = 1,
          panel_parts = 1;  // so many units of work of a sample: parts of its pixels times parts of its panels
};

// Taps that a unit of work of the weight's gradient has at most: their sums are on the stack.
constexpr int64_t kTapsTogether = 8;

// Gradient of the weight: products of two maps, of which one lies in panels and the other one in tiles. The wider of a
// few results and many inputs lies in panels: the maps are then exchanged, and the taps turned over.
struct WeightGradArgs {
  int64_t batch = 0, inputs = 0, outputs = 0, height = 0, width = 0;  // inputs in tiles, outputs in panels
  const Tap* taps = nullptr;
  int64_t number = 0, groups = 1;
  bool exchanged = false;
  Operand grad, x;                              // in panels, in tiles
  float* grad_rows = nullptr;                   // [panels, batch, pixels, panel]
  float* x_rows = nullptr;                      // [batch, pixels, inputs]
  float* result = nullptr;                      // of the whole kernel
  int64_t output_stride = 0, input_stride = 0;  // in it
};

}  // namespace dgm::masked_conv
