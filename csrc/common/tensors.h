// Tensors to plain pointers: what the launch code of every op shares. Includes torch; never used by kernels.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <optional>

#include "common/dtype.h"

#ifdef DGM_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace dgm {

using OptionalTensor = std::optional<at::Tensor>;

inline bool present(const OptionalTensor& tensor) { return tensor.has_value() && tensor->defined(); }

inline DType dtype_of(const char* name, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::Float32;
    case at::kBFloat16:
      return DType::BFloat16;
    case at::kHalf:
      return DType::Float16;
    case at::kBool:
      return DType::Bool;
    default:
      TORCH_CHECK_TYPE(false, name, " must be float32, bfloat16, float16 or bool, got ", tensor.scalar_type());
  }
}

// The public functions bring tensors to this form; a direct call of the op is held to it.
inline void check_layout(const char* name, const at::Tensor& tensor, const at::Tensor& like) {
  TORCH_CHECK_VALUE(tensor.sizes() == like.sizes(), name, " must have shape ", like.sizes(), ", got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.device() == like.device(), name, " must be on ", like.device(), ", got ", tensor.device());
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous, got strides ", tensor.strides());
}

inline Operand operand(const char* name, const at::Tensor& tensor, const at::Tensor& like) {
  check_layout(name, tensor, like);
  TORCH_CHECK_TYPE(tensor.is_floating_point(), name, " must be a floating-point tensor, got ", tensor.scalar_type());
  return {tensor.const_data_ptr(), dtype_of(name, tensor)};
}

inline Operand operand(const char* name, const OptionalTensor& tensor, const at::Tensor& like) {
  return present(tensor) ? operand(name, *tensor, like) : Operand{};
}

// A mask may be bool, too.
inline Operand mask_operand(const char* name, const OptionalTensor& tensor, const at::Tensor& like) {
  if (!present(tensor) || tensor->scalar_type() != at::kBool) return operand(name, tensor, like);
  check_layout(name, *tensor, like);
  return {tensor->const_data_ptr(), DType::Bool};
}

inline Output output(const char* name, const at::Tensor& tensor, const at::Tensor& like) {
  check_layout(name, tensor, like);
  TORCH_CHECK_TYPE(tensor.is_floating_point(), name, " must be a floating-point tensor, got ", tensor.scalar_type());
  return {tensor.mutable_data_ptr(), dtype_of(name, tensor)};
}

// An int64 tensor with one element (stride 0) or one a sample (stride 1).
inline const int64_t* integers(const char* name, const OptionalTensor& tensor, const at::Tensor& like,
                               int64_t& stride) {
  if (!present(tensor)) return nullptr;
  TORCH_CHECK_TYPE(tensor->scalar_type() == at::kLong, name, " must be int64, got ", tensor->scalar_type());
  TORCH_CHECK_VALUE(tensor->device() == like.device(), name, " must be on ", like.device(), ", got ", tensor->device());
  TORCH_CHECK_VALUE(tensor->is_contiguous(), name, " must be contiguous");
  TORCH_CHECK_VALUE(tensor->numel() == 1 || (tensor->dim() == 1 && tensor->numel() == like.size(0)), name,
                    " must have one element or ", like.size(0), ", got shape ", tensor->sizes());
  stride = tensor->numel() == 1 ? 0 : 1;
  return tensor->const_data_ptr<int64_t>();
}

inline NoiseArgs noise_args(const OptionalTensor& noise, const OptionalTensor& seed_tensor, int64_t seed,
                            const OptionalTensor& key_step_tensor, int64_t key_step, const OptionalTensor& samples,
                            int64_t first_sample, int64_t stream, const at::Tensor& like) {
  NoiseArgs args;
  int64_t seed_stride = 0, sample_stride = 0;
  args.given = operand("noise", noise, like);
  args.drawn = !present(noise) && stream >= 0;
  args.seed_tensor = integers("seed", seed_tensor, like, seed_stride);
  TORCH_CHECK_VALUE(seed_stride == 0, "seed must have one element");
  args.seed = seed;
  args.step_tensor = integers("noise.step", key_step_tensor, like, args.step_stride);
  args.step = key_step;
  args.samples = integers("samples", samples, like, sample_stride);
  TORCH_CHECK_VALUE(!args.samples || samples->numel() == like.size(0), "samples must have ", like.size(0), " elements");
  TORCH_CHECK_VALUE(stream < 256, "stream must be in [0, 256), got ", stream);
  args.first_sample = first_sample;
  args.stream = static_cast<uint32_t>(stream);
  return args;
}

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// On the CPU.
inline at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::empty(sizes, at::TensorOptions(dtype));
}

// `batch` samples of contiguous elements, at any distance.
inline RowsIn samples_in(const char* name, const at::Tensor& tensor, int64_t batch, int64_t elements) {
  TORCH_CHECK_VALUE(tensor.is_cpu(), name, " must be on the CPU, got ", tensor.device());
  TORCH_CHECK_TYPE(tensor.is_floating_point(), name, " must be a floating-point tensor, got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.dim() > 0 && tensor.size(0) == batch && tensor.numel() == batch * elements, name,
                    " must have ", elements, " elements in each of ", batch, " samples, got ", tensor.sizes());
  int64_t expected = 1;
  for (int64_t dim = tensor.dim() - 1; dim > 0; --dim) {
    TORCH_CHECK_VALUE(tensor.numel() == 0 || tensor.size(dim) == 1 || tensor.stride(dim) == expected, name,
                      " must have contiguous samples, got strides ", tensor.strides());
    expected *= tensor.size(dim);
  }
  return {tensor.const_data_ptr(), dtype_of(name, tensor), tensor.stride(0)};
}

inline RowsIn samples_in(const char* name, const OptionalTensor& tensor, int64_t batch, int64_t elements) {
  return present(tensor) ? samples_in(name, *tensor, batch, elements) : RowsIn{};
}

inline RowsOut rows_out(const char* name, const at::Tensor& tensor, int64_t elements) {
  TORCH_CHECK_TYPE(tensor.is_floating_point(), name, " must be a floating-point tensor, got ", tensor.scalar_type());
  return {tensor.mutable_data_ptr(), dtype_of(name, tensor), elements};
}

// `count` floats on the CPU, or none.
inline const float* floats_in(const char* name, const OptionalTensor& tensor, int64_t count) {
  if (!present(tensor)) return nullptr;
  TORCH_CHECK_VALUE(
      tensor->scalar_type() == at::kFloat && tensor->is_contiguous() && tensor->is_cpu() && tensor->numel() == count,
      name, " must be float32, contiguous and have ", count, " elements, got ", tensor->sizes());
  return tensor->const_data_ptr<float>();
}

// Elements of a sample; the batch is dimension 0.
inline int64_t elements_per_sample(const at::Tensor& x) {
  int64_t count = 1;
  for (int64_t dim = 1; dim < x.dim(); ++dim) count *= x.size(dim);
  return count;
}

}  // namespace dgm
