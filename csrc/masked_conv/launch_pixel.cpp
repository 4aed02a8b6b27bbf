// Tensors to kernel arguments, allocation and threads of the pixelwise functions of masked_conv.
#include "masked_conv/launch_pixel.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>

#include "masked_conv/cpu_pixel.h"

namespace dgm::masked_conv {

namespace {

// Elements that are worth a thread: waking one costs some microseconds.
constexpr int64_t kGrainElements = 16384;

const float* floats(const char* name, const at::Tensor& tensor, at::IntArrayRef sizes) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, name, " must be float32, got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.is_cpu() && tensor.is_contiguous() && tensor.sizes() == sizes, name,
                    " must be contiguous, on the CPU and of shape ", sizes, ", got ", tensor.sizes());
  return tensor.const_data_ptr<float>();
}

// ---- Gated activation

GateArgs gate_args(const at::Tensor& x, const OptionalTensor& condition) {
  TORCH_CHECK_VALUE(x.dim() >= 2 && x.size(1) % 2 == 0,
                    "x must have shape [batch, channels, ...] with an even number of channels, got ", x.sizes());
  GateArgs args;
  args.x = operand("x", x, x);
  const int64_t channels = x.size(1) / 2, sample = elements_per_sample(x) / 2;
  args.rows = x.size(0), args.length = sample;
  if (!present(condition)) return args;
  args.per_channel = condition->dim() < x.dim();
  if (!args.per_channel) {
    args.condition = operand("condition", *condition, x);
    return args;
  }
  TORCH_CHECK_VALUE(condition->sizes() == x.sizes().slice(0, 2) && condition->is_contiguous() && condition->is_cpu(),
                    "condition must be contiguous, on the CPU and of shape ", x.sizes().slice(0, 2), ", got ",
                    condition->sizes());
  args.condition = operand("condition", *condition, *condition);
  args.rows *= channels, args.rows_per_sample = std::max<int64_t>(channels, 1);
  args.length = channels ? sample / channels : 0;
  return args;
}

