// Arguments of the density kernels as plain pointers. No torch header in here.
#pragma once

#include "common/dtype.h"

namespace dgm::density {

// How the scores of components at points are found; all are in units of log 2.
enum class Form : int32_t {
  Products,     // a number a component: |x - y|^2 as |x|^2 + |y|^2 - 2 x.y
  Differences,  // the same where that would lose too many digits
  Diagonals,    // a diagonal a component
  Triangles,    // a lower triangular matrix a component
  Dots,         // no scores but x.y
};

// Score of component m at point n: offset_m - q_n |A_m (x_n - y_m)|^2 / 2. All tensors are contiguous float32.
struct Mixture {
  Form form = Form::Products;
  int64_t points = 0, components = 0, features = 0;
  const float* x = nullptr;       // [points, features]
  const float* y = nullptr;       // [components, features]
  const float* middle = nullptr;  // [features and zeros up to a whole vector]: taken off both
  const float* inv = nullptr;     // A: [1] or [components], [components, features] or [components, features, features]
  int64_t inv_stride = 0;         // 0: one number for all
  const float* q = nullptr;       // [points]; null: 1
  const float* offset = nullptr;
  int64_t offset_stride = 0;  // 0: one for all
  const float* offset_of(int64_t m) const { return offset + m * offset_stride; }
};

// Points are worked on in groups of panels, components in parts; a unit is a group and a part.
struct Plan {
  int64_t panels = 1;           // of a group
  int64_t groups = 0;           //
  int64_t parts = 1;            //
  int64_t part_components = 0;  // of a part: a multiple of a block
  int64_t padded = 0;           // points, up to whole groups
};

struct LogProbArgs {
  Mixture mixture;
  Plan plan;
  float *most = nullptr, *sums = nullptr;  // [parts, padded]: greatest score, and the sum of powers relative to it
  float* missing = nullptr;                // [padded]: what all scores of a point lack
  float* lse = nullptr;                    // [points]
  float* responsibilities = nullptr;       // [points, components], where they are wanted
};

// What is summed over components, for every point.
enum class Gather : int32_t { Mean, Gradient, MeanGradient, RbfGradient, PolynomialGradient, RbfSum, PolynomialSum };

constexpr int kMostNumbers = 32;  // of a kernel

struct GatherArgs {
  Gather gather = Gather::Mean;
  Mixture mixture;
  Plan plan;
  int64_t width = 0;            // numbers that are summed for a point
  const float* rows = nullptr;  // [components, width]: what the weights weigh
  // [parts, padded]: greatest scores, of a mean, or sums of responsibilities, of a gradient; and the sums of the
  // weights.
  float *most = nullptr, *sums = nullptr;
  float* missing = nullptr;                                        // [padded]
  float* partials = nullptr;                                       // [parts, padded / panel, width, panel]
  const float *lse = nullptr, *weight = nullptr, *grad = nullptr;  // [points], [points], [points, features]
  bool same = false;                                               // x and y are the same points: n = m is left out
  int32_t numbers = 0;
  float number[kMostNumbers] = {};
  double* totals = nullptr;  // [groups * parts]: sums of a kernel, where no gradient is wanted
  float* out_lse = nullptr;  // [points], of a mean
  float* out = nullptr;      // [points, features]
};

// Units are blocks of components and parts of the points.
struct MomentArgs {
  Mixture mixture;
  int64_t parts = 1, part_points = 0, blocks = 0;
  int64_t row = 0, second = 0;                       // floats of a row of first moments, and of a component's second
  const float *lse = nullptr, *weight = nullptr;     // [points]
  float *count = nullptr, *first = nullptr;          // [parts, components], [parts, components, row]
  float* moments = nullptr;                          // [parts, components, second]
  float *out_count = nullptr, *out_first = nullptr;  // the parts added up
  float* out_second = nullptr;
};

}  // namespace dgm::density
