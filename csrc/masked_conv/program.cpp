// Decodes programs and packs their weights.
#include "masked_conv/program.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <bit>

namespace dgm::masked_conv {

namespace {

constexpr int64_t kVersion = 1, kAlignment = 16;  // floats

int64_t aligned(int64_t count) { return (count + kAlignment - 1) / kAlignment * kAlignment; }

class Words {
 public:
  explicit Words(const at::Tensor& encoded) {
    TORCH_CHECK_TYPE(encoded.scalar_type() == at::kLong && encoded.is_contiguous() && encoded.is_cpu(),
                     "program must be a contiguous int64 tensor on the CPU");
    next_ = encoded.const_data_ptr<int64_t>(), end_ = next_ + encoded.numel();
  }

  int64_t operator()() {
    TORCH_CHECK_VALUE(next_ != end_, "program must be what Program.encode() returns: it ends too early");
    return *next_++;
  }

  Reference reference() {
    const int64_t node = (*this)(), channel = (*this)();
    return {node, channel, static_cast<float>(std::bit_cast<double>((*this)()))};
  }

 private:
  const int64_t *next_, *end_;
};

struct Block {
  int64_t begin, end, time;
};

// Results of one time and one gate group, in pieces that a panel holds.
std::vector<Panel> panels_of(const Instruction& instruction, const std::vector<Block>& blocks, PanelShape shape) {
  const bool gate = instruction.activation == Activation::Gate;
  const int64_t width = instruction.gate_width(), most = gate ? shape.width : shape.panel;
  std::vector<Panel> panels;
  for (const Block& block : blocks) {
    for (int64_t first = block.begin; first < block.end;) {
      const int64_t group_end = gate ? (first / width + 1) * width : block.end;
      const int64_t count = std::min({most, block.end - first, group_end - first});
      const int64_t sums = gate ? 2 * (first / width) * width + first % width : first;
      panels.push_back({first, count, sums, instruction.row_phase ? 0 : block.time, !gate && count <= shape.width / 4});
      first += count;
    }
  }
  std::stable_sort(panels.begin(), panels.end(), [](const Panel& a, const Panel& b) { return a.time < b.time; });
  return panels;
}

// Index of the sum in lane `lane` of a panel, or -1.
int64_t sum_of(const Instruction& instruction, const Panel& panel, int64_t lane, PanelShape shape) {
  if (instruction.activation != Activation::Gate) return lane < panel.count ? panel.sums + lane : -1;
  const int64_t result = lane % shape.width;
  return result < panel.count ? panel.sums + result + (lane / shape.width) * instruction.gate_width() : -1;
}

int64_t weights_of(const Panel& panel, const Range& range, PanelShape shape) {
  return panel.dots ? panel.count * aligned(range.count) : range.count * shape.panel;
}

struct Source {
  const float* data;  // of the tap, for the first output and input
  int64_t outputs, inputs, output_stride, input_stride;
  int64_t rule;
  const int64_t *in_degrees = nullptr, *out_degrees = nullptr;

  bool connects(int64_t sum, int64_t input) const {
    if (!in_degrees) return true;
    return rule == 2 ? in_degrees[input] < out_degrees[sum] : in_degrees[input] <= out_degrees[sum];
  }
};

const int64_t* degrees_of(at::TensorList degrees, int64_t index, int64_t size) {
  if (index < 0) return nullptr;
  TORCH_CHECK_VALUE(index < static_cast<int64_t>(degrees.size()), "degrees must have ", index + 1, " tensors at least");
  const at::Tensor& tensor = degrees[index];
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kLong && tensor.is_contiguous() && tensor.numel() == size, "degrees[",
                    index, "] must be int64 [", size, "], got ", tensor.sizes());
  return tensor.const_data_ptr<int64_t>();
}

Source source_of(const Program::Weight& w, at::TensorList weights, at::TensorList degrees, int64_t sums) {
  TORCH_CHECK_VALUE(w.weight >= 0 && w.weight < static_cast<int64_t>(weights.size()), "weights must have ",
                    w.weight + 1, " tensors at least");
  const at::Tensor& t = weights[w.weight];
  TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat && t.is_contiguous() && t.is_cpu() && t.dim() == 4 &&
                        t.size(0) == sums && w.row < t.size(2) && w.column < t.size(3),
                    "weights[", w.weight, "] must be float32 [", sums, ", inputs, height, width], got ", t.sizes());
  const int64_t kernel = t.size(2) * t.size(3);
  return {t.const_data_ptr<float>() + w.row * t.size(3) + w.column,
          t.size(0),
          t.size(1),
          t.size(1) * kernel,
          kernel,
          w.rule,
          degrees_of(degrees, w.in_degrees, t.size(1)),
          degrees_of(degrees, w.out_degrees, t.size(0))};
}

