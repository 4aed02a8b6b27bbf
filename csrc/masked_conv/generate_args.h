// A network as the generator runs it: nodes, instructions and panels of packed weights. No torch header in here.
// dgm_kernels/masked_conv/program.py says what they mean.
#pragma once

#include <vector>

#include "common/dtype.h"

namespace dgm::masked_conv {

enum class OutputKind : int64_t { Bernoulli, Categorical, LogisticMixture };
enum class Activation : int64_t { None, Relu, Elu, Silu, Tanh, Sigmoid, Gate };
enum class NodeKind : int64_t { Input, Value, SampleConstant, PixelConstant };

// The numbers of a feature map: channels of a sample one after the other. It keeps as many rows and columns as are read
// again; the next ones take their place.
struct Node {
  NodeKind kind = NodeKind::Value;
  int64_t channels = 0, constant = -1;
  float* data = nullptr;
  int64_t rows = 1, columns = 1;
  int64_t row_stride = 0, column_stride = 0, sample_stride = 0;
};

struct Reference {
  int64_t node = -1, channel = 0;
  float scale = 1.0f;
};

struct Term {
  int64_t node, channel, dy, dx;
};

// Inputs [begin, begin + count) of a term that a panel reads, and where their weights are.
struct Range {
  int64_t begin, count, weights;
};

// Some results of an instruction. Many of them share vectors (kPanel weights for each input); of few, a dot product
// each (weights of a result one after the other, `row` apart).
struct Panel {
  int64_t first, count;  // results
  int64_t sums;          // index of the first of them among the sums that enter the activation
  int64_t time;          // channels of the pixel that must have been drawn
  bool dots;
  int64_t bias = 0, size = 0;     // where its biases begin in the packed weights, and how long it is there
  const Range* ranges = nullptr;  // of each term
  int64_t together = 1;           // from this panel on, so many have the same ranges and may be computed at once
};

struct Instruction {
  Reference out, factor;
  int64_t channels = 0, gate_groups = 1;
  Activation activation = Activation::None;
  bool row_phase = false;
  std::vector<Term> terms;
  std::vector<Reference> adds, residuals;
  std::vector<Panel> panels;         // by time
  std::vector<int64_t> first_panel;  // of each time, and the number of them all
  int64_t gate_width() const { return channels / gate_groups; }
};

struct GenerateArgs {
  int64_t batch = 0, channels = 0, height = 0, width = 0;
  std::vector<Node> nodes;
  std::vector<Instruction> instructions;
  Reference output;
  OutputKind kind = OutputKind::Categorical;
  int64_t levels = 2;
  std::vector<int64_t> order;
  int64_t most_inputs = 0, most_terms = 0;  // of an instruction
  const float* packed = nullptr;
  const int64_t* given = nullptr;  // [batch, channels, height, width]
  const bool* known = nullptr;
  int64_t* result = nullptr;
  NoiseArgs noise;
  float scale = 1.0f, offset = 0.0f;  // level * scale + offset is what the network sees
};

}  // namespace dgm::masked_conv
