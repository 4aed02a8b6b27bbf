// CPU loops of the sampler op on blocks of 4 vectors; built once per instruction set, without torch headers.
#include "sampler/cpu.h"

#include "sampler/math.h"

namespace dgm::sampler {
namespace DGM_ISA_NAMESPACE {

namespace {

// Draws the noise of one sample, kBlock elements at a time.
class Source {
 public:
  Source() = default;
  Source(const NoiseArgs& noise, int64_t row, int64_t step) : noise_(&noise) {
    if (noise.drawn) sample_ = philox_sample(noise, row, step);
    // Lane l works out counter (l % 4) * kWidth / 4 + l / 4 of the block: after transpose4 the elements are in order.
    for (int lane = 0; lane < kWidth; ++lane)
      (lane % 2 ? odd_ : even_)[lane / 2] = (lane % 4) * (kWidth / 4) + lane / 4;
  }

  DGM_INLINE_METHOD void words(int64_t element, U32 (&w)[4]) const {
    const uint32_t first = static_cast<uint32_t>(element / 4);
    U64 even[4], odd[4];
    philox(even_ + first, sample_, even);
    philox(odd_ + first, sample_, odd);
    for (int i = 0; i < 4; ++i) w[i] = zip_lower_halves(even[i], odd[i]);
  }

  DGM_INLINE_METHOD void normals(int64_t element, F32 (&v)[4]) const {
    U32 w[4];
    words(element, w);
    box_muller(w[0], w[1], v[0], v[1]);
    box_muller(w[2], w[3], v[2], v[3]);
    transpose4(v);
  }

  // `index` is that of the element in the whole tensor.
  DGM_INLINE_METHOD void get(int64_t element, int64_t index, int64_t count, F32 (&v)[4]) const {
    if (noise_->drawn)
      normals(element, v);
    else
      load_block(noise_->given, index, count, v);
  }