// The inputs that any of the panel's sums reads.
Range range_of(const Instruction& instruction, const Panel& panel, const Source& source, PanelShape shape) {
  int64_t begin = source.inputs, end = 0;
  for (int64_t lane = 0; lane < shape.panel; ++lane) {
    const int64_t sum = sum_of(instruction, panel, lane, shape);
    if (sum < 0) continue;
    for (int64_t k = 0; k < begin; ++k)
      if (source.connects(sum, k)) begin = k;
    for (int64_t k = source.inputs; k > end; --k)
      if (source.connects(sum, k - 1)) end = k;
  }
  return {std::min(begin, end), std::max<int64_t>(end - begin, 0), 0};
}

void fill(const Instruction& instruction, const Panel& panel, const Range& range, const Source& source,
          PanelShape shape, float* to) {
  const auto weight = [&](int64_t sum, int64_t k) {
    return sum >= 0 && source.connects(sum, k) ? source.data[sum * source.output_stride + k * source.input_stride] : 0;
  };
  if (panel.dots) {
    for (int64_t o = 0; o < panel.count; ++o, to += aligned(range.count))
      for (int64_t k = 0; k < aligned(range.count); ++k)
        to[k] = k < range.count ? weight(panel.sums + o, range.begin + k) : 0.0f;
    return;
  }
  for (int64_t k = 0; k < range.count; ++k)
    for (int64_t lane = 0; lane < shape.panel; ++lane)
      *to++ = weight(sum_of(instruction, panel, lane, shape), range.begin + k);
}

void fill_biases(const Program& program, int64_t index, const Panel& panel, at::TensorList weights, PanelShape shape,
                 float* to) {
  const Instruction& instruction = program.args.instructions[index];
  const int64_t bias = program.biases[index];
  const int64_t sums = instruction.channels * (instruction.activation == Activation::Gate ? 2 : 1);
  if (bias >= 0)
    TORCH_CHECK_VALUE(bias < static_cast<int64_t>(weights.size()) && weights[bias].numel() == sums &&
                          weights[bias].scalar_type() == at::kFloat && weights[bias].is_contiguous(),
                      "weights[", bias, "] must be a bias, float32 [", sums, "]");
  for (int64_t lane = 0; lane < shape.panel; ++lane) {
    const int64_t sum = sum_of(instruction, panel, lane, shape);
    to[lane] = bias >= 0 && sum >= 0 ? weights[bias].const_data_ptr<float>()[sum] : 0.0f;
  }
}

// Whether two panels follow one another in memory with the same ranges.
bool alike(const Instruction& instruction, const Panel& a, const Panel& b) {
  if (a.time != b.time || a.dots || b.dots || a.size != b.size) return false;
  for (size_t t = 0; t < instruction.terms.size(); ++t)
    if (a.ranges[t].begin != b.ranges[t].begin || a.ranges[t].count != b.ranges[t].count) return false;
  return true;
}

Instruction decode_instruction(Words& words, Program& program, PanelShape shape) {
  Instruction instruction;
  instruction.out.node = words(), instruction.out.channel = words(), instruction.channels = words();
  instruction.activation = static_cast<Activation>(words()), instruction.gate_groups = words();
  instruction.row_phase = words() != 0;
  program.biases.push_back(words());
  instruction.factor.node = words(), instruction.factor.channel = words();
  const int64_t terms = words(), adds = words(), residuals = words(), number = words();
  program.weights.emplace_back();
  for (int64_t i = 0; i < terms; ++i) {
    const int64_t node = words(), channel = words(), dy = words(), dx = words();
    instruction.terms.push_back({node, channel, dy, dx});
    const int64_t weight = words(), row = words(), column = words(), rule = words(), in = words(), out = words();
    program.weights.back().push_back({weight, row, column, rule, in, out});
  }
  for (int64_t i = 0; i < adds; ++i) instruction.adds.push_back(words.reference());
  for (int64_t i = 0; i < residuals; ++i) instruction.residuals.push_back(words.reference());
  std::vector<Block> blocks;
  for (int64_t i = 0; i < number; ++i) {
    const int64_t begin = words(), end = words(), time = words();
    blocks.push_back({begin, end, time});
  }
  instruction.panels = panels_of(instruction, blocks, shape);
  const int64_t times = static_cast<int64_t>(program.args.order.size()) + 1;
  for (int64_t time = 0; time <= times; ++time)
    instruction.first_panel.push_back(std::count_if(instruction.panels.begin(), instruction.panels.end(),
                                                    [&](const Panel& panel) { return panel.time < time; }));
  return instruction;
}

