// Decodes programs and packs their weights.
#pragma once

#include "common/tensors.h"
#include "masked_conv/generate_args.h"

namespace dgm::masked_conv {

struct PanelShape {
  int64_t panel, width;  // results side by side, and lanes of a vector: half as many
};

// A program without weights, constants and memory: nodes, and instructions with terms and panels.
struct Program {
  GenerateArgs args;
  struct Weight {
    int64_t weight, row, column, rule, in_degrees, out_degrees;
  };
  std::vector<std::vector<Weight>> weights;  // of each term of each instruction
  std::vector<int64_t> biases;               // of each instruction
  std::vector<Range> ranges;                 // of each term of each panel; panels point into them
};

Program decode(const at::Tensor& encoded, PanelShape shape);

// First the begin and the count of every range, then biases and weights, panel after panel.
at::Tensor pack(Program& program, at::TensorList weights, at::TensorList degrees, PanelShape shape);

// Reads the ranges back, and sets where panels and ranges have their weights.
void locate(Program& program, const at::Tensor& packed, PanelShape shape);

}  // namespace dgm::masked_conv
