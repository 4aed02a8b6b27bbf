// How a CUDA thread reads and writes elements: 16 bytes at a time where dtypes and alignment allow, else as they come.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/scalar.cuh"

namespace dgm {
namespace DGM_ISA_NAMESPACE {

constexpr __host__ __device__ int element_size(DType dtype) {
  return dtype == DType::Float32 ? 4 : dtype == DType::Bool ? 1 : 2;
}

DGM_INLINE float expand(uint32_t bits, DType dtype) {
  switch (dtype) {
    case DType::BFloat16:
      return __uint_as_float(bits << 16);
    case DType::Float16:
      return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
    case DType::Bool:
      return bits ? 1.0f : 0.0f;
    default:
      return __uint_as_float(bits);
  }
}

// Two elements of 16 bits, rounded to nearest even; the first in the lower half.
DGM_INLINE uint32_t narrow(float first, float second, DType dtype) {
  if (dtype == DType::BFloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <class V, class Pointer>
DGM_INLINE V load_as(Pointer from) {
  return *reinterpret_cast<const V*>(from);
}

// Access to tensors that all have one dtype and whose rows consist of whole units of 16 bytes at 16-byte addresses; a
// mask may be Bool. Loading and expanding are apart, so that all loads of a thread can be under way together.
template <DType kDType>
struct Aligned {
  static constexpr int kSize = element_size(kDType), kUnit = 16 / kSize;
  struct Raw {
    uint32_t words[4];
  };

  DGM_INLINE Raw load(const Operand& operand, int64_t index, int) {
    const uint4 w = load_as<uint4>(static_cast<const char*>(operand.data) + index * kSize);
    return {{w.x, w.y, w.z, w.w}};
  }

  DGM_INLINE Raw load_mask(const Operand& operand, int64_t index, int count) {
    if (operand.dtype != DType::Bool) return load(operand, index, count);
    const char* from = static_cast<const char*>(operand.data) + index;
    if (kUnit == 4) return {{load_as<uint32_t>(from), 0, 0, 0}};
    const uint2 w = load_as<uint2>(from);
    return {{w.x, w.y, 0, 0}};
  }

  DGM_INLINE void expand(const Raw& raw, const Operand&, float (&v)[kUnit]) {
    constexpr int kPerWord = kUnit / 4;
    DGM_UNROLL
    for (int i = 0; i < kUnit; ++i)
      v[i] = cuda::expand(kPerWord == 1 ? raw.words[i] : raw.words[i / 2] >> 16 * (i % 2) & 0xFFFFu, kDType);
  }

  DGM_INLINE void expand_mask(const Raw& raw, const Operand& operand, float (&v)[kUnit]) {
    if (operand.dtype != DType::Bool) return expand(raw, operand, v);
    DGM_UNROLL
    for (int i = 0; i < kUnit; ++i) v[i] = cuda::expand(raw.words[i / 4] >> 8 * (i % 4) & 0xFFu, DType::Bool);
  }

  DGM_INLINE void store(const Output& output, int64_t index, int, const float (&v)[kUnit]) {
    uint32_t w[4];
    DGM_UNROLL
    for (int i = 0; i < 4; ++i)
      w[i] = kUnit == 4 ? __float_as_uint(v[i]) : narrow(v[2 * i % kUnit], v[(2 * i + 1) % kUnit], kDType);
    *reinterpret_cast<uint4*>(static_cast<char*>(output.data) + index * kSize) = make_uint4(w[0], w[1], w[2], w[3]);
  }
};

// Access to tensors of any dtypes, lengths and alignments, four elements a unit, of which `count` exist.
struct Any {
  static constexpr int kUnit = 4;
  struct Raw {
    uint32_t bits[4];  // an element each
  };

  DGM_INLINE bool together(const void* at, int size, int count) {
    return count >= kUnit && reinterpret_cast<uintptr_t>(at) % (4 * size) == 0;
  }

  DGM_INLINE Raw load(const Operand& operand, int64_t index, int count) {
    const int size = element_size(operand.dtype);
    const char* from = static_cast<const char*>(operand.data) + index * size;
    if (!together(from, size, count)) return load_singly(from, size, count);
    if (size == 4) {
      const uint4 w = load_as<uint4>(from);
      return {{w.x, w.y, w.z, w.w}};
    }
    if (size == 2) {
      const uint2 w = load_as<uint2>(from);
      return {{w.x & 0xFFFFu, w.x >> 16, w.y & 0xFFFFu, w.y >> 16}};
    }
    const uint32_t w = load_as<uint32_t>(from);
    return {{w & 0xFFu, w >> 8 & 0xFFu, w >> 16 & 0xFFu, w >> 24}};
  }

  DGM_INLINE Raw load_mask(const Operand& operand, int64_t index, int count) { return load(operand, index, count); }

  DGM_INLINE void expand(const Raw& raw, const Operand& operand, float (&v)[kUnit]) {
    DGM_UNROLL
    for (int i = 0; i < kUnit; ++i) v[i] = cuda::expand(raw.bits[i], operand.dtype);
  }

  DGM_INLINE void expand_mask(const Raw& raw, const Operand& operand, float (&v)[kUnit]) { expand(raw, operand, v); }

  DGM_INLINE void store(const Output& output, int64_t index, int count, const float (&v)[kUnit]) {
    const int size = element_size(output.dtype);
    char* to = static_cast<char*>(output.data) + index * size;
    uint32_t w[4];
    DGM_UNROLL
    for (int i = 0; i < 4; ++i) w[i] = size == 4 ? __float_as_uint(v[i]) : narrow(v[i], 0.0f, output.dtype);
    if (!together(to, size, count)) {
      DGM_UNROLL
      for (int i = 0; i < kUnit; ++i) {
        if (i < count && size == 4) reinterpret_cast<uint32_t*>(to)[i] = w[i];
        if (i < count && size == 2) reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(w[i]);
      }
    } else if (size == 4) {
      *reinterpret_cast<uint4*>(to) = make_uint4(w[0], w[1], w[2], w[3]);
    } else {
      *reinterpret_cast<uint2*>(to) = make_uint2(w[0] | w[1] << 16, w[2] | w[3] << 16);
    }
  }

 private:
  DGM_INLINE Raw load_singly(const char* from, int size, int count) {
    Raw raw = {};
    DGM_UNROLL
    for (int i = 0; i < kUnit; ++i) {
      if (i >= count) continue;
      raw.bits[i] = size == 4   ? load_as<uint32_t>(from + 4 * i)
                    : size == 2 ? load_as<uint16_t>(from + 2 * i)
                                : load_as<uint8_t>(from + i);
    }
    return raw;
  }
};

}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm
