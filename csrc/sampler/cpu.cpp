// CPU loops of the sampler op on blocks of kVectors vectors; built once per instruction set, without torch headers.
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
    for (int lane = 0; lane < kWidth; ++lane) {
      U64& half = lane % 2 ? odd : even;
      half[lane / 2] = (lane % 4) * (kWidth / 4) + lane / 4;
    }
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

// The noise of one sample, a block at a time: drawn, or read from a tensor.
class Source {
 public:
  Source(const NoiseArgs& noise, int64_t row, int64_t step) : noise_(noise) {
    if (noise.drawn) sample_ = philox_sample(noise, row, step);
  }

  // `element` counts within the sample, `index` from the start of the tensor.
  const float* block(int64_t element, int64_t index, int64_t left) {
    if (!noise_.drawn) return reader_.block(noise_.given, index, left);
    normal_block(sample_, lanes_, element, buffer_);
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
  Reader reader_;
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

// Which of noise and history a row reads: where its coefficient is 0 it may hold anything.
struct StepParts {
  bool noise, history;
};

DGM_INLINE StepParts step_parts(const StepArgs& a, const StepRow& r) {
  const bool any_noise = a.noise.drawn || a.noise.given.data;
  return {any_noise && (r.an != 0.0f || (a.known.data && r.sk != 0.0f)), a.history.data && r.ah != 0.0f};
}

// The common step, without a test per vector.
DGM_INLINE void plain_step(const StepRow r, int count, const float* x, const float* m, float* out) {
  for (int i = 0; i < count * kWidth; i += kWidth) {
    const F32 state = load(x + i), output = load(m + i);
    store(out + i, affine(r, state, clean_sample(r, state, output), output));
  }
}

DGM_INLINE void plain_step(const StepRow r, int count, const float* x, const float* m, const float* noise, float* out) {
  for (int i = 0; i < count * kWidth; i += kWidth) {
    const F32 state = load(x + i), output = load(m + i);
    store(out + i, affine(r, state, clean_sample(r, state, output), output) + r.an * load(noise + i));
  }
}

// Every operand of a step, a block at a time; null where there is none.
struct StepBlock {
  const float *x, *m, *noise, *unconditional, *history, *known, *mask;
  float *out, *x0;
};

DGM_NOINLINE void full_step(const StepRow r, int count, float scale, const float* bound, const StepBlock& b) {
  for (int i = 0; i < count * kWidth; i += kWidth) {
    const F32 x = load(b.x + i), n = b.noise ? load(b.noise + i) : F32{};
    F32 m = load(b.m + i);
    if (b.unconditional) m = guided(m, load(b.unconditional + i), scale);
    const F32 x0 = bound ? clean_sample(r, x, m, *bound) : clean_sample(r, x, m);
    F32 next = affine(r, x, x0, m);
    if (b.history) next += r.ah * load(b.history + i);
    if (r.an != 0.0f) next += r.an * n;
    if (b.known) next = inpainted(r, next, load(b.known + i), load(b.mask + i), n);
    store(b.out + i, next);
    if (b.x0) store(b.x0 + i, x0);
  }
}

// Reads, computes and writes the blocks of one sample.
class Stepper {
 public:
  Stepper(const StepArgs& args, int64_t sample)
      : a_(args),
        row_(row_of<StepRow>(args.rows, sample)),
        parts_(step_parts(args, row_)),
        bound_(args.threshold ? args.threshold + sample : nullptr),
        plain_(!(parts_.history || args.unconditional.data || args.known.data || bound_ || args.x0.data)),
        source_(args.noise, sample, row_index(args.rows, sample)) {}

  DGM_INLINE_METHOD void block(int64_t element, int64_t index, int64_t left) {
    const int count = vectors(left);
    const float* x = readers_[0].block(a_.x, index, left);
    const float* m = readers_[1].block(a_.model_output, index, left);
    const float* noise = parts_.noise ? source_.block(element, index, left) : nullptr;
    float* out = out_.block(a_.out, index, left);
    if (!plain_)
      optional_parts(count, index, left, x, m, noise, out);
    else if (noise)
      plain_step(row_, count, x, m, noise, out);
    else
      plain_step(row_, count, x, m, out);
    out_.finish();
  }

 private:
  void optional_parts(int count, int64_t index, int64_t left, const float* x, const float* m, const float* noise,
                      float* out) {
    const auto read = [&](int reader, bool wanted, const Operand& operand) {
      return wanted ? readers_[reader].block(operand, index, left) : nullptr;
    };
    StepBlock b = {x, m, noise, nullptr, nullptr, nullptr, nullptr, out, nullptr};
    b.unconditional = read(2, a_.unconditional.data, a_.unconditional);
    b.history = read(3, parts_.history, a_.history);
    b.known = read(4, a_.known.data, a_.known);
    b.mask = read(5, a_.known.data, a_.mask);
    if (a_.x0.data) b.x0 = x0_.block(a_.x0, index, left);
    full_step(row_, count, a_.guidance_scale, bound_, b);
    if (a_.x0.data) x0_.finish();
  }

  const StepArgs& a_;
  const StepRow row_;
  const StepParts parts_;
  const float* const bound_;
  const bool plain_;
  Source source_;
  Reader readers_[6];
  Writer out_, x0_;
};

}  // namespace

int64_t block_elements() { return kBlock; }

void noise_like(const NoiseLikeArgs& a, int64_t begin, int64_t end) {
  for_each_part(a.shape, kBlock, begin, end, [&](int64_t sample, int64_t first, int64_t stop) {
    Source source(a.noise, sample, 0);
    const bool normal = a.kind == NoiseKind::Normal, bits = a.kind == NoiseKind::Bits;
    for (int64_t e = first; e < stop; e += kBlock) {
      const int64_t left = stop - e;
      char* to = static_cast<char*>(a.out.data) + (sample * a.shape.elements + e) * element_size(a.out.dtype);
      const float* noise = normal ? source.block(e, 0, left) : source.words(e, bits);
      convert_from_floats(noise, left < kBlock ? left : kBlock, a.out.dtype, to);
    }
  });
}

void step(const StepArgs& a, int64_t begin, int64_t end) {
  for_each_part(a.shape, kBlock, begin, end, [&](int64_t sample, int64_t first, int64_t stop) {
    Stepper stepper(a, sample);
    for (int64_t e = first; e < stop; e += kBlock) stepper.block(e, sample * a.shape.elements + e, stop - e);
  });
}

void add_noise(const AddNoiseArgs& a, int64_t begin, int64_t end) {
  for_each_part(a.shape, kBlock, begin, end, [&](int64_t sample, int64_t first, int64_t stop) {
    const TrainingRow r = row_of<TrainingRow>(a.rows, sample);
    Source source(a.noise, sample, 0);
    Reader reader;
    Writer writer;
    for (int64_t e = first; e < stop; e += kBlock) {
      const int64_t index = sample * a.shape.elements + e, left = stop - e;
      const float* x0 = reader.block(a.x0, index, left);
      const float* noise = source.block(e, index, left);
      float* out = writer.block(a.out, index, left);
      for (int i = 0; i < vectors(left) * kWidth; i += kWidth) store(out + i, noised(r, load(x0 + i), load(noise + i)));
      writer.finish();
    }
  });
}

// Writes m - target of a block to `to` and adds its squares up: in four sums, each of which waits for itself only.
DGM_INLINE void residual_block(const TrainingRow r, int64_t left, const float* m, const float* x0, const float* noise,
                               float* to, F32 (&squares)[4]) {
  const auto vector = [&](int i, F32& sum, int64_t rest) {
    const F32 difference = residual(r, load(m + i), load(x0 + i), load(noise + i));
    store(to + i, difference);
    sum += keep_first(rest, difference * difference);
  };
  if (__builtin_expect(left >= kBlock, 1)) {
    for (int i = 0; i < kVectors; i += 4)
      for (int j = 0; j < 4; ++j) vector((i + j) * kWidth, squares[j], kWidth);
  } else {
    for (int i = 0; i < vectors(left); ++i) vector(i * kWidth, squares[i % 4], left - i * kWidth);
  }
}

void denoising_loss(const LossArgs& a, int64_t begin, int64_t end) {
  Reader m_reader, x0_reader;
  Writer writer;
  alignas(64) float unwanted[kBlock];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t sample = unit / a.parts, first = unit % a.parts * kLossPart;
    const int64_t stop = first + kLossPart < a.shape.elements ? first + kLossPart : a.shape.elements;
    const TrainingRow r = row_of<TrainingRow>(a.rows, sample);
    Source source(a.noise, sample, 0);
    F32 squares[4] = {};
    for (int64_t e = first; e < stop; e += kBlock) {
      const int64_t index = sample * a.shape.elements + e, left = stop - e;
      const float* m = m_reader.block(a.model_output, index, left);
      const float* x0 = x0_reader.block(a.x0, index, left);
      const float* noise = source.block(e, index, left);
      float* to = a.residual.data ? writer.block(a.residual, index, left) : unwanted;
      residual_block(r, left, m, x0, noise, to, squares);
      if (a.residual.data) writer.finish();
    }
    a.partials[unit] = (sum(squares[0]) + sum(squares[1])) + (sum(squares[2]) + sum(squares[3]));
  }
}

}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::sampler
