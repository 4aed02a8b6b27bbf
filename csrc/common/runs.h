// Runs of floats: packs and vectors of them, the end of a run, and loops specialised on flags.
#pragma once

#include <type_traits>

#include "common/vec.h"

namespace dgm {
namespace DGM_ISA_NAMESPACE {
namespace {

template <int N>
DGM_INLINE Pack<F32, N> load_pack(const float* from) {
  Pack<F32, N> x;
  DGM_EACH x.v[i] = load(from + i * kWidth);
  return x;
}

template <int N>
DGM_INLINE void store_pack(float* to, Pack<F32, N> x) {
  DGM_EACH store(to + i * kWidth, x.v[i]);
}

// Past the caches, if `stream` and the place allow it: a result that they would not hold costs a reading, too.
template <int N>
DGM_INLINE void store_pack(float* to, Pack<F32, N> x, [[maybe_unused]] bool stream) {
#if defined(__AVX512F__)
  if (stream && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    DGM_EACH _mm512_stream_ps(to + i * kWidth, reinterpret_cast<__m512>(x.v[i]));
    return;
  }
#endif
  store_pack(to, x);
}

// How a vector of a run is read and written: as it is, or, at the end, as far as there are elements.
struct Full {
  DGM_INLINE_METHOD F32 load(const float* from) const { return ::dgm::DGM_ISA_NAMESPACE::load(from); }
  DGM_INLINE_METHOD void store(float* to, F32 value) const { ::dgm::DGM_ISA_NAMESPACE::store(to, value); }
  DGM_INLINE_METHOD F32 keep(F32 value) const { return value; }
};

struct Some {
  int64_t count;
  DGM_INLINE_METHOD F32 load(const float* from) const { return load_part(from, count); }
  DGM_INLINE_METHOD void store(float* to, F32 value) const { std::memcpy(to, &value, count * sizeof(float)); }
  DGM_INLINE_METHOD F32 keep(F32 value) const { return keep_first(count, value); }
};

template <class Whole = Full, class Rest = Some, class Vector>
DGM_INLINE void for_each_vector(int64_t count, const Vector& vector) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) vector(i, Whole{});
  if (i < count) vector(i, Rest{count - i});
}

template <class Call>
DGM_INLINE void with_flag(bool flag, const Call& call) {
  if (flag)
    call(std::true_type{});
  else
    call(std::false_type{});
}

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm
