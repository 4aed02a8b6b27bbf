// Plain-pointer arguments of the sampler kernels, the same for CPU and CUDA. No torch header in here.
#pragma once

#include "common/dtype.h"

namespace dgm::sampler {

constexpr int kStepColumns = 12, kTrainingColumns = 8;

enum class NoiseKind : int32_t { Normal, Uniform, Bits };

// Every tensor is [batch, elements] in effect.
struct Shape {
  int64_t batch = 0, elements = 0;
};

// A row of the table for every sample: `index` is one for all (stride 0) or one a sample (stride 1).
struct Rows {
  const float* data = nullptr;
  int64_t count = 0;
  const int64_t* index_tensor = nullptr;  // in place of `index`
  int64_t index_stride = 0;
  int64_t index = 0;
};

struct NoiseLikeArgs {
  Shape shape;
  NoiseArgs noise;
  NoiseKind kind = NoiseKind::Normal;
  Output out;  // int32 words pass as Float32
};

struct StepArgs {
  Shape shape;
  Rows rows;
  NoiseArgs noise;
  Operand x, model_output, unconditional, history, known, mask;
  float guidance_scale = 1.0f;
  const float* threshold = nullptr;  // [batch]: bound on |x0|, by which it is then divided
  Output out, x0;
};

struct AddNoiseArgs {
  Shape shape;
  Rows rows;
  NoiseArgs noise;
  Operand x0;
  Output out;
};

struct LossArgs {
  Shape shape;
  Rows rows;
  NoiseArgs noise;
  Operand model_output, x0;
  Output residual;
  double* partials = nullptr;  // [batch, parts]: sums of squares of kLossPart elements each
  int64_t parts = 0;
  float* loss = nullptr;  // [batch]: weight times the mean square
};

// A fixed size, so that the order of summation does not depend on the number of threads.
// A multiple of every kBlock of common/vec.h (16, 32 and 256 elements).
constexpr int64_t kLossPart = 6144;

}  // namespace dgm::sampler