// Sums of a row are taken in one piece, so that they do not depend on the number of threads.
template <class Kernel>
void over_parts(Kernel kernel, GateArgs& args, bool whole_rows) {
  args.parts = whole_rows ? 1 : std::max<int64_t>(args.length / kGrainElements, 1);
  const int64_t held = std::max<int64_t>(args.length / args.parts, 1);
  at::parallel_for(0, args.rows * args.parts, ceil_divide(kGrainElements, held),
                   [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// ---- Mixture of discretized logistics

MixtureArgs mixture_args(const at::Tensor& x, const at::Tensor& parameters, int64_t levels) {
  TORCH_CHECK_VALUE(x.dim() >= 2 && (x.size(1) == 1 || x.size(1) == 3), "x must have 1 or 3 channels, got ", x.sizes());
  TORCH_CHECK_VALUE(levels >= 2, "levels must be at least 2, got ", levels);
  const int64_t numbers = x.size(1) == 3 ? 10 : 3;
  TORCH_CHECK_VALUE(parameters.dim() == x.dim() && parameters.size(1) > 0 && parameters.size(1) % numbers == 0 &&
                        parameters.size(0) == x.size(0) && parameters.sizes().slice(2) == x.sizes().slice(2),
                    "parameters must have ", numbers, " numbers a component at each pixel of x, ", x.sizes(), ", got ",
                    parameters.sizes());
  MixtureArgs args;
  args.channels = static_cast<int>(x.size(1));
  args.plane = elements_per_sample(x) / args.channels;
  args.pixels = x.size(0) * args.plane;
  args.mixtures = parameters.size(1) / numbers;
  args.half = static_cast<float>(1.0 / static_cast<double>(levels - 1));
  args.x = operand("x", x, x);
  args.parameters = operand("parameters", parameters, parameters);
  return args;
}

at::DimVector pixels_of(const at::Tensor& x) {
  at::DimVector sizes(x.sizes());
  sizes.erase(sizes.begin() + 1);
  return sizes;
}

template <class Kernel>
void over_tiles(Kernel kernel, const MixtureArgs& args) {
  const int64_t scratch = DGM_PICK_ISA(mixture_scratch)(args);
  at::parallel_for(0, ceil_divide(args.pixels, DGM_PICK_ISA(mixture_tile_pixels)()), 1,
                   [&](int64_t begin, int64_t end) {
                     const at::Tensor held = empty({scratch}, at::kFloat);
                     kernel(args, held.mutable_data_ptr<float>(), begin, end);
                   });
}

// ---- Categorical

CategoricalArgs categorical_args(const at::Tensor& x, const at::Tensor& logits) {
  TORCH_CHECK_VALUE(logits.dim() == 3 && logits.size(1) > 0 && logits.size(1) <= std::numeric_limits<int32_t>::max(),
                    "logits must have shape [outer, levels, inner], got ", logits.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == at::kLong, "x must be int64, got ", x.scalar_type());
  TORCH_CHECK_VALUE(
      x.is_cpu() && x.is_contiguous() && x.dim() == 2 && x.size(0) == logits.size(0) && x.size(1) == logits.size(2),
      "x must be contiguous, on the CPU and of shape [", logits.size(0), ", ", logits.size(2), "], got ", x.sizes());
  CategoricalArgs args;
  args.outer = logits.size(0), args.levels = logits.size(1), args.inner = logits.size(2);
  args.x = x.const_data_ptr<int64_t>();
  args.logits = operand("logits", logits, logits);
  return args;
}

template <class Kernel>
void over_tiles(Kernel kernel, const CategoricalArgs& args) {
  const int64_t tile = DGM_PICK_ISA(categorical_tile_pixels)(args);
  at::parallel_for(0, ceil_divide(args.outer * args.inner, tile), ceil_divide(kGrainElements, args.levels * tile),
                   [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

at::Tensor gate(const at::Tensor& x, const OptionalTensor& condition) {
  GateArgs args = gate_args(x, condition);
  at::DimVector sizes(x.sizes());
  sizes[1] /= 2;
  at::Tensor y = empty(sizes, x.scalar_type());
  args.y = output("y", y, y);
  over_parts(DGM_PICK_ISA(gate), args, false);
  return y;
}

std::tuple<at::Tensor, at::Tensor> gate_backward(const at::Tensor& grad, const at::Tensor& x,
                                                 const OptionalTensor& condition) {
  GateArgs args = gate_args(x, condition);
  TORCH_CHECK_VALUE(grad.numel() == x.numel() / 2, "grad must have half the elements of x, ", x.sizes(), ", got ",
                    grad.sizes());
  args.grad = operand("grad", grad, grad);
  at::Tensor to_x = empty(x.sizes(), x.scalar_type());
  at::Tensor to_condition = empty(args.per_channel ? x.sizes().slice(0, 2) : at::IntArrayRef({0}), at::kFloat);
  args.grad_x = output("grad_x", to_x, x);
  args.grad_condition = to_condition.mutable_data_ptr<float>();
  over_parts(DGM_PICK_ISA(gate_backward), args, args.per_channel);
  return {std::move(to_x), std::move(to_condition)};
}

at::Tensor mixture(const at::Tensor& x, const at::Tensor& parameters, int64_t levels) {
  MixtureArgs args = mixture_args(x, parameters, levels);
  at::Tensor log_prob = empty(pixels_of(x), at::kFloat);
  args.log_prob = log_prob.mutable_data_ptr<float>();
  over_tiles(DGM_PICK_ISA(mixture), args);
  return log_prob;
}

at::Tensor mixture_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& parameters, int64_t levels) {
  MixtureArgs args = mixture_args(x, parameters, levels);
  args.grad = floats("grad", grad, pixels_of(x));
  at::Tensor to_parameters = empty(parameters.sizes(), parameters.scalar_type());
  args.grad_parameters = output("grad_parameters", to_parameters, parameters);
  over_tiles(DGM_PICK_ISA(mixture_backward), args);
  return to_parameters;
}

std::tuple<at::Tensor, at::Tensor> categorical(const at::Tensor& x, const at::Tensor& logits) {
  CategoricalArgs args = categorical_args(x, logits);
  at::Tensor log_prob = empty(x.sizes(), at::kFloat), normaliser = empty(x.sizes(), at::kFloat);
  args.log_prob = log_prob.mutable_data_ptr<float>();
  args.normaliser = normaliser.mutable_data_ptr<float>();
  over_tiles(DGM_PICK_ISA(categorical), args);
  return {std::move(log_prob), std::move(normaliser)};
}

at::Tensor categorical_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& logits,
                                const at::Tensor& normaliser) {
  CategoricalArgs args = categorical_args(x, logits);
  args.grad = floats("grad", grad, x.sizes());
  args.given_normaliser = floats("normaliser", normaliser, x.sizes());
  at::Tensor to_logits = empty(logits.sizes(), logits.scalar_type());
  args.grad_logits = output("grad_logits", to_logits, logits);
  over_tiles(DGM_PICK_ISA(categorical_backward), args);
  return to_logits;
}

}  // namespace dgm::masked_conv
