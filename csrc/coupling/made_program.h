// Writes the program by which made_inverse runs: units sorted by degree, and the weights that count, packed.
#pragma once

#include <vector>

#include "common/tensors.h"
#include "coupling/args.h"

namespace dgm::coupling {

struct MadeProgram {
  std::vector<MadeGroup> groups;
  std::vector<MadeStep> steps;
  at::Tensor packed;
  int32_t rows = 0, parameter_row = 0;
};

// `parameters` is how many outputs a feature has; they are rows p * features + feature of the last weight with
// `strided`, else rows feature * parameters + p.
MadeProgram made_program(at::TensorList weights, at::TensorList biases, at::TensorList degrees, int64_t parameters,
                         bool strided);

}  // namespace dgm::coupling
