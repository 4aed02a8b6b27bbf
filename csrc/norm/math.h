// What the passes of the norm op share: ends of rows, sums over them, mean and variance, rows of any dtype as floats.
#pragma once

#include "common/elementary.h"
#include "common/panel.h"
#include "common/runs.h"
#include "norm/args.h"

namespace dgm::norm {
namespace DGM_ISA_NAMESPACE {

using namespace ::dgm::DGM_ISA_NAMESPACE;

namespace {

// Past the caches, to a whole cache line.
struct Streamed : Full {
  DGM_INLINE_METHOD void store(float* to, F32 value) const {
#if defined(__AVX512F__)
    _mm512_stream_ps(to, reinterpret_cast<__m512>(value));
#else
    Full::store(to, value);
#endif
  }
};

// Sums of kSums terms over a row; term(i, access, terms) computes those of the vector at i. Four sums of each run side
// by side: one would wait for every addition.
template <int kSums, class Term>
DGM_INLINE void add_up(int64_t count, double (&totals)[kSums], const Term& term) {
  constexpr int kChains = 4;
  F32 sums[kSums][kChains];
  DGM_UNROLL
  for (int k = 0; k < kSums * kChains; ++k) sums[k / kChains][k % kChains] = F32{};
  int64_t i = 0;
  for (; i + kChains * kWidth <= count; i += kChains * kWidth) {
    DGM_UNROLL
    for (int j = 0; j < kChains; ++j) {
      F32 terms[kSums];
      term(i + j * kWidth, Full{}, terms);
      DGM_UNROLL
      for (int k = 0; k < kSums; ++k) sums[k][j] += terms[k];
    }
  }
  for_each_vector(count - i, [&](int64_t j, auto access) {
    F32 terms[kSums];
    term(i + j, access, terms);
    DGM_UNROLL
    for (int k = 0; k < kSums; ++k) sums[k][0] += access.keep(terms[k]);
  });
  DGM_UNROLL
  for (int k = 0; k < kSums; ++k) {
    Sum total;
    DGM_UNROLL
    for (int j = 0; j < kChains; ++j) total.add(sums[k][j]);
    totals[k] = total.value();
  }
}

// `low` is what the rounding of the mean left off.
struct Statistics {
  float mean, low, rstd;
};

constexpr int64_t kChunk = 4096;  // elements whose sums are taken in float32, and that the first cache holds

// Number, mean and sum of squares about it.
struct Moments {
  double count = 0.0, mean = 0.0, squares = 0.0;

  // As in Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
  DGM_INLINE_METHOD void merge(const Moments& other) {
    const double all = count + other.count, apart = other.mean - mean;
    squares += other.squares + apart * apart * (count * other.count / all);
    mean += apart * (other.count / all);
    count = all;
  }
};

// The moments of source(i, access) for i in [first, first + count), from sums about a pivot: differences from a number
// near the mean keep their digits. Where the pivot turns out to be far from the mean, as measured by the deviation, the
// sums are taken again about the mean.
template <class Source>
DGM_INLINE Moments moments(int64_t first, int64_t count, const Source& source) {
  const int64_t some = count < kWidth ? count : kWidth;
  Sum beginning;
  beginning.add(count < kWidth ? keep_first(some, source(first, Some{some})) : source(first, Full{}));
  double pivot = beginning.value() / static_cast<double>(some);
  const double n = static_cast<double>(count);
  for (bool last = false;; last = true) {
    const float about = static_cast<float>(pivot);
    double sums[2];
    add_up(count, sums, [&](int64_t i, auto access, F32(&terms)[2]) {
      terms[0] = source(first + i, access) - about;
      terms[1] = terms[0] * terms[0];
    });
    const double rest = sums[0] / n;
    pivot = static_cast<double>(about) + rest;
    if (last || !(rest * sums[0] > 0.5 * sums[1])) return {n, pivot, sums[1] - rest * sums[0]};
  }
}

template <class Source>
DGM_INLINE Statistics statistics(int64_t count, bool rms, float eps, const Source& source) {
  Moments all;
  for (int64_t first = 0; first < count; first += kChunk) {
    const int64_t length = count - first < kChunk ? count - first : kChunk;
    if (rms) {
      double squares[1];
      add_up(length, squares, [&](int64_t i, auto access, F32(&terms)[1]) {
        const F32 x = source(first + i, access);
        terms[0] = x * x;
      });
      all.squares += squares[0];
    } else {
      all.merge(moments(first, length, source));
    }
  }
  const double variance = all.squares / static_cast<double>(count);
  const float mean = static_cast<float>(all.mean);
  const double positive = variance < 0.0 ? 0.0 : variance;
  return {mean, static_cast<float>(all.mean - static_cast<double>(mean)),
          static_cast<float>(1.0 / __builtin_sqrt(positive + static_cast<double>(eps)))};
}

DGM_NOINLINE Statistics statistics(const float* x, int64_t count, bool rms, float eps) {
  return statistics(count, rms, eps, [x](int64_t i, auto access) { return access.load(x + i); });
}

// Whether a row can be stored past the caches.
DGM_INLINE bool is_line(const void* to) { return reinterpret_cast<uintptr_t>(to) % 64 == 0; }

DGM_INLINE const void* at(const Operand& operand, int64_t index) {
  return static_cast<const char*>(operand.data) + index * element_size(operand.dtype);
}

// Elements from `index` on as floats: where they are, or converted into `buffer`.
DGM_INLINE const float* read(const Operand& operand, int64_t index, int64_t count, float* buffer) {
  if (!operand.data) return nullptr;
  if (operand.dtype == DType::Float32) return static_cast<const float*>(at(operand, index));
  convert_to_floats(static_cast<const char*>(at(operand, index)), operand.dtype, count, buffer);
  return buffer;
}

DGM_INLINE const float* read(const SampleRows& rows, int64_t sample, int64_t first, int64_t count, float* buffer) {
  return read(Operand{rows.data, rows.dtype}, sample * rows.stride + first, count, buffer);
}

// Where floats go: straight into the tensor, or into `buffer`, from which `write` converts them.
DGM_INLINE float* place(const Output& output, int64_t index, float* buffer) {
  if (!output.data) return nullptr;
  return output.dtype == DType::Float32 ? static_cast<float*>(output.data) + index : buffer;
}

DGM_INLINE void write(const Output& output, int64_t index, int64_t count, const float* from) {
  if (!output.data || output.dtype == DType::Float32) return;
  convert_from_floats(from, count, output.dtype, static_cast<char*>(output.data) + index * element_size(output.dtype));
}

// A buffer is written in whole vectors, and starts at a cache line.
DGM_INLINE int64_t padded(int64_t count) { return (count + 31) / 16 * 16; }

constexpr int64_t kPage = 4096;
constexpr int64_t kPageFloats = kPage / 4;

// Memory of a kernel's own, from a cache line on.
class Buffers {
 public:
  explicit Buffers(int64_t count) : memory_(count + 16) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    data_ = memory_.data() + (64 - address % 64) % 64 / 4;
  }
  float* data() { return data_; }

 private:
  Array<float> memory_;
  float* data_;
};

// The place in a buffer with kPageFloats to spare that is half a page away from `other`, for what is read while `other`
// is written: a processor takes a load for one of a value that is just being stored if the lower 12 bits of the
// addresses agree, and waits.
DGM_INLINE float* apart_from(const void* other, float* buffer) {
  const uintptr_t wanted = reinterpret_cast<uintptr_t>(other) + kPage / 2;
  return buffer + (wanted - reinterpret_cast<uintptr_t>(buffer)) % kPage / 64 * 16;
}

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::norm
