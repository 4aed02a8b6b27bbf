// Tensors to the generator's arguments, its memory and threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "masked_conv/cpu.h"
#include "masked_conv/launch.h"
#include "masked_conv/program.h"

namespace dgm::masked_conv {

namespace {

PanelShape panel_shape() {
  const int64_t panel = DGM_PICK_ISA(panel_width)();
  return {panel, panel / 2};
}

// A constant as the generator reads a node: a pixel's channels of a sample one after the other.
at::Tensor bind_constant(Node& node, const at::Tensor& constant, int64_t batch, int64_t height, int64_t width) {
  const bool of_pixels = node.kind == NodeKind::PixelConstant;
  const bool fits =
      of_pixels ? constant.dim() == 4 && constant.size(2) == height && constant.size(3) == width : constant.dim() == 2;
  TORCH_CHECK_VALUE(fits && constant.size(1) == node.channels && (constant.size(0) == batch || constant.size(0) == 1) &&
                        constant.scalar_type() == at::kFloat && constant.is_cpu(),
                    "constants[", node.constant, "] must be float32 [", batch, ", ", node.channels,
                    of_pixels ? ", height, width]" : "]", ", got ", constant.sizes());
  const at::Tensor held = of_pixels ? constant.permute({2, 3, 0, 1}).contiguous() : constant.contiguous();
  node.data = const_cast<float*>(held.const_data_ptr<float>());
  node.sample_stride = constant.size(0) == 1 ? 0 : node.channels;
  node.rows = of_pixels ? height : 1, node.columns = of_pixels ? width : 1;
  node.column_stride = of_pixels ? constant.size(0) * node.channels : 0;
  node.row_stride = node.column_stride * width;
  return held;
}

// Room for the feature maps; `held` keeps what the nodes point to.
void bind_nodes(GenerateArgs& args, at::TensorList constants, std::vector<at::Tensor>& held) {
  int64_t size = 0;
  for (Node& node : args.nodes) {
    if (node.kind == NodeKind::SampleConstant || node.kind == NodeKind::PixelConstant) {
      TORCH_CHECK_VALUE(node.constant >= 0 && node.constant < static_cast<int64_t>(constants.size()),
                        "constants must have ", node.constant + 1, " tensors at least, got ", constants.size());
      held.push_back(bind_constant(node, constants[node.constant], args.batch, args.height, args.width));
      continue;
    }
    node.sample_stride = node.channels;
    node.column_stride = args.batch * node.sample_stride;
    node.row_stride = node.columns * node.column_stride;
    size += node.rows * node.row_stride;
  }
  // Zeros: a group of channels may be read, with zero weights, before it is computed.
  held.push_back(at::zeros({size}, at::TensorOptions(at::kFloat)));
  float* data = held.back().mutable_data_ptr<float>();
  for (Node& node : args.nodes) {
    if (node.kind == NodeKind::SampleConstant || node.kind == NodeKind::PixelConstant) continue;
    node.data = data;
    data += node.rows * node.row_stride;
  }
}

void check_output(const GenerateArgs& args) {
  TORCH_CHECK_VALUE(args.output.node >= 0 && args.output.node < static_cast<int64_t>(args.nodes.size()),
                    "program has no output");
  const int64_t there = args.nodes[args.output.node].channels - args.output.channel;
  const int64_t each = args.kind == OutputKind::Categorical ? args.levels : 1;
  const int64_t wanted =
      args.kind == OutputKind::LogisticMixture ? (args.channels == 3 ? 10 : 3) : args.channels * each;
  TORCH_CHECK_VALUE(args.output.channel >= 0 && there >= wanted && args.levels >= 2, "program has too few outputs");
  TORCH_CHECK_VALUE(args.kind != OutputKind::LogisticMixture || args.channels == 1 || args.channels == 3,
                    "program must have 1 or 3 channels for a mixture, got ", args.channels);
  for (const int64_t channel : args.order)
    TORCH_CHECK_VALUE(channel >= 0 && channel < args.channels, "program draws channel ", channel, " of ",
                      args.channels);
}

}  // namespace

at::Tensor pack_program(const at::Tensor& program, at::TensorList weights, at::TensorList degrees) {
  Program decoded = decode(program, panel_shape());
  return pack(decoded, weights, degrees, panel_shape());
}

at::Tensor generate(const at::Tensor& program, const at::Tensor& packed, at::TensorList constants,
                    const at::Tensor& given, const at::Tensor& known, const OptionalTensor& noise,
                    const OptionalTensor& seed_tensor, int64_t seed, const OptionalTensor& key_step_tensor,
                    int64_t key_step, const OptionalTensor& samples, int64_t first_sample, int64_t stream, double scale,
                    double offset) {
  Program decoded = decode(program, panel_shape());
  locate(decoded, packed, panel_shape());
  GenerateArgs& args = decoded.args;
  TORCH_CHECK_VALUE(
      given.dim() == 4 && given.size(1) == args.channels && given.size(2) == args.height &&
          given.size(3) == args.width && given.scalar_type() == at::kLong && given.is_contiguous() && given.is_cpu(),
      "given must be int64 [batch, ", args.channels, ", ", args.height, ", ", args.width, "], got ", given.sizes());
  TORCH_CHECK_VALUE(known.scalar_type() == at::kBool, "known must be bool, got ", known.scalar_type());
  TORCH_CHECK_VALUE(!present(noise) && stream >= 0, "noise must be named by a key");
  check_layout("known", known, given);
  check_output(args);
  args.batch = given.size(0);
  const at::Tensor result = at::empty(given.sizes(), given.options());
  if (result.numel() == 0) return result;
  args.given = given.const_data_ptr<int64_t>(), args.known = known.const_data_ptr<bool>();
  args.result = result.mutable_data_ptr<int64_t>();
  args.noise = noise_args(noise, seed_tensor, seed, key_step_tensor, key_step, samples, first_sample, stream, given);
  args.scale = static_cast<float>(scale), args.offset = static_cast<float>(offset);
  std::vector<at::Tensor> held;
  bind_nodes(args, constants, held);
  const auto run = DGM_PICK_ISA(generate);
  const int64_t workers = std::min<int64_t>(at::get_num_threads(), args.batch);
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w)
      run(args, args.batch * w / workers, args.batch * (w + 1) / workers - args.batch * w / workers);
  });
  return result;
}

}  // namespace dgm::masked_conv
