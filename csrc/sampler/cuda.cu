// CUDA kernels of the sampler op. A block works on a part of one long sample or on several short ones: threadIdx.x
// counts units of a sample, threadIdx.y samples.
#include "sampler/cuda.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/memory.cuh"
#include "sampler/math.h"

namespace dgm::sampler::cuda {

namespace {

constexpr int kThreads = 256;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// ---- Work of a thread

// Units of a thread: 8 elements.
template <class Access>
constexpr int kUnits = 8 / Access::kUnit;

struct Place {
  int64_t sample;
  int64_t first;  // element of the sample at which the thread's first unit begins
  int stride;     // elements from one unit of the thread to its next
};

// `blocks` of them share a sample.
template <class Access>
DGM_INLINE Place place_of(uint32_t blocks) {
  const uint32_t group = blockIdx.x / blocks, part = blockIdx.x - group * blocks;
  const int stride = static_cast<int>(blockDim.x) * Access::kUnit;
  return {static_cast<int64_t>(group) * blockDim.y + threadIdx.y,
          static_cast<int64_t>(part) * stride * kUnits<Access> + threadIdx.x * Access::kUnit, stride};
}

DGM_INLINE int count_at(const Shape& shape, int64_t element) {
  return static_cast<int>(min(shape.elements - element, static_cast<int64_t>(8)));
}

// ---- Rows of tables

DGM_INLINE int64_t index_of(const Rows& rows, int64_t sample) {
  return rows.index_tensor ? rows.index_tensor[sample * rows.index_stride] : rows.index;
}

// The row at `index`, all NaN if there is none: a device-side index cannot be refused.
template <class Row>
DGM_INLINE Row row_at(const Rows& rows, int64_t index) {
  constexpr int kColumns = sizeof(Row) / sizeof(float);
  const bool exists = index >= 0 && index < rows.count;
  const float* from = rows.data + (exists ? index : 0) * kColumns;
  Row row;
  float* to = reinterpret_cast<float*>(&row);
  DGM_UNROLL
  for (int i = 0; i < kColumns; ++i) to[i] = exists ? from[i] : kNaN;
  return row;
}

// ---- Noise

// What philox_sample works out is worked out anew for every unit: kept, it would take 25 registers.
template <int kCount>
DGM_INLINE void draw_normals(const NoiseArgs& noise, int64_t row, int64_t step, int64_t element, float (&v)[kCount]) {
  const PhiloxSample sample = philox_sample(noise, row, step);
  DGM_UNROLL
  for (int i = 0; i < kCount; i += 4) {
    uint32_t w[4];
    philox(static_cast<uint32_t>((element + i) / 4), sample, w);
    box_muller(w[0], w[1], v[i], v[i + 1]);
    box_muller(w[2], w[3], v[i + 2], v[i + 3]);
  }
}

template <class Access>
__global__ void __launch_bounds__(kThreads) noise_kernel(const __grid_constant__ NoiseLikeArgs a, uint32_t blocks) {
  const Place place = place_of<Access>(blocks);
  if (place.sample >= a.shape.batch) return;
  for (int u = 0; u < kUnits<Access>; ++u) {
    const int64_t element = place.first + u * place.stride;
    const int count = count_at(a.shape, element);
    if (count <= 0) return;
    float v[Access::kUnit];
    if (a.kind == NoiseKind::Normal) {
      draw_normals(a.noise, place.sample, 0, element, v);
    } else {
      const PhiloxSample sample = philox_sample(a.noise, place.sample, 0);
      DGM_UNROLL
      for (int i = 0; i < Access::kUnit; i += 4) {
        uint32_t w[4];
        philox(static_cast<uint32_t>((element + i) / 4), sample, w);
        DGM_UNROLL
        for (int j = 0; j < 4; ++j) v[i + j] = a.kind == NoiseKind::Bits ? __uint_as_float(w[j]) : uniform(w[j]);
      }
    }
    Access::store(a.out, place.sample * a.shape.elements + element, count, v);
  }
}

// ---- The step

// What a thread has loaded of one unit.
template <class Access, bool kPlain>
struct StepUnit {
  typename Access::Raw x, model_output, given;
};

template <class Access>
struct StepUnit<Access, false> {
  typename Access::Raw x, model_output, given, unconditional, history, known, mask;
};

// Loads whose operands are absent stay undefined and unused.
template <class Access, bool kPlain>
DGM_INLINE void load_step(const StepArgs& a, int64_t index, int count, StepUnit<Access, kPlain>& in) {
  in.x = Access::load(a.x, index, count);
  in.model_output = Access::load(a.model_output, index, count);
  if (a.noise.given.data) in.given = Access::load(a.noise.given, index, count);
  if constexpr (!kPlain) {
    if (a.unconditional.data) in.unconditional = Access::load(a.unconditional, index, count);
    if (a.history.data) in.history = Access::load(a.history, index, count);
    if (a.known.data) in.known = Access::load(a.known, index, count);
    if (a.mask.data) in.mask = Access::load_mask(a.mask, index, count);
  }
}

// History and noise do not count where their coefficient is 0, even if they are NaN. They are loaded all the same:
// loads that wait for coefficients would delay every other step.
template <class Access, bool kPlain>
DGM_INLINE void step_unit(const StepArgs& a, const StepRow& r, const StepUnit<Access, kPlain>& in, float bound,
                          const float (&noise)[Access::kUnit], int64_t index, int count) {
  constexpr int kUnit = Access::kUnit;
  float x[kUnit], m[kUnit], x0[kUnit], next[kUnit], v[kUnit], mask[kUnit];
  Access::expand(in.x, a.x, x);
  Access::expand(in.model_output, a.model_output, m);
  if constexpr (!kPlain) {
    if (a.unconditional.data) {
      Access::expand(in.unconditional, a.unconditional, v);
      for (int i = 0; i < kUnit; ++i) m[i] = guided(m[i], v[i], a.guidance_scale);
    }
  }
  for (int i = 0; i < kUnit; ++i) {
    x0[i] = !kPlain && a.threshold ? clean_sample(r, x[i], m[i], bound) : clean_sample(r, x[i], m[i]);
    next[i] = affine(r, x[i], x0[i], m[i]);
  }
  if constexpr (!kPlain) {
    if (a.history.data && r.ah != 0.0f) {
      Access::expand(in.history, a.history, v);
      for (int i = 0; i < kUnit; ++i) next[i] += r.ah * v[i];
    }
  }
  if (r.an != 0.0f)
    for (int i = 0; i < kUnit; ++i) next[i] += r.an * noise[i];
  if constexpr (!kPlain) {
    if (a.known.data) {
      Access::expand(in.known, a.known, v);
      Access::expand_mask(in.mask, a.mask, mask);
      for (int i = 0; i < kUnit; ++i) next[i] = inpainted(r, next[i], v[i], mask[i], r.sk != 0.0f ? noise[i] : 0.0f);
    }
    if (a.x0.data) Access::store(a.x0, index, count, x0);
  }
  Access::store(a.out, index, count, next);
}

// Blocks of a multiprocessor: the most that leave every form of the kernel enough registers not to spill.
template <class Access, bool kPlain>
constexpr int kResident = kPlain && !std::is_same_v<Access, Any> ? 5 : 3;

// kPlain: only x, model output and noise, the common case.
template <class Access, bool kPlain>
__global__ void __launch_bounds__(kThreads, kResident<Access, kPlain>)
    step_kernel(const __grid_constant__ StepArgs a, uint32_t blocks) {
  constexpr int kN = kPlain ? kUnits<Access> : 1;  // units whose loads are under way together
  const Place place = place_of<Access>(blocks);
  if (place.sample >= a.shape.batch) return;
  const int64_t offset = place.sample * a.shape.elements, step = index_of(a.rows, place.sample);
  const StepRow r = row_at<StepRow>(a.rows, step);
  const float bound = a.threshold ? a.threshold[place.sample] : 0.0f;
  for (int begin = 0; begin < kUnits<Access>; begin += kN) {
    StepUnit<Access, kPlain> in[kN];
    DGM_UNROLL
    for (int u = 0; u < kN; ++u) {
      const int64_t element = place.first + (begin + u) * place.stride;
      const int count = count_at(a.shape, element);
      if (count > 0) load_step(a, offset + element, count, in[u]);
    }
    // After the loads, which would wait for the coefficients if this came first.
    const bool drawn = a.noise.drawn && (r.an != 0.0f || (a.known.data && r.sk != 0.0f));
    DGM_UNROLL
    for (int u = 0; u < kN; ++u) {
      const int64_t element = place.first + (begin + u) * place.stride;
      const int count = count_at(a.shape, element);
      if (count <= 0) return;
      float noise[Access::kUnit] = {};
      if (drawn)
        draw_normals(a.noise, place.sample, step, element, noise);
      else if (a.noise.given.data)
        Access::expand(in[u].given, a.noise.given, noise);
      step_unit<Access, kPlain>(a, r, in[u], bound, noise, offset + element, count);
    }
  }
}

// ---- The forward process and its loss

template <class Access>
__global__ void __launch_bounds__(kThreads) add_noise_kernel(const __grid_constant__ AddNoiseArgs a, uint32_t blocks) {
  constexpr int kUnit = Access::kUnit, kN = kUnits<Access>;
  const Place place = place_of<Access>(blocks);
  if (place.sample >= a.shape.batch) return;
  const int64_t offset = place.sample * a.shape.elements;
  const TrainingRow r = row_at<TrainingRow>(a.rows, index_of(a.rows, place.sample));
  typename Access::Raw x0_in[kN], given[kN];
  DGM_UNROLL
  for (int u = 0; u < kN; ++u) {
    const int64_t element = place.first + u * place.stride;
    const int count = count_at(a.shape, element);
    if (count <= 0) continue;
    x0_in[u] = Access::load(a.x0, offset + element, count);
    if (a.noise.given.data) given[u] = Access::load(a.noise.given, offset + element, count);
  }
  DGM_UNROLL
  for (int u = 0; u < kN; ++u) {
    const int64_t element = place.first + u * place.stride;
    const int count = count_at(a.shape, element);
    if (count <= 0) return;
    float x0[kUnit], noise[kUnit];
    Access::expand(x0_in[u], a.x0, x0);
    if (a.noise.drawn)
      draw_normals(a.noise, place.sample, 0, element, noise);
    else
      Access::expand(given[u], a.noise.given, noise);
    for (int i = 0; i < kUnit; ++i) x0[i] = noised(r, x0[i], noise[i]);
    Access::store(a.out, offset + element, count, x0);
  }
}

// Sums over threadIdx.x in a fixed order; thread 0 of every row has the result. All threads of the block take part.
DGM_INLINE double sum_of_row(double value) {
  __shared__ double sums[kThreads];
  double* own = sums + threadIdx.y * blockDim.x + threadIdx.x;
  *own = value;
  for (unsigned distance = blockDim.x / 2; distance > 0; distance /= 2) {
    __syncthreads();
    if (threadIdx.x < distance) *own += own[distance];
  }
  return *own;
}

// Sum of squares of one part of a sample; `parts` blocks share a sample.
template <class Access>
__global__ void __launch_bounds__(kThreads) loss_kernel(const __grid_constant__ LossArgs a, uint32_t parts) {
  constexpr int kUnit = Access::kUnit;
  const uint32_t group = blockIdx.x / parts, part = blockIdx.x - group * parts;
  const int64_t row = static_cast<int64_t>(group) * blockDim.y + threadIdx.y;
  double squares = 0.0;
  if (row < a.shape.batch) {
    const int64_t offset = row * a.shape.elements, first = part * kLossPart;
    const int64_t stop = min(first + kLossPart, a.shape.elements);
    const TrainingRow r = row_at<TrainingRow>(a.rows, index_of(a.rows, row));
    for (int64_t e = first + threadIdx.x * kUnit; e < stop; e += blockDim.x * kUnit) {
      const int count = count_at(a.shape, e);
      const auto m_in = Access::load(a.model_output, offset + e, count);
      const auto x0_in = Access::load(a.x0, offset + e, count);
      float m[kUnit], x0[kUnit], noise[kUnit];
      if (a.noise.drawn)
        draw_normals(a.noise, row, 0, e, noise);
      else
        Access::expand(Access::load(a.noise.given, offset + e, count), a.noise.given, noise);
      Access::expand(m_in, a.model_output, m);
      Access::expand(x0_in, a.x0, x0);
      for (int i = 0; i < kUnit; ++i) m[i] = residual(r, m[i], x0[i], noise[i]);
      if (a.residual.data) Access::store(a.residual, offset + e, count, m);
      float sum = 0.0f;
      for (int i = 0; i < kUnit; ++i) sum += i < count ? m[i] * m[i] : 0.0f;
      squares += sum;
    }
  }
  squares = sum_of_row(squares);
  if (row < a.shape.batch && threadIdx.x == 0) a.partials[row * a.parts + part] = squares;
}

// weight times the mean of the squares: threadIdx.x counts parts. No elements: 0 / 0, the mean of nothing.
__global__ void __launch_bounds__(kThreads) finish_loss_kernel(const __grid_constant__ LossArgs a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  double squares = 0.0;
  if (row < a.shape.batch)
    for (int64_t part = threadIdx.x; part < a.parts; part += blockDim.x) squares += a.partials[row * a.parts + part];
  squares = sum_of_row(squares);
  if (row >= a.shape.batch || threadIdx.x != 0) return;
  const TrainingRow r = row_at<TrainingRow>(a.rows, index_of(a.rows, row));
  a.loss[row] = static_cast<float>(r.weight * squares / static_cast<double>(a.shape.elements));
}

// ---- Launches

struct Grid {
  dim3 threads;
  uint32_t blocks;  // that share a sample
  unsigned total;
};

// A power of two of threads, enough for `work` of them or as many as a block has.
unsigned threads_for(int64_t work) {
  unsigned threads = 1;
  while (threads < work && threads < kThreads) threads *= 2;
  return threads;
}

// `x` threads of a block work on one sample.
Grid grid_of(int64_t batch, unsigned x, int64_t blocks) {
  const unsigned y = kThreads / x;
  const int64_t total = (batch + y - 1) / y * blocks;
  if (total > std::numeric_limits<int32_t>::max())
    throw std::runtime_error("the tensor is too large for one launch: " + std::to_string(total) + " blocks");
  return {dim3(x, y), static_cast<uint32_t>(blocks), static_cast<unsigned>(total)};
}

template <class Access>
Grid elementwise_grid(const Shape& shape) {
  const unsigned x = threads_for((shape.elements + 7) / 8);  // 8 elements each
  const int64_t per_block = 8 * static_cast<int64_t>(x);
  return grid_of(shape.batch, x, (shape.elements + per_block - 1) / per_block);
}

// One dtype, 16-byte addresses, rows of whole units of 16 bytes.
bool aligned(const Shape& shape, DType dtype, std::initializer_list<Operand> operands) {
  if (shape.elements * element_size(dtype) % 16 != 0) return false;
  return std::all_of(operands.begin(), operands.end(), [&](const Operand& operand) {
    return !operand.data || (operand.dtype == dtype && reinterpret_cast<uintptr_t>(operand.data) % 16 == 0);
  });
}

Operand written(const Output& output) { return {output.data, output.dtype}; }

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Calls launch(Access()) with the fastest access that the tensors allow.
template <class Launch>
void with_access(bool is_aligned, DType dtype, const Launch& launch) {
  if (!is_aligned)
    launch(Any());
  else if (dtype == DType::BFloat16)
    launch(Aligned<DType::BFloat16>());
  else if (dtype == DType::Float16)
    launch(Aligned<DType::Float16>());
  else
    launch(Aligned<DType::Float32>());
  check_launch();
}

}  // namespace

void noise_like(const NoiseLikeArgs& a, cudaStream_t stream) {
  with_access(aligned(a.shape, a.out.dtype, {written(a.out)}), a.out.dtype, [&](auto access) {
    const Grid grid = elementwise_grid<decltype(access)>(a.shape);
    noise_kernel<decltype(access)><<<grid.total, grid.threads, 0, stream>>>(a, grid.blocks);
  });
}

void step(const StepArgs& a, cudaStream_t stream) {
  const Operand mask = a.mask.dtype == DType::Bool && reinterpret_cast<uintptr_t>(a.mask.data) % 8 == 0
                           ? Operand{}  // Aligned reads it as it is
                           : a.mask;
  const bool is_aligned = aligned(
      a.shape, a.x.dtype,
      {a.x, a.model_output, a.noise.given, a.unconditional, a.history, a.known, mask, written(a.out), written(a.x0)});
  const bool plain = !a.unconditional.data && !a.history.data && !a.known.data && !a.threshold && !a.x0.data;
  with_access(is_aligned, a.x.dtype, [&](auto access) {
    const Grid grid = elementwise_grid<decltype(access)>(a.shape);
    if (plain)
      step_kernel<decltype(access), true><<<grid.total, grid.threads, 0, stream>>>(a, grid.blocks);
    else
      step_kernel<decltype(access), false><<<grid.total, grid.threads, 0, stream>>>(a, grid.blocks);
  });
}

void add_noise(const AddNoiseArgs& a, cudaStream_t stream) {
  with_access(aligned(a.shape, a.x0.dtype, {a.x0, a.noise.given, written(a.out)}), a.x0.dtype, [&](auto access) {
    const Grid grid = elementwise_grid<decltype(access)>(a.shape);
    add_noise_kernel<decltype(access)><<<grid.total, grid.threads, 0, stream>>>(a, grid.blocks);
  });
}

void denoising_loss(const LossArgs& a, cudaStream_t stream) {
  const bool is_aligned = aligned(a.shape, a.x0.dtype, {a.model_output, a.x0, a.noise.given, written(a.residual)});
  if (a.parts > 0) {
    with_access(is_aligned, a.x0.dtype, [&](auto access) {
      using Access = decltype(access);
      const int64_t units = (std::min(a.shape.elements, kLossPart) + Access::kUnit - 1) / Access::kUnit;
      const Grid grid = grid_of(a.shape.batch, threads_for(units), a.parts);
      loss_kernel<Access><<<grid.total, grid.threads, 0, stream>>>(a, grid.blocks);
    });
  }
  const Grid grid = grid_of(a.shape.batch, threads_for(std::min<int64_t>(a.parts, 32)), 1);
  finish_loss_kernel<<<grid.total, grid.threads, 0, stream>>>(a);
  check_launch();
}

}  // namespace dgm::sampler::cuda
