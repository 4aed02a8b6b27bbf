// Tensors to kernel arguments, allocation, packing of weights and threads of masked convolution.
#include "masked_conv/launch.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "masked_conv/cpu.h"

namespace dgm::masked_conv {

namespace {

enum class Layout : int64_t { Raster, Vertical, Horizontal };

constexpr int64_t kWorthAThread = 1 << 18;  // multiplications: waking a thread costs some microseconds

at::Tensor floats(int64_t count) { return at::empty({count}, at::TensorOptions(at::kFloat)); }

// What taps.Kernel is in Python: which taps are live, and which pixel each reads.
struct Kernel {
  Layout layout;
  bool strict;
  int64_t groups, height, width, step_y, step_x;

  Rule rule(int64_t row, int64_t column) const {
    const int64_t centre_row = layout == Layout::Raster ? height / 2 : height - 1;
    const int64_t centre_column = layout == Layout::Horizontal ? width - 1 : width / 2;
    if (row != centre_row) return row < centre_row ? Rule::Full : Rule::Dead;
    if (layout == Layout::Vertical) return strict ? Rule::Dead : Rule::Full;
    if (column != centre_column) return column < centre_column ? Rule::Full : Rule::Dead;
    if (groups > 1) return strict ? Rule::Less : Rule::LessEqual;
    return strict ? Rule::Dead : Rule::Full;
  }

  // The live taps that read pixels of a picture of this size; turned over for the gradient of the input.
  std::vector<Tap> taps(bool turned, const at::Tensor& x) const {
    const int64_t centre_row = layout == Layout::Raster ? height / 2 : height - 1;
    const int64_t centre_column = layout == Layout::Horizontal ? width - 1 : width / 2, sign = turned ? -1 : 1;
    std::vector<Tap> live;
    for (int64_t row = 0; row < height; ++row)
      for (int64_t column = 0; column < width; ++column) {
        const int64_t dy = sign * (row - centre_row) * step_y, dx = sign * (column - centre_column) * step_x;
        const bool inside = std::abs(dy) < x.size(2) && std::abs(dx) < x.size(3);
        if (inside && rule(row, column) != Rule::Dead)
          live.push_back({row * width + column, dy, dx, rule(row, column)});
      }
    return live;
  }
};

// The weights of a kernel as the panels read them. A result is an output channel and reads input channels; turned, for
// the gradient of the input, it is the other way round.
struct Packing {
  std::vector<Block> blocks;
  at::Tensor weights;
};

class Packer {
 public:
  Packer(const at::Tensor& weight, const std::vector<Tap>& taps, int64_t groups, bool turned, int64_t panel)
      : wide_(weight.to(at::kFloat)),
        data_(wide_.const_data_ptr<float>()),
        taps_(taps),
        groups_(groups),
        turned_(turned),
        panel_(panel),
        results_(weight.size(turned ? 1 : 0)),
        inputs_(weight.size(turned ? 0 : 1)),
        kernel_(weight.size(2) * weight.size(3)) {}

  Packing pack() const {
    const int64_t panels = ceil_divide(results_, panel_), taps = static_cast<int64_t>(taps_.size());
    Packing packing;
    packing.blocks.resize(panels * taps);
    int64_t size = 0;
    for (int64_t i = 0; i < panels * taps; ++i) {
      packing.blocks[i] = block(i / taps, taps_[i % taps].rule, size);
      size += packing.blocks[i].count * panel_;
    }
    packing.weights = floats(size);
    float* to = packing.weights.mutable_data_ptr<float>();
    const int64_t grain = std::max<int64_t>(1, 16384 * panels * taps / std::max<int64_t>(size, 1));
    at::parallel_for(0, panels * taps, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) fill(i / taps, taps_[i % taps], packing.blocks[i], to);
    });
    return packing;
  }

 private:
  int64_t result_group(int64_t result) const { return result * groups_ / results_; }
  int64_t input_group(int64_t input) const { return input * groups_ / inputs_; }

  bool connects(Rule rule, int64_t result, int64_t input) const {
    if (rule == Rule::Full) return true;
    const int64_t after = turned_ ? input_group(input) : result_group(result);
    const int64_t before = turned_ ? result_group(result) : input_group(input);
    return rule == Rule::Less ? before < after : before <= after;
  }

  // The inputs that any result of the panel reads: groups are intervals, so that they are an interval too.
  Block block(int64_t panel, Rule rule, int64_t offset) const {
    const int64_t first = panel * panel_, last = std::min(first + panel_, results_) - 1;
    const int64_t widest = turned_ ? first : last;
    int64_t begin = 0, end = inputs_;
    while (begin < end && !connects(rule, widest, begin)) ++begin;
    while (begin < end && !connects(rule, widest, end - 1)) --end;
    return {begin, end - begin, offset};
  }

  void fill(int64_t panel, const Tap& tap, const Block& block, float* to) const {
    const int64_t result_stride = (turned_ ? 1 : inputs_) * kernel_, input_stride = (turned_ ? results_ : 1) * kernel_;
    to += block.offset;
    for (int64_t k = block.begin; k < block.begin + block.count; ++k)
      for (int64_t j = 0; j < panel_; ++j, ++to) {
        const int64_t result = panel * panel_ + j;
        const bool counts = result < results_ && connects(tap.rule, result, k);
        *to = counts ? data_[result * result_stride + k * input_stride + tap.index] : 0.0f;
      }
  }

  at::Tensor wide_;
  const float* data_;
  const std::vector<Tap>& taps_;
  int64_t groups_;
  bool turned_;
  int64_t panel_, results_, inputs_, kernel_;
};

void check_images(const char* name, const at::Tensor& x, int64_t channels) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.size(1) == channels, name, " must have shape [batch, ", channels,
                    ", height, width], got ", x.sizes());
}

void check_kernel(const at::Tensor& weight, int64_t groups) {
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.is_contiguous() && weight.is_cpu(),
                    "weight must be contiguous, of four dimensions and on the CPU, got ", weight.sizes());
  TORCH_CHECK_VALUE(groups > 0, "groups must be positive, got ", groups);
}

// The convolution of x with the taps of `packing`, to `channels` results.
at::Tensor run(const at::Tensor& x, int64_t channels, const std::vector<Tap>& taps, const Packing& packing,
               const float* bias) {
  const at::Tensor y = at::empty({x.size(0), channels, x.size(2), x.size(3)}, x.options());
  if (y.numel() == 0) return y;
  ConvArgs args;
  args.batch = x.size(0), args.inputs = x.size(1), args.outputs = channels;
  args.height = x.size(2), args.width = x.size(3);
  int64_t below = 0, right = 0;
  for (const Tap& tap : taps) {
    args.above = std::max(args.above, -tap.dy), below = std::max(below, tap.dy);
    args.left = std::max(args.left, -tap.dx), right = std::max(right, tap.dx);
  }
  args.padded_height = args.above + args.height + below, args.padded_width = args.left + args.width + right;
  args.taps = taps.data(), args.number = static_cast<int64_t>(taps.size());
  args.blocks = packing.blocks.data(), args.packed = packing.weights.const_data_ptr<float>();
  args.bias = bias;
  args.x = operand("x", x, x), args.y = output("y", y, y);
  const int64_t panels = ceil_divide(channels, DGM_PICK_ISA(panel_width)());
  const int64_t work = packing.weights.numel() * args.height * args.width;  // multiplications a sample
  const int64_t units =
      std::min(ceil_divide(4 * at::get_num_threads(), args.batch), work / kWorthAThread);  // of a sample
  args.areas = std::clamp<int64_t>(units, 1, args.height > 1 ? args.height : ceil_divide(args.width, 16));
  args.panel_parts = std::clamp<int64_t>(ceil_divide(units, args.areas), 1, panels);
  const auto conv = DGM_PICK_ISA(conv);
  const int64_t scratch = args.inputs * args.padded_height * args.padded_width, parts = args.areas * args.panel_parts;
  const int64_t grain = std::max<int64_t>(1, kWorthAThread * parts / std::max<int64_t>(work, 1));
  at::parallel_for(0, args.batch * parts, grain, [&](int64_t begin, int64_t end) {
    const at::Tensor padded = at::zeros({scratch}, at::TensorOptions(at::kFloat));
    conv(args, padded.mutable_data_ptr<float>(), begin, end);
  });
  return y;
}

}  // namespace

