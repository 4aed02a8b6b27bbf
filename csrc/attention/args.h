// Plain-pointer arguments of the attention kernels. No torch header in here.
#pragma once

#include "common/dtype.h"

namespace dgm::attention {

// [batch, heads, rows, features] with contiguous features; strides in elements.
struct Rows {
  const void* data = nullptr;
  DType dtype = DType::Float32;
  int64_t batch = 0, head = 0, row = 0;
};

struct OutputRows {
  void* data = nullptr;
  DType dtype = DType::Float32;
  int64_t batch = 0, head = 0, row = 0;
};

// [batch, heads, queries, keys], or absent; strides in elements.
struct Scores {
  const void* data = nullptr;
  DType dtype = DType::Float32;
  int64_t batch = 0, head = 0, query = 0, key = 0;
};

// Query i, at position first + i, sees the keys in [bounds[2 i], bounds[2 i + 1]) whose column in a picture of this
// width is at most `radius` away, and that `keep` has.
struct MaskArgs {
  const int32_t* bounds = nullptr;  // null: all keys
  int32_t width = 0, radius = 0;    // width 0: any column
  Scores keep, bias;
  const float* slopes = nullptr;  // of ALiBi, one a head
  int64_t first = 0;
};

// Cosine and sine of each position and pair of features.
struct RopeArgs {
  const float* table = nullptr;
  int64_t pairs = 0;
  bool interleaved = false;
  bool rounds = false;  // what is turned to bfloat16, as kernels of pairs have it
};

constexpr int64_t kMaxFeatures = 1024;  // of a head: kernels have buffers for a row
constexpr int64_t kPanelsTogether = 4;  // the most panels of a unit of work

struct ForwardArgs {
  int64_t batch = 0, heads = 0, key_heads = 0, queries = 0, keys = 0, features = 0, value_features = 0;
  Rows q, k, v;
  MaskArgs mask;
  RopeArgs rope;
  float scale = 1.0f;
  int64_t panels = 0;  // of queries, in a unit of work
  int64_t units = 0;   // of a head
  OutputRows out;
  float* lse = nullptr;  // [batch, heads, queries]
};

// Keys are cut into `parts`, which are units of work together with samples and key heads: each has gradients of its own
// for q, which are added up in the end.
struct BackwardArgs : ForwardArgs {
  Rows grad, result;
  const float* grad_lse = nullptr;  // [batch, heads, queries]
  int64_t parts = 1;
  float* grad_panels = nullptr;  // [parts, batch, heads, panels, features, panel]
  OutputRows grad_q, grad_k, grad_v;
};

struct JvpArgs : ForwardArgs {  // lse is read; out and lse_tangent are written
  Rows tangent_q, tangent_k, tangent_v, result;
  float* lse_tangent = nullptr;
};

// One query of each head; keys [begin, end) in parts of kDecodePart.
constexpr int64_t kDecodePart = 1024;

struct DecodeArgs {
  int64_t batch = 0, heads = 0, key_heads = 0, begin = 0, end = 0, features = 0, value_features = 0;
  Rows q, k, v;
  int32_t width = 0, radius = 0;
  const float* slopes = nullptr;
  int64_t position = 0;
  float scale = 1.0f;
  int64_t parts = 0;
  float* partial = nullptr;  // [batch, heads, parts, value_features + 2]: sums, greatest score, denominator
  OutputRows out;
};

}  // namespace dgm::attention
