// CPU loops of the sampler op on blocks of 4 vectors; built once per instruction set, without torch headers.
#include "sampler/cpu.h"

#include "sampler/math.h"

namespace dgm::sampler {
namespace DGM_ISA_NAMESPACE {

namespace {

// Lane l works out counter (l % 4) * kWidth / 4 + l / 4 of its group: after transpose4 the elements are in order. The
// even lanes and the odd ones are two vectors of 64-bit lanes, as the multiply wants them.
struct LaneCounters {
  U64 even, odd;
  LaneCounters() {
    for (int lane = 0; lane < kWidth; ++lane) (lane % 2 ? odd : even)[lane / 2] = (lane % 4) * (kWidth / 4) + lane / 4;
  }
};

// w.v[j][g]: word j of the counters of group g.
struct Words {
  U32 v[4][kGroups];
};

DGM_INLINE Words block_words(const PhiloxSample& sample, const LaneCounters& lanes, int64_t element) {
  Pack<U64, 2 * kGroups> counter, word[4];
  for (int g = 0; g < kGroups; ++g) {
    const uint32_t first = static_cast<uint32_t>(element / 4) + g * kWidth;
    counter.v[2 * g] = lanes.even + first;
    counter.v[2 * g + 1] = lanes.odd + first;
  }
  philox(counter, sample, word);
  Words w;
  for (int j = 0; j < 4; ++j)
    for (int g = 0; g < kGroups; ++g) w.v[j][g] = zip_lower_halves(word[j].v[2 * g], word[j].v[2 * g + 1]);
  return w;
}

DGM_INLINE void store_in_order(F32 a, F32 b, F32 c, F32 d, float* to) {
  F32 v[4] = {a, b, c, d};
  transpose4(v);
  for (int i = 0; i < 4; ++i) store(to + i * kWidth, v[i]);
}

// Not inlined: with its 32 registers to itself the compiler keeps all the chains in them.
DGM_NOINLINE void normal_block(const PhiloxSample& sample, const LaneCounters& lanes, int64_t element, float* to) {
  const Words w = block_words(sample, lanes, element);
  Pack<U32, 2 * kGroups> radius, angle;
  for (int g = 0; g < kGroups; ++g) {
    radius.v[2 * g] = w.v[0][g];
    angle.v[2 * g] = w.v[1][g];
    radius.v[2 * g + 1] = w.v[2][g];
    angle.v[2 * g + 1] = w.v[3][g];
  }
  Pack<F32, 2 * kGroups> cosine, sine;
  box_muller(radius, angle, cosine, sine);
  DGM_UNROLL
  for (int g = 0; g < kGroups; ++g)
    store_in_order(cosine.v[2 * g], sine.v[2 * g], cosine.v[2 * g + 1], sine.v[2 * g + 1], to + 4 * g * kWidth);
}

DGM_NOINLINE void word_block(const PhiloxSample& sample, const LaneCounters& lanes, int64_t element, bool bits,
                             float* to) {
  const Words w = block_words(sample, lanes, element);
  for (int g = 0; g < kGroups; ++g) {
    F32 v[4];
    for (int j = 0; j < 4; ++j) v[j] = bits ? bit_cast<F32>(w.v[j][g]) : uniform(w.v[j][g]);
    store_in_order(v[0], v[1], v[2], v[3], to + 4 * g * kWidth);
  }
}

// The noise of one sample, kBlock elements at a time: drawn, or read from a tensor.
class Source {
 public:
  Source(const NoiseArgs& noise, int64_t row, int64_t step) : noise_(noise) {
    if (noise.drawn) sample_ = philox_sample(noise, row, step);
  }

  // `element` counts within the sample, `index` from the start of the tensor.
  const float* block(int64_t element, int64_t index, int64_t left) {
    if (noise_.drawn) {
      normal_block(sample_, lanes_, element, buffer_);
    } else {
      for (int i = 0; i < kVectors && left > 0; ++i, left -= kWidth, index += kWidth)
        store(buffer_ + i * kWidth, load_some(noise_.given, index, left));
    }
    return buffer_;
  }

  const float* words(int64_t element, bool bits) {
    word_block(sample_, lanes_, element, bits, buffer_);
    return buffer_;
  }

 private:
  const NoiseArgs& noise_;
  const LaneCounters lanes_;
  PhiloxSample sample_ = {};
  alignas(64) float buffer_[kBlock];
};

DGM_INLINE int64_t row_index(const Rows& rows, int64_t sample) {
  return rows.index_tensor ? rows.index_tensor[sample * rows.index_stride] : rows.index;
}

template <class Row>
DGM_INLINE const Row& row_of(const Rows& rows, int64_t sample) {
  return reinterpret_cast<const Row*>(rows.data)[row_index(rows, sample)];
}

// Calls body(sample, first element, one past the last element) for the parts of samples that the units cover.
template <class Body>
DGM_INLINE void for_each_part(const Shape& shape, int64_t unit_elements, int64_t begin, int64_t end, const Body& body) {
  const int64_t units = (shape.elements + unit_elements - 1) / unit_elements;
  while (begin < end) {
    const int64_t sample = begin / units, unit = begin % units;
    const int64_t last = end - begin < units - unit ? unit + end - begin : units;
    const int64_t stop = last * unit_elements;
    body(sample, unit * unit_elements, stop < shape.elements ? stop : shape.elements);
    begin += last - unit;
  }
}

// Calls body(i, index, left) for every vector of the block that starts at `index` and has `left` elements before the
// end.
template <class Body>
DGM_INLINE void for_each_vector(int64_t index, int64_t left, const Body& body) {
  for (int i = 0; i < kVectors && left > 0; ++i, index += kWidth, left -= kWidth) body(i, index, left);
}

struct StepParts {
  bool noise, history, unconditional, known, threshold, x0;
  bool plain;  // x, model output, noise and result in float32, and nothing else
};

StepParts step_parts(const StepArgs& a, const StepRow& r) {
  const auto is_float = [](DType dtype) { return dtype == DType::Float32; };
  const bool any_noise = a.noise.drawn || a.noise.given.data;
  StepParts p;
  p.noise = any_noise && (r.an != 0.0f || (a.known.data && r.sk != 0.0f));
  p.history = a.history.data && r.ah != 0.0f;
  p.unconditional = a.unconditional.data;
  p.known = a.known.data;
  p.threshold = a.threshold;
  p.x0 = a.x0.data;
  p.plain = !(p.history || p.unconditional || p.known || p.threshold || p.x0) && is_float(a.x.dtype) &&
            is_float(a.model_output.dtype) && is_float(a.out.dtype);
  return p;
}

// Any mix of operands and dtypes, and the end of a sample.
DGM_NOINLINE void step_block(const StepArgs& a, const StepRow& r, const StepParts& p, float bound, int64_t index,
                             int64_t left, const float* noise) {
  for_each_vector(index, left, [&](int i, int64_t at, int64_t rest) {
    const F32 n = p.noise ? load(noise + i * kWidth) : F32{};
    const F32 x = load_some(a.x, at, rest);
    F32 m = load_some(a.model_output, at, rest);
    if (p.unconditional) m = guided(m, load_some(a.unconditional, at, rest), a.guidance_scale);
    const F32 x0 = p.threshold ? clean_sample(r, x, m, bound) : clean_sample(r, x, m);
    F32 next = affine(r, x, x0, m);
    if (p.history) next += r.ah * load_some(a.history, at, rest);
    if (p.noise) next += r.an * n;
    if (p.known) next = inpainted(r, next, load_some(a.known, at, rest), load_some(a.mask, at, rest), n);
    store_some(a.out, at, rest, next);
    if (p.x0) store_some(a.x0, at, rest, x0);
  });
}

// The common case without a test per operand.
template <bool kNoise>
DGM_INLINE void plain_step_block(const StepArgs& a, const StepRow& r, int64_t index, const float* noise) {
  const float* x_data = static_cast<const float*>(a.x.data) + index;
  const float* m_data = static_cast<const float*>(a.model_output.data) + index;
  float* out = static_cast<float*>(a.out.data) + index;
  for (int i = 0; i < kVectors; ++i) {
    const F32 x = load(x_data + i * kWidth), m = load(m_data + i * kWidth);
    F32 next = affine(r, x, clean_sample(r, x, m), m);
    if (kNoise) next += r.an * load(noise + i * kWidth);
    store(out + i * kWidth, next);
  }
}

template <bool kNoise>
DGM_INLINE void step_part(const StepArgs& a, const StepRow& r, const StepParts& parts, int64_t sample, int64_t first,
                          int64_t stop) {
  Source source(a.noise, sample, row_index(a.rows, sample));
  const float bound = parts.threshold ? a.threshold[sample] : 0.0f;
  const StepRow row = r;  // a copy that no store can alias
  for (int64_t e = first; e < stop; e += kBlock) {
    const int64_t index = sample * a.shape.elements + e, left = stop - e;
    const float* noise = nullptr;
    if (kNoise) {
      prefetch_block(a.x, index + kBlock);
      prefetch_block(a.model_output, index + kBlock);
      noise = source.block(e, index, left);
    }
    if (parts.plain && left >= kBlock)
      plain_step_block<kNoise>(a, row, index, noise);
    else
      step_block(a, row, parts, bound, index, left, noise);
  }
}

}  // namespace

int64_t units_per_sample(int64_t elements) { return (elements + kBlock - 1) / kBlock; }

void noise_like(const NoiseLikeArgs& a, int64_t begin, int64_t end) {
  for_each_part(a.shape, kBlock, begin, end, [&](int64_t sample, int64_t first, int64_t stop) {
    Source source(a.noise, sample, 0);
    for (int64_t e = first; e < stop; e += kBlock) {
      const int64_t index = sample * a.shape.elements + e;
      const bool normal = a.kind == NoiseKind::Normal;
      const float* noise = normal ? source.block(e, index, stop - e) : source.words(e, a.kind == NoiseKind::Bits);
      for_each_vector(index, stop - e,
                      [&](int i, int64_t at, int64_t left) { store_some(a.out, at, left, load(noise + i * kWidth)); });
    }
  });
}

void step(const StepArgs& a, int64_t begin, int64_t end) {
  for_each_part(a.shape, kBlock, begin, end, [&](int64_t sample, int64_t first, int64_t stop) {
    const StepRow& r = row_of<StepRow>(a.rows, sample);
    const StepParts parts = step_parts(a, r);
    if (parts.noise)
      step_part<true>(a, r, parts, sample, first, stop);
    else
      step_part<false>(a, r, parts, sample, first, stop);
  });
}

void add_noise(const AddNoiseArgs& a, int64_t begin, int64_t end) {
  for_each_part(a.shape, kBlock, begin, end, [&](int64_t sample, int64_t first, int64_t stop) {
    const TrainingRow r = row_of<TrainingRow>(a.rows, sample);
    Source source(a.noise, sample, 0);
    for (int64_t e = first; e < stop; e += kBlock) {
      const int64_t index = sample * a.shape.elements + e;
      prefetch_block(a.x0, index + kBlock);
      const float* noise = source.block(e, index, stop - e);
      for_each_vector(index, stop - e, [&](int i, int64_t at, int64_t left) {
        store_some(a.out, at, left, noised(r, load_some(a.x0, at, left), load(noise + i * kWidth)));
      });
    }
  });
}

// Zero beyond the first `left` lanes: the end of a sample must not add to the sum.
DGM_INLINE F32 keep_first(int64_t left, F32 x) {
  if (__builtin_expect(left < kWidth, 0))
    for (int64_t lane = left; lane < kWidth; ++lane) x[lane] = 0.0f;
  return x;
}

void denoising_loss(const LossArgs& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t sample = unit / a.parts, first = unit % a.parts * kLossPart;
    const int64_t stop = first + kLossPart < a.shape.elements ? first + kLossPart : a.shape.elements;
    const TrainingRow r = row_of<TrainingRow>(a.rows, sample);
    Source source(a.noise, sample, 0);
    F32 squares[4] = {};
    for (int64_t e = first; e < stop; e += kBlock) {
      const int64_t index = sample * a.shape.elements + e;
      prefetch_block(a.model_output, index + kBlock);
      prefetch_block(a.x0, index + kBlock);
      const float* noise = source.block(e, index, stop - e);
      for_each_vector(index, stop - e, [&](int i, int64_t at, int64_t left) {
        const F32 m = load_some(a.model_output, at, left), x0 = load_some(a.x0, at, left);
        const F32 difference = residual(r, m, x0, load(noise + i * kWidth));
        if (a.residual.data) store_some(a.residual, at, left, difference);
        squares[i % 4] += keep_first(left, difference * difference);
      });
    }
    a.partials[unit] = (sum(squares[0]) + sum(squares[1])) + (sum(squares[2]) + sum(squares[3]));
  }
}

}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::sampler
