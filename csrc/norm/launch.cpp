// Tensors to kernel arguments, allocation and threads of the norm op. CPU only: on GPUs its kernels are Triton's.
#include "norm/launch.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "norm/cpu.h"

namespace dgm::norm {

namespace {

constexpr int64_t kLargeElements = 1 << 21;
constexpr int64_t kGrainElements = 16384;  // that are worth a thread: waking one costs some microseconds

// A result of this size is not found in the second cache when it is read again; stored past the caches, its lines need
// not be read from memory first (measured: a third of the time of a modulated layer norm).
// Whether results like x go past the caches. Those in 16 bits are converted from a buffer, which must stay in them.
bool is_large(const at::Tensor& x) { return x.numel() >= kLargeElements && x.scalar_type() == at::kFloat; }

Output output_of(const char* name, const at::Tensor& tensor) {
  return {tensor.mutable_data_ptr(), dtype_of(name, tensor)};
}

// The gradient of an optional operand, and where it goes; empty where the operand is absent.
at::Tensor gradient_of(const char* name, const OptionalTensor& operand, Output& to) {
  if (!present(operand)) return empty({0}, at::kFloat);
  at::Tensor grad = empty(operand->sizes(), operand->scalar_type());
  to = output_of(name, grad);
  return grad;
}

// A number for each of `size` places.
Operand parameter(const char* name, const OptionalTensor& tensor, int64_t size) {
  if (!present(tensor)) return {};
  TORCH_CHECK_VALUE(tensor->is_cpu(), name, " must be on the CPU, got ", tensor->device());
  TORCH_CHECK_TYPE(tensor->is_floating_point(), name, " must be a floating-point tensor, got ", tensor->scalar_type());
  TORCH_CHECK_VALUE(tensor->numel() == size && tensor->is_contiguous(), name, " must be contiguous, with ", size,
                    " elements, got ", tensor->sizes());
  return {tensor->const_data_ptr(), dtype_of(name, *tensor)};
}

// A row of `size` for each sample, at any distance.
SampleRows sample_rows(const char* name, const OptionalTensor& tensor, int64_t batch, int64_t size) {
  if (!present(tensor)) return {};
  TORCH_CHECK_VALUE(tensor->is_cpu(), name, " must be on the CPU, got ", tensor->device());
  TORCH_CHECK_TYPE(tensor->is_floating_point(), name, " must be a floating-point tensor, got ", tensor->scalar_type());
  TORCH_CHECK_VALUE(tensor->dim() == 2 && tensor->size(0) == batch && tensor->size(1) == size, name, " must be [",
                    batch, ", ", size, "], got ", tensor->sizes());
  TORCH_CHECK_VALUE(size <= 1 || tensor->stride(1) == 1, name, " must have contiguous rows, got strides ",
                    tensor->strides());
  return {tensor->const_data_ptr(), dtype_of(name, *tensor), tensor->stride(0)};
}

// Rows, samples and parts. Gate, scale and shift have a row a sample; without them all rows are of one sample.
void set_sizes(RowsArgs& args, const at::Tensor& x, bool modulated, int64_t size) {
  TORCH_CHECK_VALUE(x.is_cpu(), "x must be on the CPU, got ", x.device());
  TORCH_CHECK_VALUE(size > 0 && x.numel() % size == 0 && (!modulated || x.dim() > 0),
                    "size must be positive and divide the elements of x, got ", size, " for ", x.sizes());
  args.size = size;
  args.stream = is_large(x);
  args.batch = modulated ? x.size(0) : 1;
  args.tokens = args.batch ? x.numel() / size / args.batch : 0;
  args.parts = ceil_divide(args.tokens, kPartRows);
}

template <class Kernel>
void over_rows(Kernel kernel, const RowsArgs& args) {
  const int64_t of_unit = std::max<int64_t>(std::min(args.tokens, kPartRows) * args.size, 1);
  at::parallel_for(0, args.batch * args.parts, ceil_divide(kGrainElements, of_unit),
                   [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

template <class Kernel>
void over_groups(Kernel kernel, const GroupArgs& args) {
  const int64_t of_unit = std::max<int64_t>(args.channels / args.groups * args.elements, 1);
  at::parallel_for(0, args.batch * args.groups, ceil_divide(kGrainElements, of_unit),
                   [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void finish_sums(const FinishArgs& args) {
  const auto kernel = DGM_PICK_ISA(finish);
  const int64_t of_block = std::max<int64_t>(args.batch * args.parts * args.sums * kFinishColumns, 1);
  at::parallel_for(0, ceil_divide(args.size, kFinishColumns), ceil_divide(kGrainElements, of_block),
                   [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> rows(
    const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& gate, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& shift, int64_t size, bool rms,
    double eps, at::ScalarType dtype, at::ScalarType h_dtype) {
  TORCH_CHECK_VALUE(present(residual) || !present(gate), "gate must be absent without a residual");
  RowsArgs args;
  set_sizes(args, x, present(gate) || present(scale) || present(shift), size);
  args.rms = rms;
  args.eps = static_cast<float>(eps);
  args.x = operand("x", x, x);
  args.residual = operand("residual", residual, x);
  args.gate = sample_rows("gate", gate, args.batch, size);
  args.weight = parameter("weight", weight, size);
  args.bias = parameter("bias", bias, size);
  args.scale = sample_rows("scale", scale, args.batch, size);
  args.shift = sample_rows("shift", shift, args.batch, size);
  const int64_t count = x.numel() / size;
  args.stream = args.stream && dtype == at::kFloat;
  at::Tensor y = empty(x.sizes(), dtype), rstd = empty({count}, at::kFloat);
  at::Tensor mean = empty({rms ? 0 : count}, at::kFloat);
  at::Tensor h = present(residual) ? empty(x.sizes(), h_dtype) : empty({0}, h_dtype);
  args.y = output_of("y", y);
  if (present(residual)) args.h = output_of("h", h);
  args.mean = rms ? nullptr : mean.mutable_data_ptr<float>();
  args.rstd = rstd.mutable_data_ptr<float>();
  over_rows(DGM_PICK_ISA(rows), args);
  return {std::move(y), std::move(h), std::move(mean), std::move(rstd)};
}

SevenTensors rows_backward(const at::Tensor& grad, const OptionalTensor& grad_h, const at::Tensor& h,
                           const OptionalTensor& x, const OptionalTensor& gate, const OptionalTensor& weight,
                           const OptionalTensor& bias, const OptionalTensor& scale, bool with_shift,
                           const at::Tensor& mean, const at::Tensor& rstd, int64_t size, bool rms) {
  TORCH_CHECK_VALUE(present(x) == present(gate), "x must be given with a gate, and only then");
  TORCH_CHECK_VALUE(!with_shift || present(scale), "scale must be given with a shift");
  RowsArgs args;
  set_sizes(args, h, present(gate) || present(scale), size);
  args.rms = rms;
  args.grad = operand("grad", grad, h);
  args.grad_h = operand("grad_h", grad_h, h);
  args.normalized = operand("h", h, h);
  args.x = operand("x", x, h);
  args.gate = sample_rows("gate", gate, args.batch, size);
  args.weight = parameter("weight", weight, size);
  args.scale = sample_rows("scale", scale, args.batch, size);
  if (!rms) args.given_mean = floats_in("mean", mean, h.numel() / size);
  args.given_rstd = floats_in("rstd", rstd, h.numel() / size);
  at::Tensor to_h = empty(h.sizes(), h.scalar_type());
  args.to_h = output_of("h", to_h);
  at::Tensor to_x = gradient_of("x", x, args.to_x);
  const bool summed = present(weight) || present(bias) || present(scale);
  args.sums = present(gate) ? 3 : summed ? 2 : 0;
  const at::Tensor partials = empty({args.batch, args.parts, args.sums, size}, at::kFloat);
  args.partials = partials.mutable_data_ptr<float>();
  over_rows(DGM_PICK_ISA(rows_backward), args);
  FinishArgs last{args.batch,
                  args.parts,
                  size,
                  args.sums,
                  args.partials,
                  args.weight,
                  parameter("bias", bias, size),
                  args.scale,
                  {},
                  {},
                  {},
                  {},
                  {}};
  at::Tensor to_gate = gradient_of("gate", gate, last.to_gate),
             to_weight = gradient_of("weight", weight, last.to_weight);
  at::Tensor to_bias = gradient_of("bias", bias, last.to_bias), to_scale = gradient_of("scale", scale, last.to_scale);
  at::Tensor to_shift = with_shift ? empty(scale->sizes(), at::kFloat) : empty({0}, at::kFloat);
  if (with_shift) last.to_shift = output_of("shift", to_shift);
  if (args.sums) finish_sums(last);
  return {std::move(to_h),    std::move(to_x),     std::move(to_gate), std::move(to_weight),
          std::move(to_bias), std::move(to_scale), std::move(to_shift)};
}

namespace {

GroupArgs group_args(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& scale, const OptionalTensor& shift, int64_t groups) {
  TORCH_CHECK_VALUE(x.is_cpu(), "x must be on the CPU, got ", x.device());
  TORCH_CHECK_VALUE(x.dim() > 1 && groups > 0 && x.size(1) > 0 && x.size(1) % groups == 0,
                    "groups must be positive and divide the channels of x, got ", groups, " for ", x.sizes());
  GroupArgs args;
  args.batch = x.size(0);
  args.channels = x.size(1);
  args.elements = elements_per_sample(x) / args.channels;
  args.groups = groups;
  args.stream = is_large(x);
  args.x = operand("x", x, x);
  args.weight = parameter("weight", weight, args.channels);
  args.bias = parameter("bias", bias, args.channels);
  args.scale = sample_rows("scale", scale, args.batch, args.channels);
  args.shift = sample_rows("shift", shift, args.batch, args.channels);
  return args;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_silu(const at::Tensor& x, const OptionalTensor& weight,
                                                          const OptionalTensor& bias, const OptionalTensor& scale,
                                                          const OptionalTensor& shift, int64_t groups, double eps,
                                                          at::ScalarType dtype) {
  GroupArgs args = group_args(x, weight, bias, scale, shift, groups);
  args.eps = static_cast<float>(eps);
  args.stream = args.stream && dtype == at::kFloat;
  at::Tensor y = empty(x.sizes(), dtype);
  at::Tensor mean = empty({args.batch * groups}, at::kFloat), rstd = empty({args.batch * groups}, at::kFloat);
  args.y = output_of("y", y);
  args.mean = mean.mutable_data_ptr<float>();
  args.rstd = rstd.mutable_data_ptr<float>();
  over_groups(DGM_PICK_ISA(group_silu), args);
  return {std::move(y), std::move(mean), std::move(rstd)};
}

FiveTensors group_silu_backward(const at::Tensor& grad, const at::Tensor& x, const OptionalTensor& weight,
                                const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& shift,
                                const at::Tensor& mean, const at::Tensor& rstd, int64_t groups) {
  GroupArgs args = group_args(x, weight, bias, scale, shift, groups);
  args.grad = operand("grad", grad, x);
  args.given_mean = floats_in("mean", mean, args.batch * groups);
  args.given_rstd = floats_in("rstd", rstd, args.batch * groups);
  at::Tensor to_x = empty(x.sizes(), x.scalar_type());
  args.to_x = output_of("x", to_x);
  const at::Tensor partials = empty({args.batch, 2, args.channels}, at::kFloat);
  args.partials = partials.mutable_data_ptr<float>();
  over_groups(DGM_PICK_ISA(group_silu_backward), args);
  FinishArgs last{args.batch, 1, args.channels, 2, args.partials, args.weight, args.bias, args.scale, {}, {}, {},
                  {},         {}};
  at::Tensor to_weight = gradient_of("weight", weight, last.to_weight),
             to_bias = gradient_of("bias", bias, last.to_bias);
  at::Tensor to_scale = gradient_of("scale", scale, last.to_scale),
             to_shift = gradient_of("shift", shift, last.to_shift);
  finish_sums(last);
  return {std::move(to_x), std::move(to_weight), std::move(to_bias), std::move(to_scale), std::move(to_shift)};
}

}  // namespace dgm::norm