void check_reference(const GenerateArgs& args, const Reference& r, int64_t channels, bool written) {
  const bool there = r.node >= 0 && r.node < static_cast<int64_t>(args.nodes.size());
  TORCH_CHECK_VALUE(there && r.channel >= 0 && r.channel + channels <= args.nodes[r.node].channels &&
                        (!written || args.nodes[r.node].kind == NodeKind::Value),
                    "program names channels that node ", r.node, " does not have");
}

// Every operand is there, so that a broken program cannot make the executor leave its memory.
void check(const Program& program) {
  const GenerateArgs& args = program.args;
  for (const Instruction& i : args.instructions) {
    check_reference(args, i.out, i.channels, true);
    const int64_t sums = i.channels * (i.activation == Activation::Gate ? 2 : 1);
    for (const Reference& add : i.adds) check_reference(args, add, sums, false);
    for (const Reference& residual : i.residuals) check_reference(args, residual, i.channels, false);
    if (i.factor.node >= 0) check_reference(args, i.factor, i.channels, false);
    for (const Term& term : i.terms) {
      check_reference(args, {term.node, term.channel}, 1, false);
      const NodeKind kind = args.nodes[term.node].kind;
      TORCH_CHECK_VALUE((kind == NodeKind::Input || kind == NodeKind::Value) && term.dy <= 0,
                        "program must read images and values at the row of the pixel or above");
    }
    for (const Panel& panel : i.panels)
      TORCH_CHECK_VALUE(panel.first >= 0 && panel.first + panel.count <= i.channels,
                        "program has blocks beyond a node");
  }
}

// Rows and columns that a node keeps: what lies above is read at any column, so that a whole row is needed.
void set_history(GenerateArgs& args) {
  for (Node& node : args.nodes) node.rows = 1, node.columns = 1;
  for (const Instruction& i : args.instructions) {
    if (i.row_phase) args.nodes[i.out.node].columns = args.width;
    for (const Term& term : i.terms) {
      Node& node = args.nodes[term.node];
      node.rows = std::max(node.rows, 1 - term.dy);
      node.columns = std::max(node.columns, term.dy < 0 || term.dx > 0 ? args.width : 1 - term.dx);
    }
    if (!i.row_phase) continue;
    for (const Reference& add : i.adds) args.nodes[add.node].columns = args.width;
    for (const Reference& residual : i.residuals) args.nodes[residual.node].columns = args.width;
    if (i.factor.node >= 0) args.nodes[i.factor.node].columns = args.width;
    for (const Term& term : i.terms) args.nodes[term.node].columns = args.width;
  }
  for (Node& node : args.nodes) node.columns = std::min(node.columns, args.width);
}

}  // namespace

Program decode(const at::Tensor& encoded, PanelShape shape) {
  Words words(encoded);
  Program program;
  GenerateArgs& args = program.args;
  TORCH_CHECK_VALUE(words() == kVersion, "program must be of version ", kVersion);
  args.channels = words(), args.height = words(), args.width = words();
  const int64_t nodes = words(), instructions = words();
  args.output.node = words(), args.output.channel = words();
  args.kind = static_cast<OutputKind>(words()), args.levels = words();
  for (int64_t steps = words(); steps > 0; --steps) args.order.push_back(words());
  for (int64_t i = 0; i < nodes; ++i) {
    Node node;
    node.kind = static_cast<NodeKind>(words()), node.channels = words();
    words();  // the phase of an instruction says the same of its result
    node.constant = words();
    args.nodes.push_back(node);
  }
  for (int64_t i = 0; i < instructions; ++i) args.instructions.push_back(decode_instruction(words, program, shape));
  check(program);
  set_history(args);
  for (const Instruction& i : args.instructions) {
    int64_t inputs = 0;
    for (const Term& term : i.terms) inputs += args.nodes[term.node].channels;
    args.most_inputs = std::max(args.most_inputs, inputs);
    args.most_terms = std::max(args.most_terms, static_cast<int64_t>(i.terms.size()));
  }
  return program;
}

