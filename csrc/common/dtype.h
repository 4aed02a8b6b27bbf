// Element types of the tensors that kernels read and write. No torch header in here.
#pragma once

#include <cstdint>

namespace dgm {

enum class DType : int32_t { Float32, BFloat16, Float16, Bool };

// A row-major contiguous tensor; `data` is null where an optional one is absent.
struct Operand {
  const void* data = nullptr;
  DType dtype = DType::Float32;
};

struct Output {
  void* data = nullptr;
  DType dtype = DType::Float32;
};

// Rows of contiguous elements at a distance of `stride` elements; `data` is null where an optional one is absent.
struct RowsIn {
  const void* data = nullptr;
  DType dtype = DType::Float32;
  int64_t stride = 0;
};

struct RowsOut {
  void* data = nullptr;
  DType dtype = DType::Float32;
  int64_t stride = 0;
};

// Where noise comes from: a tensor, or a key (the noise contract of docs/design.md), or nowhere.
struct NoiseArgs {
  Operand given;
  bool drawn = false;
  const int64_t* seed_tensor = nullptr;  // in place of `seed`
  int64_t seed = 0;
  const int64_t* step_tensor = nullptr;  // added to `step`
  int64_t step_stride = 0;               // 1: an entry a sample; 0: one for all
  int64_t step = 0;
  const int64_t* samples = nullptr;  // in place of first_sample + row
  int64_t first_sample = 0;
  uint32_t stream = 0;
};

}  // namespace dgm
