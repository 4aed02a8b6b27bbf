// Arguments of the coupling kernels as plain pointers. No torch header in here.
#pragma once

#include "common/dtype.h"

namespace dgm::coupling {

enum class ScaleMap : int32_t { Exp, Tanh, Sigmoid, Softclip };
enum class Activation : int32_t { Relu, Tanh, Elu, Silu };

constexpr int kMaxBins = 64;             // of a spline: its parameters are held on the stack
constexpr int64_t kPartElements = 4096;  // a sample is worked on, and its log-determinant added up, in parts

// Which elements of a sample are transformed: those of [start, stop) whose entry in `fixed` is 0. Element e of sample b
// has the entry b * fixed_stride + e % fixed_period.
struct Region {
  int64_t start = 0, stop = 0;
  const uint8_t* fixed = nullptr;
  int64_t fixed_period = 1, fixed_stride = 0;
};

// Both passes of an affine coupling layer. Rows of shift and log_scale hold the elements [start, stop).
struct AffineArgs {
  int64_t batch = 0, elements = 0, parts = 0;
  Region region;
  ScaleMap map = ScaleMap::Exp;
  bool inverse = false;
  RowsIn x, shift, log_scale;  // the backward pass has the output as x; no log_scale: additive
  RowsOut y;
  double* partials = nullptr;  // [batch, parts] sums of the log-scales
  RowsIn grad;                 // backward
  const float* grad_logdet = nullptr;
  RowsOut grad_x, grad_shift, grad_log_scale;
};

// Both passes of a spline. x and y are contiguous; a row of a parameter belongs to an element.
struct SplineArgs {
  int64_t batch = 0, elements = 0;
  int bins = 0;
  float bound = 1.0f, min_width = 0.0f, min_height = 0.0f, min_derivative = 0.0f;
  bool tails = true, inverse = false;
  Operand x;
  RowsIn widths, heights, derivatives;
  Output y;
  float* log_slopes = nullptr;  // [batch, elements]
  float* logdet = nullptr;      // [batch]
  Operand grad;                 // backward
  const float* grad_logdet = nullptr;
  Output grad_x;
  RowsOut grad_widths, grad_heights, grad_derivatives;
};

struct LogProbArgs {
  int64_t batch = 0, elements = 0, parts = 0;
  bool logistic = false;
  RowsIn z;
  double* partials = nullptr;  // [batch, parts]
};

// Units that are computed together from the first `inputs` rows behind row `from`. At `weights` are their biases, then
// the weights of one input after the other.
struct MadeGroup {
  int32_t units, from, inputs, to;
  bool hidden;  // an activation follows
  int64_t weights;
};

// What becomes known with a feature: groups [begin, hidden) are its parameters, [hidden, end) units of its degree.
struct MadeStep {
  int64_t feature, begin, hidden, end;
};

struct MadeArgs {
  int64_t batch = 0, features = 0;
  Activation activation = Activation::Relu;
  ScaleMap map = ScaleMap::Exp;
  SplineArgs spline;  // its settings; no bins: the transform is affine
  const MadeGroup* groups = nullptr;
  const MadeStep* steps = nullptr;
  const float* packed = nullptr;
  int32_t rows = 0, parameter_row = 0, parameters = 0;  // rows in all, where the parameters are, and how many
  Operand z;
  Output x;
  float* logdet = nullptr;
};

}  // namespace dgm::coupling
