// Arguments of the masked convolution kernels as plain pointers. No torch header in here.
#pragma once

#include "common/dtype.h"

namespace dgm::masked_conv {

constexpr int64_t kMaxTaps = 1024;  // that are live in a kernel: what they read is listed on the stack

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
  int64_t parts = 1;  // a sample's panels are worked on in so many parts
};

// Taps that a unit of work of the weight's gradient has at most: their sums are on the stack.
constexpr int64_t kMaxTapsTogether = 8;

// Gradient of the weight.
struct WeightGradArgs {
  int64_t batch = 0, inputs = 0, outputs = 0, height = 0, width = 0;
  const Tap* taps = nullptr;
  int64_t number = 0, kernel = 0;  // of taps that are live, and of all
  int64_t groups = 1;
  Operand grad, x;
  float* grad_rows = nullptr;  // [panels, batch, pixels, panel]
  float* x_rows = nullptr;     // [batch, pixels, inputs]
  float* result = nullptr;     // [outputs, inputs, kernel]
  int64_t taps_together = 1;   // a unit of work: so many taps of one tile of inputs and one panel of outputs
};

}  // namespace dgm::masked_conv