at::Tensor pack(Program& program, at::TensorList weights, at::TensorList degrees, PanelShape shape) {
  struct Job {
    int64_t instruction, panel, term, range;
  };
  std::vector<Job> jobs;
  std::vector<Source> sources;
  for (size_t i = 0; i < program.args.instructions.size(); ++i) {
    const Instruction& instruction = program.args.instructions[i];
    const int64_t sums = instruction.channels * (instruction.activation == Activation::Gate ? 2 : 1);
    for (size_t p = 0; p < instruction.panels.size(); ++p)
      for (size_t t = 0; t < instruction.terms.size(); ++t) {
        const Source source = source_of(program.weights[i][t], weights, degrees, sums);
        TORCH_CHECK_VALUE(
            instruction.terms[t].channel + source.inputs <= program.args.nodes[instruction.terms[t].node].channels,
            "program names channels that node ", instruction.terms[t].node, " does not have");
        jobs.push_back({static_cast<int64_t>(i), static_cast<int64_t>(p), static_cast<int64_t>(t),
                        static_cast<int64_t>(program.ranges.size())});
        sources.push_back(source);
        program.ranges.push_back(range_of(instruction, instruction.panels[p], source, shape));
      }
  }
  const int64_t header = aligned(2 * static_cast<int64_t>(program.ranges.size()));
  int64_t size = header;
  for (const Job& job : jobs) {
    const Panel& panel = program.args.instructions[job.instruction].panels[job.panel];
    size += weights_of(panel, program.ranges[job.range], shape);
  }
  for (const Instruction& instruction : program.args.instructions)
    size += static_cast<int64_t>(instruction.panels.size()) * shape.panel;
  const at::Tensor packed = at::empty({size}, at::TensorOptions(at::kFloat));
  float* to = packed.mutable_data_ptr<float>();
  for (size_t r = 0; r < program.ranges.size(); ++r) {
    TORCH_CHECK_VALUE(program.ranges[r].begin + program.ranges[r].count < 1 << 24, "weights must have fewer inputs");
    to[2 * r] = static_cast<float>(program.ranges[r].begin),
           to[2 * r + 1] = static_cast<float>(program.ranges[r].count);
  }
  locate(program, packed, shape);
  for (size_t i = 0; i < program.args.instructions.size(); ++i)
    for (const Panel& panel : program.args.instructions[i].panels)
      fill_biases(program, static_cast<int64_t>(i), panel, weights, shape, to + panel.bias);
  at::parallel_for(0, static_cast<int64_t>(jobs.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const Instruction& instruction = program.args.instructions[jobs[j].instruction];
      const Range& range = program.ranges[jobs[j].range];
      fill(instruction, instruction.panels[jobs[j].panel], range, sources[j], shape, to + range.weights);
    }
  });
  return packed;
}

void locate(Program& program, const at::Tensor& packed, PanelShape shape) {
  TORCH_CHECK_VALUE(packed.scalar_type() == at::kFloat && packed.is_contiguous() && packed.is_cpu(),
                    "packed must be what masked_conv_pack returned");
  size_t number = 0;
  for (const Instruction& i : program.args.instructions) number += i.panels.size() * i.terms.size();
  int64_t at = aligned(2 * static_cast<int64_t>(number));
  TORCH_CHECK_VALUE(at <= packed.numel(), "packed belongs to another program");
  const float* header = packed.const_data_ptr<float>();
  program.ranges.resize(number);
  for (size_t r = 0; r < number; ++r)
    program.ranges[r] = {static_cast<int64_t>(header[2 * r]), static_cast<int64_t>(header[2 * r + 1]), 0};
  Range* range = program.ranges.data();
  for (Instruction& instruction : program.args.instructions) {
    for (Panel& panel : instruction.panels) {
      panel.bias = at, panel.ranges = range;
      at += shape.panel;
      for (size_t t = 0; t < instruction.terms.size(); ++t, ++range) {
        const Term& term = instruction.terms[t];
        TORCH_CHECK_VALUE(range->begin >= 0 && range->count >= 0 &&
                              term.channel + range->begin + range->count <= program.args.nodes[term.node].channels,
                          "packed belongs to another program");
        range->weights = at;
        at += weights_of(panel, *range, shape);
      }
      panel.size = at - panel.bias;
    }
    for (int64_t p = static_cast<int64_t>(instruction.panels.size()) - 2; p >= 0; --p)
      if (alike(instruction, instruction.panels[p], instruction.panels[p + 1]))
        instruction.panels[p].together = instruction.panels[p + 1].together + 1;
  }
  TORCH_CHECK_VALUE(at == packed.numel(), "packed belongs to another program");
  program.args.packed = header;
}

}  // namespace dgm::masked_conv
