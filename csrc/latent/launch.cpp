// Tensors to kernel arguments, allocation and threads of the latent op. CPU only: on GPUs its kernels are Triton's.
#include "latent/launch.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "latent/cpu.h"

namespace dgm::latent {

namespace {

// Elements that are worth a thread: waking one costs some microseconds.
constexpr int64_t kStreamElements = 1 << 19;  // results that the second-level caches do not hold go past them
constexpr int64_t kGrainElements = 16384;

#define DGM_KEY_ARGUMENTS noise, seed_tensor, seed, key_step_tensor, key_step, samples, first_sample, stream

Shape shape_of(const at::Tensor& mu) {
  const int64_t elements = elements_per_sample(mu);
  return {mu.size(0), elements, std::max<int64_t>(ceil_divide(elements, kChunk), 1)};
}

// `batches` of given noise follow each other.
NoiseArgs key_args(DGM_KEY_PARAMETERS, const at::Tensor& mu, int64_t batches = 1) {
  NoiseArgs args =
      noise_args(std::nullopt, seed_tensor, seed, key_step_tensor, key_step, samples, first_sample, stream, mu);
  if (present(noise)) {
    TORCH_CHECK_VALUE(noise->is_contiguous() && noise->is_cpu() && noise->numel() == batches * mu.numel(),
                      "noise must be contiguous and have ", batches * mu.numel(), " elements, got ", noise->sizes());
    args.given = {noise->const_data_ptr(), dtype_of("noise", *noise)};
    args.drawn = false;
  }
  TORCH_CHECK_VALUE(args.drawn || present(noise), "noise must be a tensor or a key, got neither");
  return args;
}

int64_t units_of(const Shape& shape) {
  if (shape.parts > 1) return shape.batch * shape.parts;
  const int64_t stride = (shape.elements + 3) / 4 * 4;
  const int64_t together = stride == 0 ? kChunk : std::max<int64_t>(kChunk / stride, 1);
  return ceil_divide(shape.batch, together);
}

// `work` times as much as one pass over the elements.
template <class Kernel, class Args>
void over_chunks(Kernel kernel, const Args& args, int64_t work = 1) {
  const int64_t grain = std::max<int64_t>(kGrainElements / (kChunk * std::max<int64_t>(work, 1)), 1);
  at::parallel_for(0, units_of(args.shape), grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// Adds the parts of each sum up in their order; the terms were twice as large.
at::Tensor add_parts(const at::Tensor& partials, at::IntArrayRef sizes, int64_t parts) {
  at::Tensor sums = empty(sizes, at::kFloat);
  const double* from = partials.const_data_ptr<double>();
  float* to = sums.mutable_data_ptr<float>();
  for (int64_t i = 0; i < sums.numel(); ++i) {
    double total = 0.0;
    for (int64_t part = 0; part < parts; ++part) total += from[i * parts + part];
    to[i] = static_cast<float>(0.5 * total);
  }
  return sums;
}

float least_kl(double free_bits) {
  return free_bits > 0.0 ? static_cast<float>(free_bits) : -std::numeric_limits<float>::infinity();
}

SampleArgs sample_args(const at::Tensor& mu, const at::Tensor& log_var, DGM_KEY_PARAMETERS, DGM_SAMPLE_SETTINGS) {
  SampleArgs args;
  args.shape = shape_of(mu);
  args.noise = key_args(DGM_KEY_ARGUMENTS, mu);
  args.mu = samples_in("mu", mu, args.shape.batch, args.shape.elements);
  args.log_var = samples_in("log_var", log_var, args.shape.batch, args.shape.elements);
  args.log_normal = log_normal;
  args.stream = mu.numel() >= kStreamElements;
  args.free_bits = least_kl(free_bits);
  args.standard = prior_mu == 0.0 && prior_log_var == 0.0;
  args.prior_mu = static_cast<float>(prior_mu);
  args.prior_log_var = static_cast<float>(prior_log_var);
  args.inverse_sigma = static_cast<float>(std::exp(-0.5 * prior_log_var));
  return args;
}

}  // namespace

Pair sample(const at::Tensor& mu, const at::Tensor& log_var, DGM_KEY_PARAMETERS, DGM_SAMPLE_SETTINGS,
            at::ScalarType dtype) {
  SampleArgs args = sample_args(mu, log_var, DGM_KEY_ARGUMENTS, free_bits, log_normal, prior_mu, prior_log_var);
  const Shape& shape = args.shape;
  at::Tensor z = empty(mu.sizes(), dtype);
  args.z = rows_out("z", z, shape.elements);
  const at::Tensor partials = empty({shape.batch, shape.parts}, at::kDouble);
  args.partials = partials.mutable_data_ptr<double>();
  over_chunks(DGM_PICK_ISA(sample), args);
  return {std::move(z), add_parts(partials, {shape.batch}, shape.parts)};
}

Pair sample_backward(const OptionalTensor& grad, const OptionalTensor& grad_kl, const at::Tensor& mu,
                     const at::Tensor& log_var, DGM_KEY_PARAMETERS, DGM_SAMPLE_SETTINGS) {
  SampleArgs args = sample_args(mu, log_var, DGM_KEY_ARGUMENTS, free_bits, log_normal, prior_mu, prior_log_var);
  const Shape& shape = args.shape;
  args.grad = samples_in("grad", grad, shape.batch, shape.elements);
  args.grad_kl = floats_in("grad_kl", grad_kl, shape.batch);
  at::Tensor to_mu = empty(mu.sizes(), mu.scalar_type()), to_log_var = empty(log_var.sizes(), log_var.scalar_type());
  args.grad_mu = rows_out("mu", to_mu, shape.elements);
  args.grad_log_var = rows_out("log_var", to_log_var, shape.elements);
  over_chunks(DGM_PICK_ISA(sample_backward), args);
  return {std::move(to_mu), std::move(to_log_var)};
}

// ---- KL alone

namespace {

SampleArgs kl_args(const at::Tensor& mu, const at::Tensor& log_var, const OptionalTensor& prior_mu,
                   const OptionalTensor& prior_log_var, double free_bits) {
  SampleArgs args;
  args.shape = shape_of(mu);
  const auto [batch, elements, parts] = args.shape;
  args.mu = samples_in("mu", mu, batch, elements);
  args.log_var = samples_in("log_var", log_var, batch, elements);
  args.prior_mu_rows = samples_in("prior_mu", prior_mu, batch, elements);
  args.prior_log_var_rows = samples_in("prior_log_var", prior_log_var, batch, elements);
  args.free_bits = least_kl(free_bits);
  return args;
}

at::Tensor empty_like_or_none(const OptionalTensor& tensor) {
  return present(tensor) ? empty(tensor->sizes(), tensor->scalar_type()) : empty({0}, at::kFloat);
}

RowsOut rows_out_or_none(const char* name, const at::Tensor& tensor, const OptionalTensor& like, int64_t elements) {
  return present(like) ? rows_out(name, tensor, elements) : RowsOut{};
}

}  // namespace

at::Tensor kl(const at::Tensor& mu, const at::Tensor& log_var, const OptionalTensor& prior_mu,
              const OptionalTensor& prior_log_var, double free_bits) {
  SampleArgs args = kl_args(mu, log_var, prior_mu, prior_log_var, free_bits);
  const at::Tensor partials = empty({args.shape.batch, args.shape.parts}, at::kDouble);
  args.partials = partials.mutable_data_ptr<double>();
  over_chunks(DGM_PICK_ISA(kl), args);
  return add_parts(partials, {args.shape.batch}, args.shape.parts);
}

Four kl_backward(const at::Tensor& grad, const at::Tensor& mu, const at::Tensor& log_var,
                 const OptionalTensor& prior_mu, const OptionalTensor& prior_log_var, double free_bits) {
  SampleArgs args = kl_args(mu, log_var, prior_mu, prior_log_var, free_bits);
  const int64_t elements = args.shape.elements;
  args.grad_kl = floats_in("grad", grad, args.shape.batch);
  Four grads = {empty(mu.sizes(), mu.scalar_type()), empty(log_var.sizes(), log_var.scalar_type()),
                empty_like_or_none(prior_mu), empty_like_or_none(prior_log_var)};
  args.grad_mu = rows_out("mu", std::get<0>(grads), elements);
  args.grad_log_var = rows_out("log_var", std::get<1>(grads), elements);
  args.grad_prior_mu = rows_out_or_none("prior_mu", std::get<2>(grads), prior_mu, elements);
  args.grad_prior_log_var = rows_out_or_none("prior_log_var", std::get<3>(grads), prior_log_var, elements);
  over_chunks(DGM_PICK_ISA(kl_backward), args);
  return grads;
}

// ---- Importance samples

namespace {

ImportanceArgs importance_args(const at::Tensor& mu, const at::Tensor& log_var, DGM_KEY_PARAMETERS, int64_t draws,
                               bool log_normal) {
  TORCH_CHECK_VALUE(draws > 0, "draws must be at least 1, got ", draws);
  ImportanceArgs args;
  args.shape = shape_of(mu);
  args.noise = key_args(DGM_KEY_ARGUMENTS, mu, draws);
  args.draws = draws;
  args.stream = draws * mu.numel() >= kStreamElements;
  args.log_normal = log_normal;
  args.mu = samples_in("mu", mu, args.shape.batch, args.shape.elements);
  args.log_var = samples_in("log_var", log_var, args.shape.batch, args.shape.elements);
  return args;
}

std::vector<int64_t> with_draws(int64_t draws, at::IntArrayRef sizes) {
  std::vector<int64_t> all = {draws};
  all.insert(all.end(), sizes.begin(), sizes.end());
  return all;
}

}  // namespace

Pair importance(const at::Tensor& mu, const at::Tensor& log_var, DGM_KEY_PARAMETERS, int64_t draws, bool log_normal,
                at::ScalarType dtype) {
  ImportanceArgs args = importance_args(mu, log_var, DGM_KEY_ARGUMENTS, draws, log_normal);
  const Shape& shape = args.shape;
  at::Tensor z = empty(with_draws(draws, mu.sizes()), dtype);
  args.z = rows_out("z", z, shape.elements);
  const at::Tensor partials = empty({draws, shape.batch, shape.parts}, at::kDouble);
  args.partials = partials.mutable_data_ptr<double>();
  over_chunks(DGM_PICK_ISA(importance), args, draws);
  return {std::move(z), add_parts(partials, {draws, shape.batch}, shape.parts)};
}

Pair importance_backward(const OptionalTensor& grad, const OptionalTensor& grad_ratio, const at::Tensor& mu,
                         const at::Tensor& log_var, DGM_KEY_PARAMETERS, int64_t draws, bool log_normal) {
  ImportanceArgs args = importance_args(mu, log_var, DGM_KEY_ARGUMENTS, draws, log_normal);
  const Shape& shape = args.shape;
  if (present(grad)) {
    TORCH_CHECK_VALUE(grad->is_contiguous() && grad->is_cpu() && grad->numel() == draws * mu.numel(),
                      "grad must be contiguous and have ", draws * mu.numel(), " elements, got ", grad->sizes());
    args.grad = {grad->const_data_ptr(), dtype_of("grad", *grad), shape.elements};
  }
  args.grad_ratio = floats_in("grad_ratio", grad_ratio, draws * shape.batch);
  at::Tensor to_mu = empty(mu.sizes(), mu.scalar_type()), to_log_var = empty(log_var.sizes(), log_var.scalar_type());
  args.grad_mu = rows_out("mu", to_mu, shape.elements);
  args.grad_log_var = rows_out("log_var", to_log_var, shape.elements);
  over_chunks(DGM_PICK_ISA(importance_backward), args, draws);
  return {std::move(to_mu), std::move(to_log_var)};
}

// ---- The bound that importance samples make

namespace {

const float* checked(const char* name, const at::Tensor& x, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(x.is_cpu() && x.scalar_type() == at::kFloat && x.is_contiguous() && x.sizes() == sizes, name,
                    " must be contiguous float32 ", sizes, " on the CPU, got ", x.scalar_type(), " ", x.sizes());
  return x.const_data_ptr<float>();
}

BoundArgs bound_args(const at::Tensor& log_weights) {
  TORCH_CHECK_VALUE(log_weights.dim() == 2 && log_weights.size(0) > 0,
                    "log_weights must be [draws, samples] with at least one draw, got ", log_weights.sizes());
  BoundArgs args;
  args.draws = log_weights.size(0), args.samples = log_weights.size(1);
  args.log_draws = static_cast<float>(std::log(static_cast<double>(args.draws)));
  args.log_weights = checked("log_weights", log_weights, log_weights.sizes());
  return args;
}

template <class Kernel>
void over_samples(Kernel kernel, const BoundArgs& args) {
  const int64_t grain = std::max<int64_t>(kGrainElements / args.draws / 64 * 64, 64);  // whole vectors
  at::parallel_for(0, ceil_divide(args.samples, grain), 1, [&](int64_t begin, int64_t end) {
    kernel(args, begin * grain, std::min(end * grain, args.samples));
  });
}

}  // namespace

at::Tensor bound(const at::Tensor& log_weights) {
  BoundArgs args = bound_args(log_weights);
  at::Tensor out = empty({args.samples}, at::kFloat);
  args.bound = out.mutable_data_ptr<float>();
  over_samples(DGM_PICK_ISA(bound), args);
  return out;
}

at::Tensor bound_backward(const at::Tensor& grad, const at::Tensor& log_weights, const at::Tensor& bound) {
  BoundArgs args = bound_args(log_weights);
  args.grad = checked("grad", grad, {args.samples});
  args.bound = const_cast<float*>(checked("bound", bound, {args.samples}));
  at::Tensor to_log_weights = empty(log_weights.sizes(), at::kFloat);
  args.to_log_weights = to_log_weights.mutable_data_ptr<float>();
  over_samples(DGM_PICK_ISA(bound_backward), args);
  return to_log_weights;
}

// ---- Full covariance

namespace {

TrilArgs tril_args(const at::Tensor& mu, const at::Tensor& scale_tril, DGM_KEY_PARAMETERS) {
  TORCH_CHECK_VALUE(mu.dim() == 2, "mu must have shape [batch, D], got ", mu.sizes());
  TrilArgs args;
  args.shape = shape_of(mu);
  const auto [batch, features, parts] = args.shape;
  args.noise = key_args(DGM_KEY_ARGUMENTS, mu);
  args.mu = samples_in("mu", mu, batch, features);
  args.factor = samples_in("scale_tril", scale_tril, batch, features * features);
  return args;
}

template <class Kernel>
void over_samples(Kernel kernel, const TrilArgs& args) {
  const int64_t features = std::max<int64_t>(args.shape.elements, 1);
  const int64_t grain = std::max<int64_t>(kGrainElements / (features * features), 1);
  at::parallel_for(0, args.shape.batch, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

Pair tril(const at::Tensor& mu, const at::Tensor& scale_tril, DGM_KEY_PARAMETERS, at::ScalarType dtype) {
  TrilArgs args = tril_args(mu, scale_tril, DGM_KEY_ARGUMENTS);
  at::Tensor z = empty(mu.sizes(), dtype), sums = empty({args.shape.batch}, at::kFloat);
  args.z = rows_out("z", z, args.shape.elements);
  args.kl = sums.mutable_data_ptr<float>();
  over_samples(DGM_PICK_ISA(tril), args);
  return {std::move(z), std::move(sums)};
}

Pair tril_backward(const OptionalTensor& grad, const OptionalTensor& grad_kl, const at::Tensor& mu,
                   const at::Tensor& scale_tril, DGM_KEY_PARAMETERS) {
  TrilArgs args = tril_args(mu, scale_tril, DGM_KEY_ARGUMENTS);
  const auto [batch, features, parts] = args.shape;
  args.grad = samples_in("grad", grad, batch, features);
  args.grad_kl = floats_in("grad_kl", grad_kl, batch);
  at::Tensor to_mu = empty(mu.sizes(), mu.scalar_type());
  at::Tensor to_factor = empty(scale_tril.sizes(), scale_tril.scalar_type());
  args.grad_mu = rows_out("mu", to_mu, features);
  args.grad_factor = rows_out("scale_tril", to_factor, features * features);
  over_samples(DGM_PICK_ISA(tril_backward), args);
  return {std::move(to_mu), std::move(to_factor)};
}

// ---- Vector quantisation

namespace {

QuantizeArgs quantize_args(const at::Tensor& x, const at::Tensor& codebook) {
  TORCH_CHECK_VALUE(x.dim() == 2 && codebook.dim() == 2 && x.size(1) == codebook.size(1),
                    "x and codebook must be [N, D] and [K, D], got ", x.sizes(), " and ", codebook.sizes());
  TORCH_CHECK_VALUE(codebook.size(0) > 0 && codebook.size(0) < std::numeric_limits<int32_t>::max(),
                    "codebook must hold 1 to 2^31 - 1 codes, got ", codebook.size(0));
  QuantizeArgs args;
  args.rows = x.size(0);
  args.features = x.size(1);
  args.codes = codebook.size(0);
  args.x = samples_in("x", x, args.rows, args.features);
  args.codebook = operand("codebook", codebook, codebook);
  return args;
}

}  // namespace

Four quantize(const at::Tensor& x, const at::Tensor& codebook, at::ScalarType dtype) {
  QuantizeArgs args = quantize_args(x, codebook);
  at::Tensor quantized = empty(x.sizes(), dtype), indices = empty({args.rows}, at::kLong);
  at::Tensor counts = at::zeros({args.codes}, at::kLong), losses = empty({2}, at::kFloat);
  const int64_t units = ceil_divide(args.rows, kCodeRows);
  const at::Tensor mean = empty({args.features}, at::kFloat), partials = empty({units}, at::kDouble);
  const at::Tensor packed = empty({DGM_PICK_ISA(packed_size)(args.codes, args.features)}, at::kFloat);
  DGM_PICK_ISA(pack_codes)(args, mean.mutable_data_ptr<float>(), packed.mutable_data_ptr<float>());
  args.mean = mean.const_data_ptr<float>();
  args.packed = packed.const_data_ptr<float>();
  args.indices = indices.mutable_data_ptr<int64_t>();
  args.quantized = rows_out("quantized", quantized, args.features);
  args.partials = partials.mutable_data_ptr<double>();
  const auto kernel = DGM_PICK_ISA(quantize);
  const int64_t work = kCodeRows * args.codes * std::max<int64_t>(args.features, 1);
  at::parallel_for(0, units, std::max<int64_t>(32 * kGrainElements / work, 1),
                   [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  int64_t* of_codes = counts.mutable_data_ptr<int64_t>();
  for (int64_t row = 0; row < args.rows; ++row) ++of_codes[args.indices[row]];
  double squares = 0.0;
  for (int64_t unit = 0; unit < units; ++unit) squares += args.partials[unit];
  const float mean_square = static_cast<float>(squares / static_cast<double>(x.numel()));
  losses.mutable_data_ptr<float>()[0] = losses.mutable_data_ptr<float>()[1] = mean_square;
  return {std::move(quantized), std::move(indices), std::move(counts), std::move(losses)};
}

Pair quantize_backward(const OptionalTensor& grad, const at::Tensor& grad_losses, const at::Tensor& x,
                       const at::Tensor& codebook, const at::Tensor& indices) {
  QuantizeArgs args = quantize_args(x, codebook);
  TORCH_CHECK_VALUE(indices.scalar_type() == at::kLong && indices.is_contiguous() && indices.numel() == args.rows,
                    "indices must be int64 [", args.rows, "], got ", indices.sizes());
  args.indices = const_cast<int64_t*>(indices.const_data_ptr<int64_t>());
  for (int64_t row = 0; row < args.rows; ++row)
    TORCH_CHECK_VALUE(args.indices[row] >= 0 && args.indices[row] < args.codes, "indices must be in [0, ", args.codes,
                      "), got ", args.indices[row]);
  const float* of_losses = floats_in("grad_losses", grad_losses, 2);
  const float each = 2.0f / static_cast<float>(std::max<int64_t>(x.numel(), 1));
  args.code_factor = of_losses[0] * each;
  args.x_factor = of_losses[1] * each;
  args.grad = samples_in("grad", grad, args.rows, args.features);
  at::Tensor to_x = empty(x.sizes(), x.scalar_type()), to_codes = empty(codebook.sizes(), codebook.scalar_type());
  args.grad_x = rows_out("x", to_x, args.features);
  args.grad_codebook = output("codebook", to_codes, codebook);
  const auto rows = DGM_PICK_ISA(quantize_backward), codes = DGM_PICK_ISA(codebook_gradient);
  const int64_t features = std::max<int64_t>(args.features, 1);
  at::parallel_for(0, args.rows, std::max<int64_t>(kGrainElements / features, 1),
                   [&](int64_t begin, int64_t end) { rows(args, begin, end); });
  const int64_t grain = std::max<int64_t>(kGrainElements / (std::max<int64_t>(args.rows, 1) * kCodeFeatures), 1);
  at::parallel_for(0, ceil_divide(args.features, kCodeFeatures), grain,
                   [&](int64_t begin, int64_t end) { codes(args, begin, end); });
  return {std::move(to_x), std::move(to_codes)};
}

}  // namespace dgm::latent