 private:
  const NoiseArgs* noise_ = nullptr;
  PhiloxSample sample_ = {};
  U64 even_ = {}, odd_ = {};
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

struct StepParts {
  bool noise, history, unconditional, known, threshold, x0;
};

// kPlain: only x, model output and, with kNoise, noise; the common case without a test per operand.
template <bool kPlain, bool kNoise>
DGM_INLINE void step_part(const StepArgs& a, const StepRow& r, const Source& source, const StepParts& parts, float bound,
                          int64_t offset, int64_t first, int64_t stop) {
  for (int64_t e = first; e < stop; e += kBlock) {
    const int64_t count = stop - e, index = offset + e;
    F32 x[4], m[4], x0[4], next[4], v[4], w[4];
    load_block(a.x, index, count, x);
    load_block(a.model_output, index, count, m);
    if (!kPlain && parts.unconditional) {
      load_block(a.unconditional, index, count, v);
      for (int i = 0; i < 4; ++i) m[i] = guided(m[i], v[i], a.guidance_scale);
    }
    for (int i = 0; i < 4; ++i) {
      x0[i] = !kPlain && parts.threshold ? clean_sample(r, x[i], m[i], bound) : clean_sample(r, x[i], m[i]);
      next[i] = affine(r, x[i], x0[i], m[i]);
    }
    if (!kPlain && parts.history) {
      load_block(a.history, index, count, v);
      for (int i = 0; i < 4; ++i) next[i] += r.ah * v[i];
    }
    F32 noise[4] = {};
    if (kNoise) {
      source.get(e, index, count, noise);
      for (int i = 0; i < 4; ++i) next[i] += r.an * noise[i];
    }
    if (!kPlain && parts.known) {
      load_block(a.known, index, count, v);
      load_block(a.mask, index, count, w);
      for (int i = 0; i < 4; ++i) next[i] = inpainted(r, next[i], v[i], w[i], noise[i]);
    }
    store_block(a.out, index, count, next);
    if (!kPlain && parts.x0) store_block(a.x0, index, count, x0);
  }
}

}  // namespace

int64_t units_per_sample(int64_t elements) { return (elements + kBlock - 1) / kBlock; }

void noise_like(const NoiseLikeArgs& a, int64_t begin, int64_t end) {
  for_each_part(a.shape, kBlock, begin, end, [&](int64_t sample, int64_t first, int64_t stop) {
    const Source source(a.noise, sample, 0);
    for (int64_t e = first; e < stop; e += kBlock) {
      F32 v[4];
      if (a.kind == NoiseKind::Normal) {
        source.normals(e, v);
      } else {
        U32 words[4];
        source.words(e, words);
        for (int i = 0; i < 4; ++i) v[i] = a.kind == NoiseKind::Bits ? bit_cast<F32>(words[i]) : uniform(words[i]);
        transpose4(v);
      }
      store_block(a.out, sample * a.shape.elements + e, stop - e, v);
    }
  });
}

void step(const StepArgs& a, int64_t begin, int64_t end) {
  for_each_part(a.shape, kBlock, begin, end, [&](int64_t sample, int64_t first, int64_t stop) {
    const StepRow& r = row_of<StepRow>(a.rows, sample);
    const bool any_noise = a.noise.drawn || a.noise.given.data;
    const StepParts parts = {any_noise && (r.an != 0.0f || (a.known.data && r.sk != 0.0f)),
                             a.history.data && r.ah != 0.0f,
                             a.unconditional.data != nullptr,
                             a.known.data != nullptr,
                             a.threshold != nullptr,
                             a.x0.data != nullptr};
    const float bound = parts.threshold ? a.threshold[sample] : 0.0f;
    const int64_t offset = sample * a.shape.elements;
    const Source source = parts.noise ? Source(a.noise, sample, row_index(a.rows, sample)) : Source();
    const bool plain = !(parts.history || parts.unconditional || parts.known || parts.threshold || parts.x0);
    if (plain && parts.noise)
      step_part<true, true>(a, r, source, parts, bound, offset, first, stop);
    else if (plain)
      step_part<true, false>(a, r, source, parts, bound, offset, first, stop);
    else if (parts.noise)
      step_part<false, true>(a, r, source, parts, bound, offset, first, stop);
    else
      step_part<false, false>(a, r, source, parts, bound, offset, first, stop);
  });
}

void add_noise(const AddNoiseArgs& a, int64_t begin, int64_t end) {
  for_each_part(a.shape, kBlock, begin, end, [&](int64_t sample, int64_t first, int64_t stop) {
    const TrainingRow& r = row_of<TrainingRow>(a.rows, sample);
    const Source source(a.noise, sample, 0);
    for (int64_t e = first; e < stop; e += kBlock) {
      const int64_t count = stop - e, index = sample * a.shape.elements + e;
      F32 x0[4], noise[4];
      load_block(a.x0, index, count, x0);
      source.get(e, index, count, noise);
      for (int i = 0; i < 4; ++i) x0[i] = noised(r, x0[i], noise[i]);
      store_block(a.out, index, count, x0);
    }
  });
}

// Sets the lanes beyond `count` to zero: a short block must not add to the sum.
DGM_INLINE void keep_first(int64_t count, F32 (&v)[4]) {
  for (int64_t i = count; i < kBlock; ++i) v[i / kWidth][i % kWidth] = 0.0f;
}

void denoising_loss(const LossArgs& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t sample = unit / a.parts, first = unit % a.parts * kLossPart;
    const int64_t stop = first + kLossPart < a.shape.elements ? first + kLossPart : a.shape.elements;
    const TrainingRow& r = row_of<TrainingRow>(a.rows, sample);
    const Source source(a.noise, sample, 0);
    F32 squares[4] = {};
    for (int64_t e = first; e < stop; e += kBlock) {
      const int64_t count = stop - e, index = sample * a.shape.elements + e;
      F32 m[4], x0[4], noise[4];
      load_block(a.model_output, index, count, m);
      load_block(a.x0, index, count, x0);
      source.get(e, index, count, noise);
      for (int i = 0; i < 4; ++i) m[i] = residual(r, m[i], x0[i], noise[i]);
      if (a.residual.data) store_block(a.residual, index, count, m);
      keep_first(count, m);
      for (int i = 0; i < 4; ++i) squares[i] += m[i] * m[i];
    }
    a.partials[unit] = (sum(squares[0]) + sum(squares[1])) + (sum(squares[2]) + sum(squares[3]));
  }
}

}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::sampler