at::Tensor conv(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, int64_t layout, bool strict,
                int64_t groups, int64_t step_y, int64_t step_x) {
  check_kernel(weight, groups);
  check_images("x", x, weight.size(1));
  const int64_t panel = DGM_PICK_ISA(panel_width)(), outputs = weight.size(0);
  const Kernel kernel{static_cast<Layout>(layout), strict, groups, weight.size(2), weight.size(3), step_y, step_x};
  const std::vector<Tap> taps = kernel.taps(false, x);
  std::vector<float> start;
  if (present(bias)) {
    TORCH_CHECK_VALUE(bias->numel() == outputs && bias->is_cpu(), "bias must have ", outputs, " elements");
    const at::Tensor wide = bias->to(at::kFloat).contiguous();
    start.assign(ceil_divide(outputs, panel) * panel, 0.0f);
    std::copy_n(wide.const_data_ptr<float>(), outputs, start.data());
  }
  const Packing packing = Packer(weight, taps, groups, false, panel).pack();
  return run(x, outputs, taps, packing, start.empty() ? nullptr : start.data());
}

at::Tensor input_grad(const at::Tensor& grad, const at::Tensor& weight, int64_t layout, bool strict, int64_t groups,
                      int64_t step_y, int64_t step_x) {
  check_kernel(weight, groups);
  check_images("grad", grad, weight.size(0));
  const Kernel kernel{static_cast<Layout>(layout), strict, groups, weight.size(2), weight.size(3), step_y, step_x};
  const std::vector<Tap> taps = kernel.taps(true, grad);
  const Packing packing = Packer(weight, taps, groups, true, DGM_PICK_ISA(panel_width)()).pack();
  return run(grad, weight.size(1), taps, packing, nullptr);
}

at::Tensor weight_grad(const at::Tensor& grad, const at::Tensor& x, int64_t height, int64_t width, int64_t layout,
                       bool strict, int64_t groups, int64_t step_y, int64_t step_x) {
  TORCH_CHECK_VALUE(x.dim() == 4, "x must have shape [batch, channels, height, width], got ", x.sizes());
  TORCH_CHECK_VALUE(grad.dim() == 4 && grad.size(0) == x.size(0) && grad.sizes().slice(2) == x.sizes().slice(2),
                    "grad must have the batch and the pixels of x, ", x.sizes(), ", got ", grad.sizes());
  const Kernel kernel{static_cast<Layout>(layout), strict, groups, height, width, step_y, step_x};
  const at::Tensor result = at::zeros({grad.size(1), x.size(1), height, width}, at::TensorOptions(at::kFloat));
  if (result.numel() == 0 || x.numel() == 0) return result.to(x.scalar_type());
  WeightGradArgs args;
  args.exchanged = grad.size(1) < DGM_PICK_ISA(panel_width)() / 2 && grad.size(1) < x.size(1);
  const at::Tensor &in_panels = args.exchanged ? x : grad, &in_tiles = args.exchanged ? grad : x;
  const std::vector<Tap> taps = kernel.taps(args.exchanged, x);
  args.batch = x.size(0), args.inputs = in_tiles.size(1), args.outputs = in_panels.size(1);
  args.height = x.size(2), args.width = x.size(3);
  args.taps = taps.data(), args.number = static_cast<int64_t>(taps.size()), args.groups = groups;
  args.output_stride = args.exchanged ? height * width : x.size(1) * height * width;
  args.input_stride = args.exchanged ? x.size(1) * height * width : height * width;
  args.grad = operand("grad", in_panels, in_panels), args.x = operand("x", in_tiles, in_tiles);
  const int64_t panel = DGM_PICK_ISA(panel_width)(), panels = ceil_divide(args.outputs, panel);
  const int64_t pixels = args.batch * args.height * args.width;
  const at::Tensor grad_rows = floats(panels * pixels * panel),
                   x_rows = floats(ceil_divide(args.inputs, 4) * 4 * pixels);
  args.grad_rows = grad_rows.mutable_data_ptr<float>(), args.x_rows = x_rows.mutable_data_ptr<float>();
  args.result = result.mutable_data_ptr<float>();
  const auto rows = DGM_PICK_ISA(weight_grad_rows);
  at::parallel_for(0, args.batch, std::max<int64_t>(1, kWorthAThread * args.batch / x.numel()),
                   [&](int64_t begin, int64_t end) { rows(args, begin, end); });
  const int64_t units = DGM_PICK_ISA(weight_grad_units)(args);
  const auto run = DGM_PICK_ISA(weight_grad);
  const int64_t work = pixels * args.inputs * args.outputs * args.number / std::max<int64_t>(units, 1);
  at::parallel_for(0, units, std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(work, 1)),
                   [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return result.to(x.scalar_type());
}

}  // namespace dgm::masked_conv
