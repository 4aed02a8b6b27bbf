// CPU loops of the affine coupling layer on runs of float32 elements, and the chunks of rows that are made into runs.
#pragma once

#include "common/runs.h"
#include "coupling/math.h"

namespace dgm::coupling {
namespace DGM_ISA_NAMESPACE {
namespace {

// ---- Runs: contiguous elements, whatever sample they belong to

// The mask of a vector of a run, beside what is read and written of it.
struct Whole : Full {
  DGM_INLINE_METHOD I32 fixed(const uint8_t* from) const {
    return __builtin_convertvector(load_unaligned<U8>(from) != 0, I32);
  }
};

struct Rest : Some {
  DGM_INLINE_METHOD I32 fixed(const uint8_t* from) const {
    uint8_t buffer[kWidth] = {};
    std::memcpy(buffer, from, count);
    return Whole{}.fixed(buffer);
  }
};

// Asks for what the lockstep at hand will be followed by: the arithmetic of a scale takes longer than the processor
// looks ahead, so that without this memory would wait for it, and it for memory.
template <class... Pointers>
DGM_INLINE void prefetch(int64_t i, Pointers... pointers) {
  constexpr int kAhead = 512;  // measured best of 256, 512, 1024 and 2048
  DGM_UNROLL
  for (int j = 0; j < kLockstep; ++j) (__builtin_prefetch(pointers + i + j * kWidth + kAhead), ...);
}

// Rows of floats at a distance of `stride`.
template <class Float>
struct Floats {
  Float* data = nullptr;
  int64_t stride = 0;
  DGM_INLINE_METHOD Float* row(int64_t i) const { return data + i * stride; }
};

// One row of a run; `fixed` is null where all elements are transformed; `logs` takes the logarithms of the scales.
struct Run {
  const float *x, *shift, *raw;
  const uint8_t* fixed;
  float *y, *logs;
};

// Rows of `count` elements. Masks and logarithms follow each other without gaps.
struct Runs {
  int64_t rows, count;
  Floats<const float> x, shift, raw;
  const uint8_t* fixed;
  Floats<float> y;
  float* logs;

  DGM_INLINE_METHOD Run row(int64_t i) const {
    return {x.row(i), shift.row(i), raw.row(i), fixed ? fixed + i * count : nullptr, y.row(i), logs + i * count};
  }
};

template <ScaleMap kMap, bool kInverse, bool kMasked, class Access>
DGM_INLINE void finish_affine(const Run& r, int64_t i, F32 s, F32 factor, Access access) {
  const F32 x = access.load(r.x + i), shift = access.load(r.shift + i);
  F32 y = kInverse ? (x - shift) * factor : x * factor + shift;
  if constexpr (kMasked) {
    const I32 fixed = access.fixed(r.fixed + i);
    y = fixed ? x : y;
    s = fixed ? F32{} : s;
  }
  access.store(r.y + i, y);
  access.store(r.logs + i, s);
}

template <ScaleMap kMap, bool kInverse, bool kMasked>
DGM_INLINE void affine_run(const Run& r, int64_t count) {
  int64_t i = 0;
  for (; i + kLockstep * kWidth <= count; i += kLockstep * kWidth) {
    prefetch(i, r.raw, r.x, r.shift);
    const auto scale = log_scale<kMap, kInverse>(load_pack<kLockstep>(r.raw + i));
    DGM_UNROLL
    for (int j = 0; j < kLockstep; ++j)
      finish_affine<kMap, kInverse, kMasked>(r, i + j * kWidth, scale.s.v[j], scale.factor.v[j], Whole{});
  }
  for_each_vector<Whole, Rest>(count - i, [&](int64_t j, auto access) {
    const LogScale<F32> scale = log_scale<kMap, kInverse>(access.load(r.raw + i + j));
    finish_affine<kMap, kInverse, kMasked>(r, i + j, scale.s, scale.factor, access);
  });
}

template <ScaleMap kMap, bool kInverse, bool kMasked>
DGM_NOINLINE void affine_runs(const Runs runs) {
  for (int64_t i = 0; i < runs.rows; ++i) affine_run<kMap, kInverse, kMasked>(runs.row(i), runs.count);
}

DGM_NOINLINE void additive_run(const Run r, int64_t count, bool inverse) {
  const float sign = inverse ? -1.0f : 1.0f;
  for_each_vector<Whole, Rest>(count, [&](int64_t i, auto access) {
    const F32 x = access.load(r.x + i), y = x + sign * access.load(r.shift + i);
    access.store(r.y + i, r.fixed ? (access.fixed(r.fixed + i) ? x : y) : y);
  });
}

struct BackwardRun {
  const float *grad, *grad_logdet, *output, *shift, *raw;  // grad_logdet: that of the element's sample
  const uint8_t* fixed;
  float *grad_x, *grad_shift, *grad_raw;  // grad_shift may be null
};

struct BackwardRuns {
  int64_t rows, count;
  Floats<const float> grad, output, shift, raw;
  const float* grad_logdet;
  const uint8_t* fixed;
  Floats<float> grad_x, grad_shift, grad_raw;

  DGM_INLINE_METHOD BackwardRun row(int64_t i) const {
    return {grad.row(i),    grad_logdet + i * count,
            output.row(i),  shift.row(i),
            raw.row(i),     fixed ? fixed + i * count : nullptr,
            grad_x.row(i),  grad_shift.data ? grad_shift.row(i) : nullptr,
            grad_raw.row(i)};
  }
};

template <ScaleMap kMap, bool kInverse, bool kMasked, class Access>
DGM_INLINE void finish_backward(const BackwardRun& r, int64_t i, F32 raw, F32 s, F32 factor, Access access) {
  const F32 grad = access.load(r.grad + i), output = access.load(r.output + i);
  const F32 grad_logdet = access.load(r.grad_logdet + i);
  F32 to_x = grad * factor, to_shift = kInverse ? -to_x : grad;
  const F32 to_s = kInverse ? -(grad * output + grad_logdet) : grad * (output - access.load(r.shift + i)) + grad_logdet;
  F32 to_raw = to_s * log_scale_slope<kMap>(raw, s);
  if constexpr (kMasked) {
    const I32 fixed = access.fixed(r.fixed + i);
    to_x = fixed ? grad : to_x;
    to_shift = fixed ? F32{} : to_shift;
    to_raw = fixed ? F32{} : to_raw;
  }
  access.store(r.grad_x + i, to_x);
  if (r.grad_shift) access.store(r.grad_shift + i, to_shift);
  access.store(r.grad_raw + i, to_raw);
}

template <ScaleMap kMap, bool kInverse, bool kMasked>
DGM_INLINE void affine_backward_run(const BackwardRun& r, int64_t count) {
  int64_t i = 0;
  for (; i + kLockstep * kWidth <= count; i += kLockstep * kWidth) {
    prefetch(i, r.raw, r.grad, r.output, r.shift);
    const auto raw = load_pack<kLockstep>(r.raw + i);
    const auto scale = log_scale<kMap, kInverse>(raw);
    DGM_UNROLL
    for (int j = 0; j < kLockstep; ++j)
      finish_backward<kMap, kInverse, kMasked>(r, i + j * kWidth, raw.v[j], scale.s.v[j], scale.factor.v[j], Whole{});
  }
  for_each_vector<Whole, Rest>(count - i, [&](int64_t j, auto access) {
    const F32 raw = access.load(r.raw + i + j);
    const LogScale<F32> scale = log_scale<kMap, kInverse>(raw);
    finish_backward<kMap, kInverse, kMasked>(r, i + j, raw, scale.s, scale.factor, access);
  });
}

template <ScaleMap kMap, bool kInverse, bool kMasked>
DGM_NOINLINE void affine_backward_runs(const BackwardRuns runs) {
  for (int64_t i = 0; i < runs.rows; ++i) affine_backward_run<kMap, kInverse, kMasked>(runs.row(i), runs.count);
}

// The sum of log N(z; 0, 1), or of the standard logistic log-density.
DGM_NOINLINE double base_log_density(const float* z, int64_t count, bool logistic) {
  constexpr float kLogRootTwoPi = 0.918938533204672741780329736406f;
  const auto density = [&](F32 z) {
    if (!logistic) return z * z * -0.5f - kLogRootTwoPi;
    const F32 magnitude = absolute(z);
    return -magnitude - 2.0f * logarithm1p(exponential(-magnitude));
  };
  Sum total;
  int64_t i = 0;
  for (; i + 4 * kWidth <= count; i += 4 * kWidth)
    total.add((density(load(z + i)) + density(load(z + i + kWidth))) +
              (density(load(z + i + 2 * kWidth)) + density(load(z + i + 3 * kWidth))));
  for (; i < count; i += kWidth) {
    const int64_t left = count - i;
    total.add(keep_first(left, density(left < kWidth ? Some{left}.load(z + i) : load(z + i))));
  }
  return total.value();
}

DGM_INLINE double total(const float* x, int64_t count) {
  Sum sum;
  int64_t i = 0;
  if (count < kWidth) {
    double result = 0.0;
    for (; i < count; ++i) result += static_cast<double>(x[i]);
    return result;
  }
  for (; i + 4 * kWidth <= count; i += 4 * kWidth)
    sum.add((load(x + i) + load(x + i + kWidth)) + (load(x + i + 2 * kWidth) + load(x + i + 3 * kWidth)));
  for (; i + kWidth <= count; i += kWidth) sum.add(load(x + i));
  double result = sum.value();
  for (; i < count; ++i) result += static_cast<double>(x[i]);
  return result;
}

DGM_INLINE void fill(float* to, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

// ---- From the settings of a call to the code for them

template <class Call>
DGM_INLINE void with_map(ScaleMap map, const Call& call) {
  switch (map) {
    case ScaleMap::Tanh:
      return call(std::integral_constant<ScaleMap, ScaleMap::Tanh>{});
    case ScaleMap::Sigmoid:
      return call(std::integral_constant<ScaleMap, ScaleMap::Sigmoid>{});
    case ScaleMap::Softclip:
      return call(std::integral_constant<ScaleMap, ScaleMap::Softclip>{});
    default:
      return call(std::integral_constant<ScaleMap, ScaleMap::Exp>{});
  }
}

void run(const AffineArgs& a, const Runs& r) {
  if (!r.raw.data) {
    for (int64_t i = 0; i < r.rows; ++i) additive_run(r.row(i), r.count, a.inverse);
    return;
  }
  with_map(a.map, [&](auto map) {
    with_flag(a.inverse, [&](auto inverse) {
      with_flag(r.fixed, [&](auto masked) { affine_runs<map(), inverse(), masked()>(r); });
    });
  });
}

void run(const AffineArgs& a, const BackwardRuns& r) {
  with_map(a.map, [&](auto map) {
    with_flag(a.inverse, [&](auto inverse) {
      with_flag(r.fixed, [&](auto masked) { affine_backward_runs<map(), inverse(), masked()>(r); });
    });
  });
}

// ---- Chunks of at most kChunk elements: elements [first, first + count) of each of `rows` samples

struct Chunk {
  int64_t row, rows, first, count;
  int64_t size() const { return rows * count; }
};

constexpr int64_t kChunk = 1024;

// Whether rows are used where they are. Short ones are gathered, so that they make whole vectors.
DGM_INLINE bool in_place(DType dtype, int64_t stride, const Chunk& c) {
  constexpr int64_t kShort = 64;
  return dtype == DType::Float32 && (c.rows == 1 || stride == c.count || c.count >= kShort);
}

DGM_INLINE void copy_rows(Floats<const float> from, const Chunk& c, Floats<float> to) {
  for (int64_t i = 0; i < c.rows; ++i)
    for (int64_t e = 0; e < c.count; ++e) to.row(i)[e] = from.row(i)[e];
}

// The elements of a chunk as floats: where they are, or a copy. `offset` is where the tensor's rows begin in a sample.
class ChunkReader {
 public:
  Floats<const float> read(const RowsIn& rows, const Chunk& c, int64_t offset = 0) {
    if (!rows.data) return {};
    const int size = element_size(rows.dtype);
    const char* from = static_cast<const char*>(rows.data) + (c.row * rows.stride + c.first - offset) * size;
    const Floats<const float> given = {reinterpret_cast<const float*>(from), rows.stride}, copy = {buffer_, c.count};
    if (in_place(rows.dtype, rows.stride, c)) return given;
    if (rows.dtype == DType::Float32)
      copy_rows(given, c, {buffer_, c.count});
    else
      for (int64_t i = 0; i < c.rows; ++i)
        convert_to_floats(from + i * rows.stride * size, rows.dtype, c.count, buffer_ + i * c.count);
    return copy;
  }

 private:
  alignas(64) float buffer_[kChunk + kWidth];  // a row is written in whole vectors: the next one covers what is behind
};

class ChunkWriter {
 public:
  Floats<float> open(const RowsOut& rows, const Chunk& c, int64_t offset = 0) {
    if (!rows.data) return {};
    rows_ = rows, chunk_ = c;
    to_ = static_cast<char*>(rows.data) + (c.row * rows.stride + c.first - offset) * element_size(rows.dtype);
    if (in_place(rows.dtype, rows.stride, c)) return {reinterpret_cast<float*>(to_), rows.stride};
    return {buffer_, c.count};
  }

  void close() const {
    if (!to_ || in_place(rows_.dtype, rows_.stride, chunk_)) return;
    if (rows_.dtype == DType::Float32)
      return copy_rows({buffer_, chunk_.count}, chunk_, {reinterpret_cast<float*>(to_), rows_.stride});
    for (int64_t i = 0; i < chunk_.rows; ++i)
      convert_from_floats(buffer_ + i * chunk_.count, chunk_.count, rows_.dtype,
                          to_ + i * rows_.stride * element_size(rows_.dtype));
  }

 private:
  alignas(64) float buffer_[kChunk + kWidth];
  RowsOut rows_;
  Chunk chunk_ = {};
  char* to_ = nullptr;
};

// The mask of a chunk.
class MaskReader {
 public:
  const uint8_t* read(const Region& region, const Chunk& c) {
    if (!region.fixed) return nullptr;
    const int64_t place = c.first % region.fixed_period;
    if (c.rows == 1 && place + c.count <= region.fixed_period)
      return region.fixed + c.row * region.fixed_stride + place;
    for (int64_t i = 0; i < c.rows; ++i) {
      const uint8_t* from = region.fixed + (c.row + i) * region.fixed_stride;
      for (int64_t e = 0; e < c.count;) {
        const int64_t at = (c.first + e) % region.fixed_period, left = region.fixed_period - at;
        const int64_t length = left < c.count - e ? left : c.count - e;
        std::memcpy(buffer_ + i * c.count + e, from + at, length);
        e += length;
      }
    }
    return buffer_;
  }

 private:
  uint8_t buffer_[kChunk];
};

// Calls body(chunk) for [begin, end) of every one of the rows.
template <class Body>
DGM_INLINE void for_each_chunk(int64_t row, int64_t rows, int64_t begin, int64_t end, const Body& body) {
  if (begin >= end) return;
  if (rows > 1) return body(Chunk{row, rows, begin, end - begin});
  for (; begin < end; begin += kChunk) body(Chunk{row, 1, begin, end - begin < kChunk ? end - begin : kChunk});
}

// Copies what is outside [start, stop).
DGM_INLINE void copy_chunk(const RowsIn& from, const RowsOut& to, const Chunk& c, ChunkReader& reader,
                           ChunkWriter& writer) {
  const Floats<const float> x = reader.read(from, c);
  copy_rows(x, c, writer.open(to, c));
  writer.close();
}

// Rows that follow each other without gaps are one row.
template <class R, class... Rows>
DGM_INLINE void join_rows(R& runs, const Rows&... rows) {
  if (!((rows.stride == runs.count || !rows.data) && ...)) return;
  runs.count *= runs.rows;
  runs.rows = 1;
}

// Samples that are worked on together: as many as a chunk holds.
DGM_INLINE int64_t samples_together(const AffineArgs& a) { return a.elements ? kChunk / a.elements : 1; }

// What a unit stands for: a part of a sample; or several of them, whole.
struct Piece {
  int64_t row, rows, first, begin, end, last;  // of the elements [first, last) those in [begin, end) are transformed

  Piece(const AffineArgs& a, int64_t together, int64_t unit, int64_t stop) {
    const auto clip = [](int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; };
    row = unit / a.parts;
    rows = together > 1 ? (together < stop - unit ? together : stop - unit) : 1;
    first = unit % a.parts * kPartElements;
    last = clip(first + kPartElements, 0, a.elements);
    begin = clip(a.region.start, first, last);
    end = clip(a.region.stop, begin, last);
  }
};

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::coupling
