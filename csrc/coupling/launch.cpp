// Tensors to kernel arguments, allocation and threads of the coupling op. CPU only: on GPUs its kernels are Triton's.
#include "coupling/launch.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zero.h>

#include <algorithm>
#include <vector>

#include "coupling/cpu.h"
#include "coupling/made_program.h"

namespace dgm::coupling {

namespace {

// Elements that are worth a thread: waking one costs some microseconds.
constexpr int64_t kGrainElements = 16384, kGrainSplineElements = 512;

int64_t parts_of(int64_t elements) { return std::max<int64_t>(ceil_divide(elements, kPartElements), 1); }

// The mask of a checkerboard: of one plane, which repeats.
at::Tensor checkerboard(int64_t parity, int64_t width, int64_t plane) {
  at::Tensor mask = empty({plane}, at::kByte);
  uint8_t* data = mask.mutable_data_ptr<uint8_t>();
  for (int64_t row = 0; row * width < plane; ++row)
    for (int64_t column = 0; column < width; ++column) data[row * width + column] = (row + column) % 2 == parity;
  return mask;
}

// `kept` holds the mask for as long as the kernel reads it.
Region region_of(DGM_REGION_PARAMETERS, int64_t batch, int64_t elements, at::Tensor& kept) {
  TORCH_CHECK_VALUE(0 <= start && start <= stop && stop <= elements, "start and stop must be in 0 .. ", elements,
                    ", got ", start, " and ", stop);
  Region region{start, stop, nullptr, std::max<int64_t>(elements, 1), 0};
  if (elements == 0 || batch == 0) return region;
  if (parity >= 0) {
    TORCH_CHECK_VALUE(width > 0 && plane > 0 && plane % width == 0 && elements % plane == 0,
                      "plane must be whole rows and divide a sample, got width ", width, " and plane ", plane);
    kept = checkerboard(parity, width, plane);
  } else if (present(fixed)) {
    TORCH_CHECK_TYPE(fixed->scalar_type() == at::kBool, "fixed must be bool, got ", fixed->scalar_type());
    const int64_t count = fixed->numel();
    TORCH_CHECK_VALUE(
        fixed->is_contiguous() && fixed->is_cpu() && count > 0 && (count == batch * elements || elements % count == 0),
        "fixed must be contiguous, with the elements of the batch or of a repeating part of a sample");
    kept = *fixed;
    if (count == batch * elements) region.fixed_stride = elements;
  } else {
    return region;
  }
  region.fixed = static_cast<const uint8_t*>(kept.const_data_ptr());
  region.fixed_period = std::min(kept.numel(), elements);
  return region;
}

ScaleMap scale_map_of(int64_t scale_map) {
  TORCH_CHECK_VALUE(scale_map >= 0 && scale_map <= 3, "scale_map must be in 0 .. 3, got ", scale_map);
  return static_cast<ScaleMap>(scale_map);
}

template <class Kernel, class Args>
void over_parts(Kernel kernel, const Args& args) {
  const int64_t held = std::max<int64_t>(std::min(args.elements, kPartElements), 1);
  const int64_t grain = ceil_divide(kGrainElements, held);
  at::parallel_for(0, args.batch * args.parts, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// Adds the parts of each sample up in their order; `offset` is added if given.
void add_parts(const double* partials, int64_t batch, int64_t parts, double sign, const OptionalTensor& offset,
               const at::Tensor& out) {
  float* to = out.mutable_data_ptr<float>();
  const float* from = present(offset) ? offset->const_data_ptr<float>() : nullptr;
  for (int64_t sample = 0; sample < batch; ++sample) {
    double total = 0.0;
    for (int64_t part = 0; part < parts; ++part) total += partials[sample * parts + part];
    to[sample] = static_cast<float>(sign * total + (from ? static_cast<double>(from[sample]) : 0.0));
  }
}

// What both passes read. `mask` holds the mask for as long as the kernel reads it.
AffineArgs affine_args(const char* name, const at::Tensor& x, const at::Tensor& shift, const OptionalTensor& log_scale,
                       DGM_REGION_PARAMETERS, int64_t scale_map, bool inverse, at::Tensor& mask) {
  AffineArgs args;
  args.batch = x.size(0);
  args.elements = elements_per_sample(x);
  args.parts = parts_of(args.elements);
  args.region = region_of(fixed, start, stop, parity, width, plane, args.batch, args.elements, mask);
  args.map = scale_map_of(scale_map);
  args.inverse = inverse;
  args.x = samples_in(name, x, args.batch, args.elements);
  args.shift = samples_in("shift", shift, args.batch, stop - start);
  if (present(log_scale)) args.log_scale = samples_in("log_scale", *log_scale, args.batch, stop - start);
  return args;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> affine(const at::Tensor& x, const at::Tensor& shift, const OptionalTensor& log_scale,
                                          DGM_REGION_PARAMETERS, int64_t scale_map, bool inverse,
                                          at::ScalarType dtype) {
  at::Tensor mask;
  AffineArgs args =
      affine_args("x", x, shift, log_scale, fixed, start, stop, parity, width, plane, scale_map, inverse, mask);
  at::Tensor y = empty(x.sizes(), dtype), logdet = empty({args.batch}, at::kFloat);
  args.y = rows_out("y", y, args.elements);
  const at::Tensor partials = empty({args.batch, args.parts}, at::kDouble);
  args.partials = partials.mutable_data_ptr<double>();
  over_parts(DGM_PICK_ISA(affine), args);
  add_parts(args.partials, args.batch, args.parts, inverse ? -1.0 : 1.0, {}, logdet);
  return {std::move(y), std::move(logdet)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> affine_backward(const at::Tensor& grad,
                                                               const OptionalTensor& grad_logdet,
                                                               const at::Tensor& output, const at::Tensor& shift,
                                                               const at::Tensor& log_scale, DGM_REGION_PARAMETERS,
                                                               int64_t scale_map, bool inverse, bool with_shift,
                                                               at::ScalarType x_dtype) {
  at::Tensor mask;
  AffineArgs args = affine_args("output", output, shift, log_scale, fixed, start, stop, parity, width, plane, scale_map,
                                inverse, mask);
  args.grad = samples_in("grad", grad, args.batch, args.elements);
  args.grad_logdet = floats_in("grad_logdet", grad_logdet, args.batch);
  at::Tensor to_x = empty(output.sizes(), x_dtype), to_scale = empty(log_scale.sizes(), log_scale.scalar_type());
  at::Tensor to_shift = with_shift ? empty(shift.sizes(), shift.scalar_type()) : empty({0}, shift.scalar_type());
  args.grad_x = rows_out("grad_x", to_x, args.elements);
  args.grad_log_scale = rows_out("grad_log_scale", to_scale, stop - start);
  if (with_shift) args.grad_shift = rows_out("grad_shift", to_shift, stop - start);
  over_parts(DGM_PICK_ISA(affine_backward), args);
  return {std::move(to_x), std::move(to_shift), std::move(to_scale)};
}

namespace {

// Rows of `length` parameters, evenly spaced: all dimensions but the last are one, in steps of the last of them.
RowsIn parameter_rows(const char* name, const at::Tensor& tensor, const at::Tensor& x, int64_t length) {
  TORCH_CHECK_VALUE(tensor.is_cpu(), name, " must be on the CPU, got ", tensor.device());
  TORCH_CHECK_TYPE(tensor.is_floating_point(), name, " must be a floating-point tensor, got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.dim() == x.dim() + 1 && tensor.numel() == x.numel() * length && tensor.size(-1) == length,
                    name, " must have ", length, " entries for each element of x, got ", tensor.sizes());
  int64_t stride = length, expected = -1;
  for (int64_t dim = tensor.dim() - 2; dim >= 0 && tensor.numel(); --dim) {
    if (tensor.size(dim) == 1) continue;
    if (expected < 0) stride = tensor.stride(dim);
    TORCH_CHECK_VALUE(expected < 0 || tensor.stride(dim) == expected, name,
                      " must have evenly spaced rows, got strides ", tensor.strides());
    expected = tensor.stride(dim) * tensor.size(dim);
  }
  TORCH_CHECK_VALUE(tensor.numel() == 0 || length == 1 || tensor.stride(-1) == 1, name,
                    " must have contiguous rows, got strides ", tensor.strides());
  return {tensor.const_data_ptr(), dtype_of(name, tensor), stride};
}

SplineArgs spline_args(const at::Tensor& x, DGM_SPLINE_PARAMETERS) {
  SplineArgs args;
  args.batch = x.size(0);
  args.elements = elements_per_sample(x);
  const int64_t bins = widths.size(-1);
  TORCH_CHECK_VALUE(bins >= 2 && bins <= kMaxBins, "widths must hold 2 to ", kMaxBins, " bins, got ", bins);
  args.bins = static_cast<int>(bins);
  args.x = operand("x", x, x);
  args.widths = parameter_rows("widths", widths, x, bins);
  args.heights = parameter_rows("heights", heights, x, bins);
  args.derivatives = parameter_rows("derivatives", derivatives, x, tails ? bins - 1 : bins + 1);
  args.bound = static_cast<float>(bound);
  args.min_width = static_cast<float>(min_width);
  args.min_height = static_cast<float>(min_height);
  args.min_derivative = static_cast<float>(min_derivative);
  args.tails = tails;
  args.inverse = inverse;
  return args;
}

template <class Kernel>
void over_elements(Kernel kernel, const SplineArgs& args) {
  const int64_t width = DGM_PICK_ISA(spline_width)(), blocks = (args.batch * args.elements + width - 1) / width;
  at::parallel_for(0, blocks, kGrainSplineElements / width,
                   [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// What the public function checks too, but a direct call of the op must not pass by.
void check_layers(const at::Tensor& z, at::TensorList weights, at::TensorList biases, at::TensorList degrees,
                  int64_t parameters) {
  TORCH_CHECK_VALUE(!weights.empty() && weights.size() == biases.size() && weights.size() == degrees.size(),
                    "weights, biases and degrees must have one tensor a layer");
  TORCH_CHECK_VALUE(degrees[0].numel() == z.size(1), "degrees[0] must have ", z.size(1), " entries");
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t rows = i + 1 < weights.size() ? degrees[i + 1].numel() : z.size(1) * parameters;
    TORCH_CHECK_VALUE(weights[i].is_cpu() && weights[i].is_contiguous() && weights[i].dim() == 2 &&
                          weights[i].size(0) == rows && weights[i].size(1) == degrees[i].numel(),
                      "weights[", i, "] must be contiguous [", rows, ", ", degrees[i].numel(), "], got ",
                      weights[i].sizes());
    TORCH_CHECK_VALUE(biases[i].is_cpu() && biases[i].is_contiguous() && biases[i].numel() == rows, "biases[", i,
                      "] must be contiguous [", rows, "], got ", biases[i].sizes());
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> spline(const at::Tensor& x, DGM_SPLINE_PARAMETERS, at::ScalarType dtype) {
  SplineArgs args =
      spline_args(x, widths, heights, derivatives, bound, tails, min_width, min_height, min_derivative, inverse);
  at::Tensor y = empty(x.sizes(), dtype), logdet = empty({args.batch}, at::kFloat);
  args.y = output("y", y, x);
  const at::Tensor log_slopes = empty({args.batch, args.elements}, at::kFloat);
  args.log_slopes = log_slopes.mutable_data_ptr<float>();
  args.logdet = logdet.mutable_data_ptr<float>();
  over_elements(DGM_PICK_ISA(spline), args);
  const auto finish = DGM_PICK_ISA(finish_spline);
  at::parallel_for(0, args.batch, kGrainElements / std::max<int64_t>(args.elements, 1) + 1,
                   [&](int64_t begin, int64_t end) { finish(args, begin, end); });
  return {std::move(y), std::move(logdet)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> spline_backward(const at::Tensor& grad,
                                                                           const OptionalTensor& grad_logdet,
                                                                           const at::Tensor& x, DGM_SPLINE_PARAMETERS) {
  SplineArgs args =
      spline_args(x, widths, heights, derivatives, bound, tails, min_width, min_height, min_derivative, inverse);
  args.grad = operand("grad", grad, x);
  args.grad_logdet = floats_in("grad_logdet", grad_logdet, args.batch);
  const auto like = [](const at::Tensor& t) { return empty(t.sizes(), t.scalar_type()); };
  at::Tensor to_x = empty(x.sizes(), x.scalar_type());
  at::Tensor to_widths = like(widths), to_heights = like(heights), to_derivatives = like(derivatives);
  args.grad_x = output("grad_x", to_x, x);
  args.grad_widths = rows_out("grad_widths", to_widths, args.bins);
  args.grad_heights = rows_out("grad_heights", to_heights, args.bins);
  args.grad_derivatives = rows_out("grad_derivatives", to_derivatives, derivatives.size(-1));
  over_elements(DGM_PICK_ISA(spline_backward), args);
  return {std::move(to_x), std::move(to_widths), std::move(to_heights), std::move(to_derivatives)};
}

std::tuple<at::Tensor, at::Tensor> made_inverse(const at::Tensor& z, at::TensorList weights, at::TensorList biases,
                                                at::TensorList degrees, int64_t activation, int64_t bins,
                                                int64_t scale_map, double bound, double min_width, double min_height,
                                                double min_derivative) {
  TORCH_CHECK_VALUE(z.dim() == 2, "z must be [batch, features], got ", z.sizes());
  TORCH_CHECK_VALUE(activation >= 0 && activation <= 3, "activation must be in 0 .. 3, got ", activation);
  TORCH_CHECK_VALUE(bins == 0 || (bins >= 2 && bins <= kMaxBins), "bins must be 0 or 2 to ", kMaxBins, ", got ", bins);
  MadeArgs args;
  args.batch = z.size(0);
  args.features = z.size(1);
  args.parameters = bins ? static_cast<int32_t>(3 * bins - 1) : 2;
  check_layers(z, weights, biases, degrees, args.parameters);
  args.activation = static_cast<Activation>(activation);
  args.map = scale_map_of(scale_map);
  args.spline.bins = static_cast<int>(bins);
  args.spline.bound = static_cast<float>(bound);
  args.spline.min_width = static_cast<float>(min_width);
  args.spline.min_height = static_cast<float>(min_height);
  args.spline.min_derivative = static_cast<float>(min_derivative);
  std::vector<at::Tensor> wide_weights, wide_biases;
  for (const at::Tensor& weight : weights) wide_weights.push_back(weight.to(at::kFloat));
  for (const at::Tensor& bias : biases) wide_biases.push_back(bias.to(at::kFloat));
  at::Tensor x = empty(z.sizes(), z.scalar_type()), logdet = empty({args.batch}, at::kFloat);
  args.z = operand("z", z, z);
  args.x = output("x", x, z);
  args.logdet = logdet.mutable_data_ptr<float>();
  const MadeProgram program = made_program(wide_weights, wide_biases, degrees, args.parameters, bins == 0);
  args.groups = program.groups.data();
  args.steps = program.steps.data();
  args.packed = program.packed.const_data_ptr<float>();
  args.rows = program.rows;
  args.parameter_row = program.parameter_row;
  if (args.features == 0) return {std::move(x), logdet.zero_()};
  const int64_t width = DGM_PICK_ISA(made_width)();
  const auto invert = DGM_PICK_ISA(made_inverse);
  const at::Tensor scratch = empty({at::get_num_threads(), args.rows * width}, at::kFloat);
  float* rows = scratch.mutable_data_ptr<float>();
  at::parallel_for(0, (args.batch + width - 1) / width, 1, [&](int64_t begin, int64_t end) {
    invert(args, rows + at::get_thread_num() * args.rows * width, begin, end);
  });
  return {std::move(x), std::move(logdet)};
}

at::Tensor log_prob(const at::Tensor& z, const OptionalTensor& logdet, bool logistic) {
  LogProbArgs args;
  args.batch = z.size(0);
  args.elements = elements_per_sample(z);
  args.parts = parts_of(args.elements);
  args.logistic = logistic;
  args.z = samples_in("z", z, args.batch, args.elements);
  OptionalTensor offset = logdet;
  if (present(logdet)) {
    TORCH_CHECK_VALUE(logdet->numel() == args.batch && logdet->is_contiguous() && logdet->is_cpu(), "logdet must be [",
                      args.batch, "] and contiguous, got ", logdet->sizes());
    offset = logdet->to(at::kFloat);
  }
  const at::Tensor partials = empty({args.batch, args.parts}, at::kDouble);
  args.partials = partials.mutable_data_ptr<double>();
  over_parts(DGM_PICK_ISA(log_prob), args);
  at::Tensor out = empty({args.batch}, at::kFloat);
  add_parts(args.partials, args.batch, args.parts, 1.0, offset, out);
  return out;
}

}  // namespace dgm::coupling
