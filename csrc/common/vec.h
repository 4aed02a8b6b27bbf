// CPU vectors over the compiler's vector extension: one source for every instruction set that cpu.cpp is built for.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/dtype.h"

#define DGM_INLINE static inline __attribute__((always_inline))
#define DGM_INLINE_METHOD inline __attribute__((always_inline))
#define DGM_UNROLL _Pragma("GCC unroll 16")

namespace dgm {
namespace DGM_ISA_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kBlock = 4 * kWidth;  // elements that kWidth Philox counters make

typedef float F32 __attribute__((vector_size(4 * kWidth)));
typedef int32_t I32 __attribute__((vector_size(4 * kWidth)));
typedef uint32_t U32 __attribute__((vector_size(4 * kWidth)));
typedef uint64_t U64 __attribute__((vector_size(4 * kWidth)));  // half as many lanes
typedef uint16_t U16 __attribute__((vector_size(2 * kWidth)));

template <class To, class From>
DGM_INLINE To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  return reinterpret_cast<To>(value);
}

template <class V>
DGM_INLINE V load_unaligned(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class V>
DGM_INLINE void store_unaligned(void* to, V value) {
  std::memcpy(to, &value, sizeof value);
}

// ---- Philox

template <class W>
DGM_INLINE W broadcast(uint32_t value) {
  return W{} + value;
}

// `low` keeps the whole product: its upper half is never read.
DGM_INLINE void multiply(uint32_t factor, U64 value, U64& high, U64& low) {
#if defined(__AVX512F__)
  low = reinterpret_cast<U64>(_mm512_mul_epu32(_mm512_set1_epi64(factor), reinterpret_cast<__m512i>(value)));
#elif defined(__AVX2__)
  low = reinterpret_cast<U64>(_mm256_mul_epu32(_mm256_set1_epi64x(factor), reinterpret_cast<__m256i>(value)));
#elif defined(__SSE2__)
  low = reinterpret_cast<U64>(_mm_mul_epu32(_mm_set1_epi64x(factor), reinterpret_cast<__m128i>(value)));
#else
  low = (value & 0xFFFFFFFFu) * factor;
#endif
  high = low >> 32;
}

// Lanes 0, 2, 4, ... from the lower halves of `even`, lanes 1, 3, 5, ... from those of `odd`.
DGM_INLINE U32 zip_lower_halves(U64 even, U64 odd) { return bit_cast<U32>((even & 0xFFFFFFFFu) | (odd << 32)); }

// Transposes the 4x4 blocks that the four 128-bit groups at the same place make.
DGM_INLINE void transpose4(F32 (&v)[4]) {
#define DGM_TRANSPOSE4(prefix, vec, vecd)                                                             \
  const vec a = reinterpret_cast<vec>(v[0]), b = reinterpret_cast<vec>(v[1]);                         \
  const vec c = reinterpret_cast<vec>(v[2]), d = reinterpret_cast<vec>(v[3]);                         \
  const vecd ab0 = reinterpret_cast<vecd>(prefix##_unpacklo_ps(a, b));                                \
  const vecd ab1 = reinterpret_cast<vecd>(prefix##_unpackhi_ps(a, b));                                \
  const vecd cd0 = reinterpret_cast<vecd>(prefix##_unpacklo_ps(c, d));                                \
  const vecd cd1 = reinterpret_cast<vecd>(prefix##_unpackhi_ps(c, d));                                \
  v[0] = reinterpret_cast<F32>(prefix##_unpacklo_pd(ab0, cd0));                                       \
  v[1] = reinterpret_cast<F32>(prefix##_unpackhi_pd(ab0, cd0));                                       \
  v[2] = reinterpret_cast<F32>(prefix##_unpacklo_pd(ab1, cd1));                                       \
  v[3] = reinterpret_cast<F32>(prefix##_unpackhi_pd(ab1, cd1))
#if defined(__AVX512F__)
  DGM_TRANSPOSE4(_mm512, __m512, __m512d);
#elif defined(__AVX2__)
  DGM_TRANSPOSE4(_mm256, __m256, __m256d);
#elif defined(__SSE2__)
  DGM_TRANSPOSE4(_mm, __m128, __m128d);
#else
  F32 t[4];
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) t[i][j] = v[j][i];
  for (int i = 0; i < 4; ++i) v[i] = t[i];
#endif
#undef DGM_TRANSPOSE4
}

// ---- Functions. Each is within 2 ulp on the arguments that noise gives it.

DGM_INLINE F32 square_root(F32 x) {
#if defined(__AVX512F__)
  return reinterpret_cast<F32>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<F32>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#else
  for (int i = 0; i < kWidth; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// Rounds once, to nearest: both halves convert exactly.
DGM_INLINE F32 to_float(U32 x) {
#if defined(__AVX512F__)
  return reinterpret_cast<F32>(_mm512_cvtepu32_ps(reinterpret_cast<__m512i>(x)));
#else
  const F32 high = __builtin_convertvector(bit_cast<I32>(x >> 16), F32);
  const F32 low = __builtin_convertvector(bit_cast<I32>(x & 0xFFFFu), F32);
  return high * 65536.0f + low;
#endif
}

// -2 ln(u) for u in (0, 1]: u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), a minimax polynomial for ln(1 + f).
DGM_INLINE F32 minus_two_log(F32 u) {
  const I32 offset = bit_cast<I32>(u) - 0x3F3504F3;
  const I32 e = offset >> 23;
  const F32 f = bit_cast<F32>(bit_cast<I32>(u) - (offset & static_cast<int32_t>(0xFF800000))) - 1.0f;
  const F32 scale = __builtin_convertvector(e, F32);
  F32 p = f * 0.08700435608625412f - 0.14267486333847046f;
  p = p * f + 0.14914767444133759f;
  p = p * f - 0.1657758504152298f;
  p = p * f + 0.19963063299655914f;
  p = p * f - 0.2500133812427521f;
  p = p * f + 0.3333390951156616f;
  p = p * f - 0.5f;
  p = p * (f * f) + f;
  return scale * -1.3862943611198906f - 2.0f * p;
}

// sin(2 pi u) and cos(2 pi u) for u in [0, 1]: the nearest quarter turn and minimax polynomials for the rest.
DGM_INLINE void sincos_turns(F32 u, F32& sine, F32& cosine) {
  const F32 shift = F32{} + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the nearest integer
  const F32 shifted = u * 4.0f + shift;
  const F32 r = u * 4.0f - (shifted - shift);
  const U32 quarter = bit_cast<U32>(shifted);
  const F32 z = r * r;
  F32 s = z * -0.00460165785625577f + 0.07968003302812576f;
  s = s * z - 0.6459634900093079f;
  s = (s * z + 1.5707963705062866f) * r;
  F32 c = z * -0.020417282357811928f + 0.2536032199859619f;
  c = (c * z - 1.2336976528167725f) * z + 1.0f;
  const auto odd = (quarter & 1u) != 0u;
  const U32 sine_sign = (quarter & 2u) << 30, cosine_sign = ((quarter + 1u) & 2u) << 30;
  sine = bit_cast<F32>(bit_cast<U32>(odd ? c : s) ^ sine_sign);
  cosine = bit_cast<F32>(bit_cast<U32>(odd ? s : c) ^ cosine_sign);
}

// Keep NaN: a comparison with it is false.
DGM_INLINE F32 at_least(F32 x, float bound) {
  const F32 b = F32{} + bound;
  return b > x ? b : x;
}

DGM_INLINE F32 at_most(F32 x, float bound) {
  const F32 b = F32{} + bound;
  return b < x ? b : x;
}

DGM_INLINE double sum(F32 x) {
  double total = 0.0;
  for (int i = 0; i < kWidth; ++i) total += static_cast<double>(x[i]);
  return total;
}

// ---- Memory: kWidth elements of any dtype as float32

DGM_INLINE F32 load(const float* from) { return load_unaligned<F32>(from); }

DGM_INLINE F32 load_bfloat16(const uint16_t* from) {
  return bit_cast<F32>(__builtin_convertvector(load_unaligned<U16>(from), U32) << 16);
}

DGM_INLINE F32 load_float16(const uint16_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<F32>(_mm512_cvtph_ps(load_unaligned<__m256i>(from)));
#elif defined(__AVX2__)
  return reinterpret_cast<F32>(_mm256_cvtph_ps(load_unaligned<__m128i>(from)));
#else
  F32 value;
  for (int i = 0; i < kWidth; ++i) {
    _Float16 half;
    std::memcpy(&half, from + i, sizeof half);
    value[i] = static_cast<float>(half);
  }
  return value;
#endif
}

DGM_INLINE F32 load_bool(const uint8_t* from) {
  F32 value;
  for (int i = 0; i < kWidth; ++i) value[i] = from[i] ? 1.0f : 0.0f;
  return value;
}

DGM_INLINE void store(float* to, F32 value) { store_unaligned(to, value); }

// Round to nearest even; NaN stays NaN.
DGM_INLINE void store_bfloat16(uint16_t* to, F32 value) {
  const U32 bits = bit_cast<U32>(value);
  const U32 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const U32 result = value == value ? rounded : U32{} + 0x7FC0u;
  store_unaligned(to, __builtin_convertvector(result, U16));
}

DGM_INLINE void store_float16(uint16_t* to, F32 value) {
#if defined(__AVX512F__)
  store_unaligned(to, _mm512_cvtps_ph(reinterpret_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  store_unaligned(to, _mm256_cvtps_ph(reinterpret_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kWidth; ++i) {
    const _Float16 half = static_cast<_Float16>(value[i]);
    std::memcpy(to + i, &half, sizeof half);
  }
#endif
}

DGM_INLINE int element_size(DType dtype) { return dtype == DType::Float32 ? 4 : dtype == DType::Bool ? 1 : 2; }

DGM_INLINE void load_block_full(const char* from, DType dtype, F32 (&v)[4]) {
  switch (dtype) {
    case DType::BFloat16:
      for (int i = 0; i < 4; ++i) v[i] = load_bfloat16(reinterpret_cast<const uint16_t*>(from) + i * kWidth);
      break;
    case DType::Float16:
      for (int i = 0; i < 4; ++i) v[i] = load_float16(reinterpret_cast<const uint16_t*>(from) + i * kWidth);
      break;
    case DType::Bool:
      for (int i = 0; i < 4; ++i) v[i] = load_bool(reinterpret_cast<const uint8_t*>(from) + i * kWidth);
      break;
    default:
      for (int i = 0; i < 4; ++i) v[i] = load(reinterpret_cast<const float*>(from) + i * kWidth);
  }
}

DGM_INLINE void store_block_full(char* to, DType dtype, const F32 (&v)[4]) {
  switch (dtype) {
    case DType::BFloat16:
      for (int i = 0; i < 4; ++i) store_bfloat16(reinterpret_cast<uint16_t*>(to) + i * kWidth, v[i]);
      break;
    case DType::Float16:
      for (int i = 0; i < 4; ++i) store_float16(reinterpret_cast<uint16_t*>(to) + i * kWidth, v[i]);
      break;
    default:
      for (int i = 0; i < 4; ++i) store(reinterpret_cast<float*>(to) + i * kWidth, v[i]);
  }
}

// Up to kBlock elements from `index` on; the vectors beyond `count` hold zeros, so that a short block runs the same
// arithmetic as a full one.
DGM_INLINE void load_block(const Operand& operand, int64_t index, int64_t count, F32 (&v)[4]) {
  const int size = element_size(operand.dtype);
  const char* from = static_cast<const char*>(operand.data) + index * size;
  if (__builtin_expect(count >= kBlock, 1)) return load_block_full(from, operand.dtype, v);
  alignas(64) char buffer[4 * kBlock] = {};
  std::memcpy(buffer, from, count * size);
  load_block_full(buffer, operand.dtype, v);
}

DGM_INLINE void store_block(const Output& output, int64_t index, int64_t count, const F32 (&v)[4]) {
  const int size = element_size(output.dtype);
  char* to = static_cast<char*>(output.data) + index * size;
  if (__builtin_expect(count >= kBlock, 1)) return store_block_full(to, output.dtype, v);
  alignas(64) char buffer[4 * kBlock];
  store_block_full(buffer, output.dtype, v);
  std::memcpy(to, buffer, count * size);
}

}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm
