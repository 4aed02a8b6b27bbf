// What common/vec.h is for CPU vectors, for the scalars of a CUDA thread.
#pragma once

#include <cstring>

#include "common/dtype.h"

#define DGM_ISA_NAMESPACE cuda
#define DGM_INLINE static __device__ __forceinline__
#define DGM_UNROLL _Pragma("unroll")

namespace dgm {
namespace DGM_ISA_NAMESPACE {

using F32 = float;
using I32 = int32_t;
using U32 = uint32_t;

template <class To, class From>
DGM_INLINE To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

template <class W>
DGM_INLINE W broadcast(uint32_t value) {
  return value;
}

// One instruction; __umulhi and a product would be two.
DGM_INLINE void multiply(uint32_t factor, uint32_t value, uint32_t& high, uint32_t& low) {
  const uint64_t product = static_cast<uint64_t>(factor) * value;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
}

// sqrtf serves subnormal numbers too, by a call that costs registers; -2 ln(u) is never subnormal.
DGM_INLINE float square_root(float x) {
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
}

DGM_INLINE float to_float(uint32_t x) { return __uint2float_rn(x); }

DGM_INLINE float to_float(int32_t x) { return __int2float_rn(x); }

// u = 2^e (1 + f) with 1 + f in [3/4, 3/2), for a positive normal u.
DGM_INLINE void split_exponent(float u, float& e, float& f) {
  const I32 offset = bit_cast<I32>(u) - 0x3F400000;
  e = to_float(offset >> 23);
  f = bit_cast<F32>(bit_cast<I32>(u) - (offset & static_cast<int32_t>(0xFF800000))) - 1.0f;
}

DGM_INLINE float select_odd(uint32_t number, float odd, float even) { return number & 1u ? odd : even; }

// x, its sign flipped where the top bit of `pattern` is set.
DGM_INLINE float flip_sign(float x, uint32_t pattern) {
  return __uint_as_float(__float_as_uint(x) ^ (pattern & 0x80000000u));
}

// Keep NaN: a comparison with it is false.
DGM_INLINE float at_least(float x, float bound) { return bound > x ? bound : x; }

DGM_INLINE float at_most(float x, float bound) { return bound < x ? bound : x; }

}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm
