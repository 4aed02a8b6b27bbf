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
#define DGM_NOINLINE static __attribute__((noinline))
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
// Philox and Box-Muller are chains of dependent operations: several groups of counters run in lockstep to fill the
// pipelines, as many as the registers hold (AVX-512 has 32, measured best of 1, 2, 3, 4 and 6).
#if defined(__AVX512F__)
constexpr int kGroups = 4;
#else
constexpr int kGroups = 1;
#endif
constexpr int kVectors = 4 * kGroups;
constexpr int kBlock = kVectors * kWidth;  // elements that kGroups * kWidth Philox counters make

typedef float F32 __attribute__((vector_size(4 * kWidth)));
typedef int32_t I32 __attribute__((vector_size(4 * kWidth)));
typedef uint32_t U32 __attribute__((vector_size(4 * kWidth)));
typedef uint64_t U64 __attribute__((vector_size(4 * kWidth)));   // half as many lanes
typedef double F64 __attribute__((vector_size(4 * kWidth)));     // likewise
typedef float HalfF32 __attribute__((vector_size(2 * kWidth)));  // likewise
typedef uint8_t U8 __attribute__((vector_size(kWidth)));
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

// ---- N vectors in lockstep: every operation runs over all of them before the next one.

template <class V, int N>
struct Pack {
  V v[N];
};

// As many as the registers hold: of a long chain of operations one vector alone does not fill the pipelines (measured
// best of 1, 2, 3, 4, 6 and 8 for an affine coupling layer).
#if defined(__AVX512F__)
constexpr int kLockstep = 4;
#else
constexpr int kLockstep = 1;
#endif

#define DGM_EACH DGM_UNROLL for (int i = 0; i < N; ++i)

#define DGM_LIFT(op)                                              \
  template <class V, int N>                                       \
  DGM_INLINE Pack<V, N> operator op(Pack<V, N> a, Pack<V, N> b) { \
    DGM_EACH a.v[i] = a.v[i] op b.v[i];                           \
    return a;                                                     \
  }                                                               \
  template <class V, int N, class S>                              \
  DGM_INLINE Pack<V, N> operator op(Pack<V, N> a, S b) {          \
    DGM_EACH a.v[i] = a.v[i] op b;                                \
    return a;                                                     \
  }
DGM_LIFT(+)
DGM_LIFT(-)
DGM_LIFT(*)
DGM_LIFT(/)
DGM_LIFT(&)
DGM_LIFT(^)
DGM_LIFT(<<)
DGM_LIFT(>>)
#undef DGM_LIFT

template <class V, int N>
DGM_INLINE Pack<V, N> operator-(Pack<V, N> a) {
  DGM_EACH a.v[i] = -a.v[i];
  return a;
}

template <class V, int N>
DGM_INLINE Pack<V, N> operator-(float a, Pack<V, N> b) {
  DGM_EACH b.v[i] = a - b.v[i];
  return b;
}

template <class To, class V, int N>
DGM_INLINE Pack<To, N> bit_cast(Pack<V, N> a) {
  Pack<To, N> result;
  DGM_EACH result.v[i] = bit_cast<To>(a.v[i]);
  return result;
}

// ---- Philox

template <class W>
struct Broadcast {
  static DGM_INLINE_METHOD W of(uint32_t value) { return bit_cast<W>(U32{} + value); }
};

template <class V, int N>
struct Broadcast<Pack<V, N>> {
  static DGM_INLINE_METHOD Pack<V, N> of(uint32_t value) {
    Pack<V, N> result;
    DGM_EACH result.v[i] = bit_cast<V>(U32{} + value);
    return result;
  }
};

template <class W>
DGM_INLINE W broadcast(uint32_t value) {
  return Broadcast<W>::of(value);
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

template <int N>
DGM_INLINE void multiply(uint32_t factor, Pack<U64, N> value, Pack<U64, N>& high, Pack<U64, N>& low) {
  DGM_EACH multiply(factor, value.v[i], high.v[i], low.v[i]);
}

// Lanes 0, 2, 4, ... from the lower halves of `even`, lanes 1, 3, 5, ... from those of `odd`.
DGM_INLINE U32 zip_lower_halves(U64 even, U64 odd) {
#if defined(__AVX512F__)
  const __m512 low = reinterpret_cast<__m512>(even);
  return reinterpret_cast<U32>(_mm512_mask_moveldup_ps(low, 0xAAAA, reinterpret_cast<__m512>(odd)));
#else
  return bit_cast<U32>((even & 0xFFFFFFFFu) | (odd << 32));
#endif
}

// Transposes the 4x4 blocks that the four 128-bit groups at the same place make.
DGM_INLINE void transpose4(F32* v) {
#define DGM_TRANSPOSE4(prefix, vec, vecd)                                     \
  const vec a = reinterpret_cast<vec>(v[0]), b = reinterpret_cast<vec>(v[1]); \
  const vec c = reinterpret_cast<vec>(v[2]), d = reinterpret_cast<vec>(v[3]); \
  const vecd ab0 = reinterpret_cast<vecd>(prefix##_unpacklo_ps(a, b));        \
  const vecd ab1 = reinterpret_cast<vecd>(prefix##_unpackhi_ps(a, b));        \
  const vecd cd0 = reinterpret_cast<vecd>(prefix##_unpacklo_ps(c, d));        \
  const vecd cd1 = reinterpret_cast<vecd>(prefix##_unpackhi_ps(c, d));        \
  v[0] = reinterpret_cast<F32>(prefix##_unpacklo_pd(ab0, cd0));               \
  v[1] = reinterpret_cast<F32>(prefix##_unpackhi_pd(ab0, cd0));               \
  v[2] = reinterpret_cast<F32>(prefix##_unpacklo_pd(ab1, cd1));               \
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

// The first `count` lanes from memory, of fewer than all; the others are zero.
DGM_INLINE F32 load_part(const float* from, int64_t count) {
#if defined(__AVX512F__)
  return reinterpret_cast<F32>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), from));
#else
  F32 value = {};
  std::memcpy(&value, from, count * sizeof(float));
  return value;
#endif
}

typedef float Quad __attribute__((vector_size(16)));

// Four floats at from, four at from + apart, ...
DGM_INLINE F32 load_quads(const float* from, [[maybe_unused]] int64_t apart) {
#if defined(__AVX512F__)
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(from));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(from + apart), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(from + 2 * apart), 2);
  return reinterpret_cast<F32>(_mm512_insertf32x4(v, _mm_loadu_ps(from + 3 * apart), 3));
#elif defined(__AVX2__)
  return reinterpret_cast<F32>(_mm256_loadu2_m128(from + apart, from));
#else
  return load_unaligned<F32>(from);
#endif
}

DGM_INLINE Quad quad(F32 v, int index) {
#if defined(__AVX512F__)
  switch (index) {
    case 0:
      return reinterpret_cast<Quad>(_mm512_castps512_ps128(reinterpret_cast<__m512>(v)));
    case 1:
      return reinterpret_cast<Quad>(_mm512_extractf32x4_ps(reinterpret_cast<__m512>(v), 1));
    case 2:
      return reinterpret_cast<Quad>(_mm512_extractf32x4_ps(reinterpret_cast<__m512>(v), 2));
    default:
      return reinterpret_cast<Quad>(_mm512_extractf32x4_ps(reinterpret_cast<__m512>(v), 3));
  }
#else
  Quad part;
  std::memcpy(&part, reinterpret_cast<const float*>(&v) + 4 * index, sizeof part);
  return part;
#endif
}

// ---- Functions that philox.h is written with

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

DGM_INLINE F32 to_float(I32 x) { return __builtin_convertvector(x, F32); }

// To the nearest whole number below 2^31.
DGM_INLINE I32 nearest(F32 x) {
#if defined(__AVX512F__)
  return reinterpret_cast<I32>(_mm512_cvtps_epi32(reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<I32>(_mm256_cvtps_epi32(reinterpret_cast<__m256>(x)));
#elif defined(__SSE2__)
  return reinterpret_cast<I32>(_mm_cvtps_epi32(reinterpret_cast<__m128>(x)));
#else
  I32 whole;
  for (int i = 0; i < kWidth; ++i) whole[i] = static_cast<int32_t>(__builtin_lrintf(x[i]));
  return whole;
#endif
}

// u = 2^e (1 + f) with 1 + f in [3/4, 3/2), for a positive normal u.
DGM_INLINE void split_exponent(F32 u, F32& e, F32& f) {
#if defined(__AVX512F__)
  // 4/3 u reaches the next power of two where u reaches 3/4 of it, in float32 too (checked for every float in (0, 1]).
  e = reinterpret_cast<F32>(_mm512_getexp_ps(reinterpret_cast<__m512>(u * 1.33333337f)));
  f = reinterpret_cast<F32>(_mm512_getmant_ps(reinterpret_cast<__m512>(u), _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero)) -
      1.0f;
#else
  const I32 offset = bit_cast<I32>(u) - 0x3F400000;
  e = to_float(offset >> 23);
  f = bit_cast<F32>(bit_cast<I32>(u) - (offset & static_cast<int32_t>(0xFF800000))) - 1.0f;
#endif
}

DGM_INLINE F32 select_odd(U32 number, F32 odd, F32 even) {
#if defined(__AVX512F__)
  const __mmask16 is_odd = _mm512_test_epi32_mask(reinterpret_cast<__m512i>(number), _mm512_set1_epi32(1));
  return reinterpret_cast<F32>(
      _mm512_mask_blend_ps(is_odd, reinterpret_cast<__m512>(even), reinterpret_cast<__m512>(odd)));
#else
  return (number & 1u) != 0u ? odd : even;
#endif
}

// x with its sign flipped where the top bit of `pattern` is set.
DGM_INLINE F32 flip_sign(F32 x, U32 pattern) {
#if defined(__AVX512F__)
  constexpr int kXorAnd = 0x78;  // a ^ (b & c)
  const __m512i top = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  return reinterpret_cast<F32>(
      _mm512_ternarylogic_epi32(reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(pattern), top, kXorAnd));
#else
  return bit_cast<F32>(bit_cast<U32>(x) ^ (pattern & 0x80000000u));
#endif
}

template <int N>
DGM_INLINE Pack<F32, N> square_root(Pack<F32, N> x) {
  DGM_EACH x.v[i] = square_root(x.v[i]);
  return x;
}

template <class V, int N>
DGM_INLINE Pack<F32, N> to_float(Pack<V, N> x) {
  Pack<F32, N> result;
  DGM_EACH result.v[i] = to_float(x.v[i]);
  return result;
}

template <int N>
DGM_INLINE void split_exponent(Pack<F32, N> u, Pack<F32, N>& e, Pack<F32, N>& f) {
  DGM_EACH split_exponent(u.v[i], e.v[i], f.v[i]);
}

template <int N>
DGM_INLINE Pack<F32, N> select_odd(Pack<U32, N> number, Pack<F32, N> odd, Pack<F32, N> even) {
  DGM_EACH odd.v[i] = select_odd(number.v[i], odd.v[i], even.v[i]);
  return odd;
}

template <int N>
DGM_INLINE Pack<F32, N> flip_sign(Pack<F32, N> x, Pack<U32, N> pattern) {
  DGM_EACH x.v[i] = flip_sign(x.v[i], pattern.v[i]);
  return x;
}

// Keep NaN: the instructions return their second operand where one is NaN, a comparison is false.
DGM_INLINE F32 at_least(F32 x, float bound) {
  const F32 b = F32{} + bound;
#if defined(__AVX512F__)
  return reinterpret_cast<F32>(_mm512_max_ps(reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(x)));
#else
  return b > x ? b : x;
#endif
}

DGM_INLINE F32 at_most(F32 x, float bound) {
  const F32 b = F32{} + bound;
#if defined(__AVX512F__)
  return reinterpret_cast<F32>(_mm512_min_ps(reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(x)));
#else
  return b < x ? b : x;
#endif
}

template <int N>
DGM_INLINE Pack<F32, N> at_least(Pack<F32, N> x, float bound) {
  DGM_EACH x.v[i] = at_least(x.v[i], bound);
  return x;
}

template <int N>
DGM_INLINE Pack<F32, N> at_most(Pack<F32, N> x, float bound) {
  DGM_EACH x.v[i] = at_most(x.v[i], bound);
  return x;
}

DGM_INLINE double sum(F32 x) {
  double total = 0.0;
  for (int i = 0; i < kWidth; ++i) total += static_cast<double>(x[i]);
  return total;
}

// Zero beyond the first `left` lanes: the end of a sample must not add to a sum.
DGM_INLINE F32 keep_first(int64_t left, F32 x) {
  if (__builtin_expect(left < kWidth, 0))
    for (int64_t lane = left; lane < kWidth; ++lane) x[lane] = 0.0f;
  return x;
}

// Sums in float64, of which a long one loses nothing.
class Sum {
 public:
  DGM_INLINE_METHOD void add(F32 x) {
    HalfF32 half[2];
    std::memcpy(half, &x, sizeof x);
#if defined(__AVX512F__)  // GCC 12 converts in quarters
    low_ += reinterpret_cast<F64>(_mm512_cvtps_pd(reinterpret_cast<__m256>(half[0])));
    high_ += reinterpret_cast<F64>(_mm512_cvtps_pd(reinterpret_cast<__m256>(half[1])));
#else
    low_ += __builtin_convertvector(half[0], F64);
    high_ += __builtin_convertvector(half[1], F64);
#endif
  }

  DGM_INLINE_METHOD double value() const {
    F64 both = low_ + high_;
    for (int width = kWidth / 4; width > 0; width /= 2)  // by halves: a chain of additions would wait for each
      for (int i = 0; i < width; ++i) both[i] += both[i + width];
    return both[0];
  }

 private:
  F64 low_ = {}, high_ = {};
};

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
  const auto is_set = load_unaligned<U8>(from) != 0;  // -1 or 0
  return -__builtin_convertvector(__builtin_convertvector(is_set, I32), F32);
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

template <class T, class Load>
DGM_INLINE void load_all(const char* from, int64_t count, float* to, Load load) {
  const T* elements = reinterpret_cast<const T*>(from);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, load(elements + i));
  if (i == count) return;
  T rest[kWidth] = {};
  std::memcpy(rest, elements + i, (count - i) * sizeof(T));
  store(to + i, load(rest));
}

template <class T, class Store>
DGM_INLINE void store_all(const float* from, int64_t count, char* to, Store store) {
  T* elements = reinterpret_cast<T*>(to);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(elements + i, load(from + i));
  if (i == count) return;
  T rest[kWidth];
  store(rest, load(from + i));
  std::memcpy(elements + i, rest, (count - i) * sizeof(T));
}

DGM_NOINLINE void convert_to_floats(const char* from, DType dtype, int64_t count, float* to) {
  switch (dtype) {
    case DType::BFloat16:
      return load_all<uint16_t>(from, count, to, [](const uint16_t* p) { return load_bfloat16(p); });
    case DType::Float16:
      return load_all<uint16_t>(from, count, to, [](const uint16_t* p) { return load_float16(p); });
    case DType::Bool:
      return load_all<uint8_t>(from, count, to, [](const uint8_t* p) { return load_bool(p); });
    default:
      return load_all<float>(from, count, to, [](const float* p) { return load(p); });
  }
}

DGM_NOINLINE void convert_from_floats(const float* from, int64_t count, DType dtype, char* to) {
  switch (dtype) {
    case DType::BFloat16:
      return store_all<uint16_t>(from, count, to, [](uint16_t* p, F32 v) { store_bfloat16(p, v); });
    case DType::Float16:
      return store_all<uint16_t>(from, count, to, [](uint16_t* p, F32 v) { store_float16(p, v); });
    default:
      return store_all<float>(from, count, to, [](float* p, F32 v) { store(p, v); });
  }
}

// A block of an operand as kBlock floats: the tensor's own memory if that is what it holds, else a copy. Behind the end
// of a sample, `left` elements away, the copy holds zeros up to a whole vector, so that the arithmetic is the same
// there.
class Reader {
 public:
  DGM_INLINE_METHOD const float* block(const Operand& operand, int64_t index, int64_t left) {
    const char* from = static_cast<const char*>(operand.data) + index * element_size(operand.dtype);
    if (operand.dtype == DType::Float32 && left >= kBlock) return reinterpret_cast<const float*>(from);
    convert_to_floats(from, operand.dtype, left < kBlock ? left : kBlock, buffer_);
    return buffer_;
  }

 private:
  alignas(64) float buffer_[kBlock];
};

// Where a block of results goes: straight into the tensor, or into a buffer that finish() converts.
class Writer {
 public:
  DGM_INLINE_METHOD float* block(const Output& output, int64_t index, int64_t left) {
    to_ = static_cast<char*>(output.data) + index * element_size(output.dtype);
    dtype_ = output.dtype;
    count_ = left < kBlock ? left : kBlock;
    direct_ = dtype_ == DType::Float32 && left >= kBlock;
    return direct_ ? reinterpret_cast<float*>(to_) : buffer_;
  }

  DGM_INLINE_METHOD void finish() const {
    if (!direct_) convert_from_floats(buffer_, count_, dtype_, to_);
  }

 private:
  alignas(64) float buffer_[kBlock];
  char* to_ = nullptr;
  DType dtype_ = DType::Float32;
  int64_t count_ = 0;
  bool direct_ = true;
};

// Whole vectors that cover `left` elements of a block.
DGM_INLINE int vectors(int64_t left) {
  return left >= kBlock ? kVectors : static_cast<int>((left + kWidth - 1) / kWidth);
}

}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm
