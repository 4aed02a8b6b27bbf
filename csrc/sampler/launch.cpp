// Tensors to kernel arguments, allocation, threads and streams of the sampler op; the same code serves CPU and CUDA.
#include "sampler/launch.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>

#include "sampler/cpu.h"
#ifdef DGM_WITH_CUDA
#include "sampler/cuda.h"
#endif

namespace dgm::sampler {

namespace {

// Elements that are worth a thread: waking one costs some microseconds.
constexpr int64_t kGrainElements = 32768, kGrainElementsDrawn = 4096;

Shape shape_of(const at::Tensor& x) { return {x.size(0), elements_per_sample(x)}; }

Rows rows_of(const at::Tensor& rows, const char* name, const OptionalTensor& index_tensor, int64_t index,
             const at::Tensor& like, int64_t columns) {
  TORCH_CHECK_TYPE(rows.scalar_type() == at::kFloat, "rows must be float32, got ", rows.scalar_type());
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.size(1) == columns && rows.is_contiguous(), "rows must be [steps, ",
                    columns, "], got ", rows.sizes());
  TORCH_CHECK_VALUE(rows.device() == like.device(), "rows must be on ", like.device(), ", got ", rows.device());
  Rows result{rows.const_data_ptr<float>(), rows.size(0), nullptr, 0, index};
  result.index_tensor = integers(name, index_tensor, like, result.index_stride);
  if (!result.index_tensor) {
    TORCH_CHECK_VALUE(index >= 0 && index < result.count, name, " must be in [0, ", result.count, "), got ", index);
  } else if (like.is_cpu()) {  // on a GPU the kernel answers NaN: looking would stall the stream
    for (int64_t i = 0; i < index_tensor->numel(); ++i) {
      const int64_t value = result.index_tensor[i];
      TORCH_CHECK_VALUE(value >= 0 && value < result.count, name, " must be in [0, ", result.count, "), got ", value);
    }
  }
  return result;
}

StepArgs step_args(DGM_STEP_PARAMETERS) {
  (void)clips;  // only the backward formula asks
  StepArgs args;
  args.shape = shape_of(x);
  args.rows = rows_of(rows, "step", step_tensor, step, x, kStepColumns);
  args.noise = noise_args(DGM_NOISE_ARGUMENTS, x);
  args.x = operand("x", x, x);
  args.model_output = operand("model_output", model_output, x);
  args.unconditional = operand("guidance", unconditional, x);
  args.history = operand("history", history, x);
  args.known = operand("known", known, x);
  args.mask = mask_operand("mask", mask, x);
  TORCH_CHECK_VALUE(present(known) == present(mask), "known and mask go together, got only one of them");
  args.guidance_scale = static_cast<float>(guidance_scale);
  if (present(threshold)) {
    TORCH_CHECK_VALUE(threshold->scalar_type() == at::kFloat && threshold->is_contiguous() &&
                          threshold->numel() == x.size(0) && threshold->device() == x.device(),
                      "threshold must be float32 [batch]");
    args.threshold = threshold->const_data_ptr<float>();
  }
  return args;
}

// Spreads units of `unit_elements` (or of a whole sample, if that is less) over the threads.
template <class Kernel, class Args>
void on_threads(Kernel kernel, const Args& args, int64_t unit_elements) {
  const Shape& shape = args.shape;
  const int64_t units = shape.batch * ((shape.elements + unit_elements - 1) / unit_elements);
  const int64_t held = std::max<int64_t>(std::min(unit_elements, shape.elements), 1);
  const int64_t grain = ((args.noise.drawn ? kGrainElementsDrawn : kGrainElements) + held - 1) / held;
  at::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

int64_t block_elements() { return DGM_PICK_ISA(block_elements)(); }

#ifdef DGM_WITH_CUDA
#define DGM_RUN(kernel, args, like, unit_elements)                    \
  do {                                                                \
    if ((like).is_cuda()) {                                           \
      const c10::cuda::CUDAGuard guard((like).device());              \
      cuda::kernel(args, c10::cuda::getCurrentCUDAStream().stream()); \
    } else {                                                          \
      on_threads(DGM_PICK_ISA(kernel), args, unit_elements);          \
    }                                                                 \
  } while (false)
#else
#define DGM_RUN(kernel, args, like, unit_elements) on_threads(DGM_PICK_ISA(kernel), args, unit_elements)
#endif

void run_step(StepArgs& args, const at::Tensor& like, const at::Tensor& out, const OptionalTensor& x0) {
  args.out = output("out", out, like);
  if (present(x0)) args.x0 = output("x0", *x0, like);
  if (like.numel() == 0) return;
  DGM_RUN(step, args, like, block_elements());
}

// Adds the parts up in their order. No elements: 0 / 0, the mean of nothing.
void finish_loss(const LossArgs& args) {
  for (int64_t sample = 0; sample < args.shape.batch; ++sample) {
    double squares = 0.0;
    for (int64_t part = 0; part < args.parts; ++part) squares += args.partials[sample * args.parts + part];
    const int64_t t = args.rows.index_tensor[sample * args.rows.index_stride];
    const float weight = args.rows.data[t * kTrainingColumns + 4];
    args.loss[sample] = static_cast<float>(weight * squares / static_cast<double>(args.shape.elements));
  }
}

}  // namespace

at::Tensor noise_like(const at::Tensor& like, DGM_NOISE_PARAMETERS, int64_t kind) {
  NoiseLikeArgs args{shape_of(like), noise_args(DGM_NOISE_ARGUMENTS, like), static_cast<NoiseKind>(kind), {}};
  TORCH_CHECK_VALUE(args.noise.drawn, "noise_like needs a key");
  const bool bits = args.kind == NoiseKind::Bits;
  const at::Tensor out = at::empty(like.sizes(), bits ? like.options().dtype(at::kInt) : like.options());
  args.out = {out.mutable_data_ptr(), bits ? DType::Float32 : dtype_of("like", like)};
  if (out.numel() == 0) return out;
  DGM_RUN(noise_like, args, like, block_elements());
  return out;
}

std::tuple<at::Tensor, at::Tensor> sampler_step(DGM_STEP_PARAMETERS, bool return_x0) {
  StepArgs args = step_args(x, model_output, rows, step_tensor, step, DGM_NOISE_ARGUMENTS, history, unconditional,
                            guidance_scale, known, mask, threshold, clips);
  at::Tensor out = at::empty_like(x);
  at::Tensor x0 = return_x0 ? at::empty_like(x) : at::empty({0}, x.options());
  run_step(args, x, out, return_x0 ? OptionalTensor(x0) : OptionalTensor());
  return {std::move(out), std::move(x0)};
}

void sampler_step_out(DGM_STEP_PARAMETERS, const at::Tensor& out, const OptionalTensor& x0_out) {
  StepArgs args = step_args(x, model_output, rows, step_tensor, step, DGM_NOISE_ARGUMENTS, history, unconditional,
                            guidance_scale, known, mask, threshold, clips);
  run_step(args, x, out, x0_out);
}

at::Tensor add_noise(const at::Tensor& x0, const at::Tensor& rows, const at::Tensor& t, DGM_NOISE_PARAMETERS) {
  AddNoiseArgs args;
  args.shape = shape_of(x0);
  args.rows = rows_of(rows, "t", t, 0, x0, kTrainingColumns);
  args.noise = noise_args(DGM_NOISE_ARGUMENTS, x0);
  TORCH_CHECK_VALUE(args.noise.drawn || args.noise.given.data || x0.numel() == 0, "noise must be a tensor or a key");
  args.x0 = operand("x0", x0, x0);
  at::Tensor out = at::empty_like(x0);
  args.out = output("out", out, x0);
  if (out.numel() == 0) return out;
  DGM_RUN(add_noise, args, x0, block_elements());
  return out;
}

std::tuple<at::Tensor, at::Tensor> denoising_loss(const at::Tensor& model_output, const at::Tensor& x0,
                                                  const at::Tensor& rows, const at::Tensor& t, DGM_NOISE_PARAMETERS,
                                                  bool with_residual) {
  LossArgs args;
  args.shape = shape_of(x0);
  args.rows = rows_of(rows, "t", t, 0, x0, kTrainingColumns);
  args.noise = noise_args(DGM_NOISE_ARGUMENTS, x0);
  args.model_output = operand("model_output", model_output, x0);
  TORCH_CHECK_VALUE(args.noise.drawn || args.noise.given.data || x0.numel() == 0, "noise must be a tensor or a key");
  args.x0 = operand("x0", x0, x0);
  args.parts = (args.shape.elements + kLossPart - 1) / kLossPart;
  at::Tensor residual = with_residual ? at::empty_like(model_output) : at::empty({0}, model_output.options());
  if (with_residual) args.residual = output("residual", residual, x0);
  const at::Tensor partials = at::empty({args.shape.batch, args.parts}, x0.options().dtype(at::kDouble));
  args.partials = partials.mutable_data_ptr<double>();
  at::Tensor loss = at::empty({args.shape.batch}, x0.options().dtype(at::kFloat));
  args.loss = loss.mutable_data_ptr<float>();
  if (args.shape.batch) DGM_RUN(denoising_loss, args, x0, kLossPart);
  if (x0.is_cpu()) finish_loss(args);
  return {std::move(loss), std::move(residual)};
}

}  // namespace dgm::sampler
