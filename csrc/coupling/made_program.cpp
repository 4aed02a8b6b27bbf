// Sorts the units of a masked autoregressive network by degree and packs the weights that count.
#include "coupling/made_program.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

namespace dgm::coupling {

namespace {

// The units of a layer by degree: `order` are their numbers, those of a degree up to d the first `up_to[d]`.
struct Level {
  std::vector<int64_t> order, up_to;
  int32_t first_row = 0;
};

Level sorted(const at::Tensor& degrees, int64_t features) {
  TORCH_CHECK_TYPE(degrees.scalar_type() == at::kLong, "degrees must be int64, got ", degrees.scalar_type());
  TORCH_CHECK_VALUE(degrees.is_contiguous() && degrees.is_cpu() && degrees.dim() == 1,
                    "degrees must be contiguous vectors on the CPU");
  Level level{std::vector<int64_t>(degrees.numel()), std::vector<int64_t>(features + 1, 0)};
  const int64_t* degree = degrees.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < degrees.numel(); ++i) {
    TORCH_CHECK_VALUE(degree[i] >= 0 && degree[i] <= features, "degrees must be in 0 .. ", features, ", got ",
                      degree[i]);
    ++level.up_to[degree[i]];
  }
  for (int64_t d = 1; d <= features; ++d) level.up_to[d] += level.up_to[d - 1];
  std::vector<int64_t> next = level.up_to;
  next.insert(next.begin(), 0);  // next[d]: where the next unit of degree d goes
  for (int64_t i = 0; i < degrees.numel(); ++i) level.order[next[degree[i]]++] = i;
  return level;
}

// A group and where its weights come from.
struct Source {
  const at::Tensor *weight, *bias;
  const std::vector<int64_t>* inputs;
  int64_t units[4];
};

class Writer {
 public:
  // Units `numbers` of a layer (rows of its weight), which read the first `inputs` of `from`.
  void add(const at::Tensor& weight, const at::Tensor& bias, const Level& from, int64_t inputs,
           const std::vector<int64_t>& numbers, int32_t to, bool hidden) {
    for (size_t done = 0; done < numbers.size();) {
      const size_t left = numbers.size() - done;
      const int32_t units = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      Source source{&weight, &bias, &from.order, {}};
      std::copy_n(numbers.begin() + done, units, source.units);
      groups.push_back({units, from.first_row, static_cast<int32_t>(inputs), to, hidden, size_});
      sources_.push_back(source);
      size_ += units * (inputs + 1);
      to += units;
      done += units;
    }
  }

  at::Tensor pack() const {
    const at::Tensor packed = at::empty({size_}, at::kFloat);
    float* to = packed.mutable_data_ptr<float>();
    const int64_t grain =
        std::max<int64_t>(1, 16384 * static_cast<int64_t>(groups.size()) / std::max<int64_t>(size_, 1));
    at::parallel_for(0, static_cast<int64_t>(groups.size()), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pack_group(groups[i], sources_[i], to + groups[i].weights);
    });
    return packed;
  }

  std::vector<MadeGroup> groups;

 private:
  static void pack_group(const MadeGroup& group, const Source& source, float* to) {
    const float* bias = source.bias->const_data_ptr<float>();
    const int64_t width = source.weight->size(1);
    for (int u = 0; u < group.units; ++u) {
      to[u] = bias[source.units[u]];
      const float* row = source.weight->const_data_ptr<float>() + source.units[u] * width;
      for (int32_t k = 0; k < group.inputs; ++k) to[(k + 1) * group.units + u] = row[(*source.inputs)[k]];
    }
  }

  std::vector<Source> sources_;
  int64_t size_ = 0;
};

}  // namespace

MadeProgram made_program(at::TensorList weights, at::TensorList biases, at::TensorList degrees, int64_t parameters,
                         bool strided) {
  const int64_t layers = static_cast<int64_t>(weights.size()), features = degrees[0].numel();
  std::vector<Level> levels;
  int32_t rows = 0;
  for (const at::Tensor& degree : degrees) {
    levels.push_back(sorted(degree, features));
    levels.back().first_row = rows;
    rows += static_cast<int32_t>(degree.numel());
  }
  for (int64_t i = 0; i < features; ++i)
    TORCH_CHECK_VALUE(levels[0].up_to[i] == i, "degrees of the features must be a permutation of 1 .. ", features);
  Writer writer;
  const auto hidden_units = [&](int64_t degree) {
    for (int64_t l = 1; l < layers; ++l) {
      const int64_t begin = degree ? levels[l].up_to[degree - 1] : 0, end = levels[l].up_to[degree];
      const std::vector<int64_t> numbers(levels[l].order.begin() + begin, levels[l].order.begin() + end);
      writer.add(weights[l - 1], biases[l - 1], levels[l - 1], levels[l - 1].up_to[degree], numbers,
                 levels[l].first_row + static_cast<int32_t>(begin), true);
    }
  };
  MadeProgram program;
  program.parameter_row = rows;
  hidden_units(0);
  std::vector<int64_t> outputs(parameters);
  for (int64_t degree = 1; degree <= features; ++degree) {
    const int64_t feature = levels[0].order[degree - 1], begin = static_cast<int64_t>(writer.groups.size());
    for (int64_t p = 0; p < parameters; ++p) outputs[p] = strided ? p * features + feature : feature * parameters + p;
    writer.add(weights[layers - 1], biases[layers - 1], levels[layers - 1], levels[layers - 1].up_to[degree - 1],
               outputs, rows, false);
    const int64_t hidden = static_cast<int64_t>(writer.groups.size());
    if (degree < features) hidden_units(degree);  // nothing reads what the last feature would change
    program.steps.push_back({feature, begin, hidden, static_cast<int64_t>(writer.groups.size())});
  }
  program.packed = writer.pack();
  program.groups = std::move(writer.groups);
  program.rows = rows + static_cast<int32_t>(parameters + features);
  return program;
}

}  // namespace dgm::coupling
