// The generator on CPUs: runs a network's instructions row by row and pixel by pixel for some samples of the batch.
#pragma once

#include "common/elementary.h"
#include "common/philox.h"
#include "masked_conv/draw.h"
#include "masked_conv/generate_args.h"
#include "masked_conv/panel.h"

namespace dgm::masked_conv {
namespace DGM_ISA_NAMESPACE {
namespace {

// Positions (pixels of a row times samples) that an instruction works on at once: what they read, packed, should stay
// in the second-level cache beside a panel of weights.
constexpr int64_t kTogether = 4 * kTile;

DGM_INLINE F32 activated(Activation activation, F32 x) {
  switch (activation) {
    case Activation::Relu:
      return at_least(x, 0.0f);
    case Activation::Elu:
      return x < 0.0f ? exponential_minus_one_in_range(at_most(at_least(x, -105.0f), 0.0f)) : x;
    case Activation::Silu:
      return x * logistic(x);
    case Activation::Tanh:
      return hyperbolic_tangent(x);
    case Activation::Sigmoid:
      return logistic(x);
    default:
      return x;
  }
}

class Generator {
 public:
  // For samples [first, first + samples).
  Generator(const GenerateArgs& args, int64_t first, int64_t samples)
      : a_(args),
        first_(first),
        samples_(samples),
        draw_(args, first, samples),
        zeros_(args.most_inputs + kWidth),
        packed_((kTogether / kTile + 1) * (args.most_inputs + kWidth) * kTileRow),
        sources_(args.most_terms),
        spans_(args.most_terms) {}

  void run() {
    for (y_ = 0; y_ < a_.height; ++y_) {
      for (const Instruction& i : a_.instructions)
        if (i.row_phase) run(i, 0, a_.width, 0);
      for (int64_t x = 0; x < a_.width; ++x) {
        draw_.pixel(y_, x);
        const int64_t steps = static_cast<int64_t>(a_.order.size());
        for (int64_t time = 0; time <= steps; ++time) {
          for (const Instruction& i : a_.instructions)
            if (!i.row_phase) run(i, x, 1, time);
          if (time < steps) draw(x, time);
        }
      }
    }
  }

 private:
  // What a term's panels of one time read, and where that is among the packed inputs.
  struct Span {
    bool live;
    int64_t begin, count, offset;
  };

  float* at(const Reference& r, int64_t x, int64_t sample) const {
    return at(a_.nodes[r.node], y_, x, sample) + r.channel;
  }

  float* at(const Node& node, int64_t y, int64_t x, int64_t sample) const {
    const int64_t row = node.rows == 1 ? 0 : y % node.rows;
    const int64_t column = node.columns == 1 ? 0 : x < node.columns ? x : x % node.columns;
    return node.data + row * node.row_stride + column * node.column_stride + (first_ + sample) * node.sample_stride;
  }

  // The channels that a term reads for a position, or null beyond the border.
  const float* source(const Term& term, int64_t x, int64_t sample) const {
    const int64_t y = y_ + term.dy, column = x + term.dx;
    if (y < 0 || column < 0 || column >= a_.width) return nullptr;
    return at(a_.nodes[term.node], y, column, sample) + term.channel;
  }

  void run(const Instruction& i, int64_t x, int64_t columns, int64_t time) {
    const int64_t begin = i.first_panel[time], end = i.first_panel[time + 1], positions = columns * samples_;
    if (begin == end) return;
    find_spans(i, x, columns, begin, end);
    for (int64_t first = 0; first < positions; first += kTogether) {
      const int64_t count = positions - first < kTogether ? positions - first : kTogether;
      const Pieces tiles(count);
      const bool direct = count == 1 && columns == 1;  // of one pixel the inputs lie one after the other as it is
      if (!direct && !i.terms.empty())
        for (int64_t t = 0; t < tiles.number; ++t) pack_tile(i, x, first + tiles.begin(t), tiles.length(t), t);
      for (int64_t p = begin; p < end;) {
        const Panel& panel = i.panels[p];
        if (panel.dots) {
          for (int64_t q = first; q < first + count; ++q) run_dots(i, panel, x + q / samples_, q % samples_);
          ++p;
          continue;
        }
        const int64_t left = panel.together < end - p ? panel.together : end - p;
        const int64_t most = tiles.size >= 4 ? 1 : tiles.size >= 2 ? 2 : 4, together = left >= most ? most : 1;
        for (int64_t t = 0; t < tiles.number; ++t)
          run_tile(i, panel, together, x, first + tiles.begin(t), tiles.length(t), direct ? -1 : t);
        p += together;
      }
    }
  }

  void find_spans(const Instruction& i, int64_t x, int64_t columns, int64_t begin, int64_t end) {
    inputs_ = 0;
    for (size_t t = 0; t < i.terms.size(); ++t) {
      const Term& term = i.terms[t];
      const bool inside = columns > 1 || (x + term.dx >= 0 && x + term.dx < a_.width);
      Span span = {y_ + term.dy >= 0 && inside, 0, 0, inputs_};
      int64_t low = INT64_MAX, high = 0;
      for (int64_t p = begin; p < end; ++p) {
        const Range& range = i.panels[p].ranges[t];
        if (range.count == 0 || i.panels[p].dots) continue;
        low = range.begin < low ? range.begin : low;
        high = range.begin + range.count > high ? range.begin + range.count : high;
      }
      if (high == 0) span.live = false;
      if (span.live) span.begin = low, span.count = high - low;
      inputs_ += span.count;
      spans_[t] = span;
    }
  }

  float* packed(int64_t tile) { return packed_.data() + tile * (inputs_ + kWidth) * kTileRow; }

  // The inputs of positions [first, first + count), those of all positions one after the other for each input.
  [[gnu::noinline]] void pack_tile(const Instruction& i, int64_t x, int64_t first, int64_t count, int64_t tile) {
    const float* from[kTileRow];
    for (size_t t = 0; t < i.terms.size(); ++t) {
      const Span& span = spans_[t];
      if (!span.live) continue;
      for (int64_t m = 0; m < kTileRow; ++m) {
        const int64_t q = first + (m < count ? m : count - 1);
        const float* data = source(i.terms[t], x + q / samples_, q % samples_);
        from[m] = data ? data + span.begin : zeros_.data();
      }
      float* to = packed(tile) + span.offset * kTileRow;
      for (int64_t k = 0; k < span.count; k += kWidth, to += kWidth * kTileRow)
        for (int64_t m = 0; m < count; m += 4) pack_block(from + m, k, span.count - k, to + m);
    }
  }

  // kWidth inputs of four positions; what is written beyond the last input is overwritten or never read.
  static DGM_INLINE_METHOD void pack_block(const float* const* from, int64_t k, int64_t left, float* to) {
    F32 four[4];
    DGM_UNROLL
    for (int j = 0; j < 4; ++j) four[j] = load_first(from[j] + k, left);
    transpose4(four);
    DGM_UNROLL
    for (int lane = 0; lane < kWidth; lane += 4) DGM_UNROLL
    for (int j = 0; j < 4; ++j)
      std::memcpy(to + (lane + j) * kTileRow, reinterpret_cast<const float*>(&four[j]) + lane, 4 * sizeof(float));
  }

  void run_tile(const Instruction& i, const Panel& panel, int64_t together, int64_t x, int64_t first, int64_t count,
                int64_t tile) {
    int64_t number = 0;
    for (size_t t = 0; t < i.terms.size(); ++t) {
      const Span& span = spans_[t];
      const Range& range = panel.ranges[t];
      if (!span.live || range.count == 0) continue;
      const float* weights = a_.packed + range.weights;
      if (tile < 0) {
        const float* data = source(i.terms[t], x + first / samples_, first % samples_);
        sources_[number++] = {data + range.begin, 1, range.count, weights, panel.size};
      } else {
        const float* data = packed(tile) + (span.offset + range.begin - span.begin) * kTileRow;
        sources_[number++] = {data, kTileRow, range.count, weights, panel.size};
      }
    }
    with_positions(count, [&](auto positions) {
      constexpr int n = positions();
      if constexpr (n == 1) {
        if (together == 4) return run_panels<n, 4>(i, &panel, number, x, first);
      }
      if constexpr (n == 2 || n == 3) {
        if (together == 2) return run_panels<n, 2>(i, &panel, number, x, first);
      }
      for (int64_t p = 0; p < together; ++p) {
        run_panels<n, 1>(i, &panel + p, number, x, first);
        for (int64_t s = 0; s < number; ++s) sources_[s].weights += panel.size;
      }
    });
  }

  template <int kPositions, int kPanels>
  [[gnu::noinline]] void run_panels(const Instruction& i, const Panel* panels, int64_t number, int64_t x,
                                    int64_t first) {
    Sums<kPositions, kPanels> sums = {};
    accumulate(sources_.data(), number, sums);
    for (int p = 0; p < kPanels; ++p) {
      const F32 b0 = load(a_.packed + panels[p].bias), b1 = load(a_.packed + panels[p].bias + kWidth);
      for (int m = 0; m < kPositions; ++m) {
        const int64_t q = first + m;
        sums.v[p][m][0] += b0, sums.v[p][m][1] += b1;
        finish(i, panels[p], sums.v[p][m], x + q / samples_, q % samples_);
      }
    }
  }

  // From the sums of a position to its results.
  DGM_INLINE_METHOD void finish(const Instruction& i, const Panel& panel, F32 (&sums)[2], int64_t x, int64_t sample) {
    if (i.activation == Activation::Gate) {
      for (const Reference& add : i.adds) {
        const float* from = at(add, x, sample) + panel.sums;
        sums[0] += add.scale * load_first(from, panel.count);
        sums[1] += add.scale * load_first(from + i.gate_width(), panel.count);
      }
      write(i, panel.first, panel.count, hyperbolic_tangent(sums[0]) * logistic(sums[1]), x, sample);
      return;
    }
    for (int64_t half = 0, done = 0; half < 2 && done < panel.count; ++half, done += kWidth) {
      const int64_t count = panel.count - done;
      for (const Reference& add : i.adds)
        sums[half] += add.scale * load_first(at(add, x, sample) + panel.first + done, count);
      write(i, panel.first + done, count, activated(i.activation, sums[half]), x, sample);
    }
  }

  DGM_INLINE_METHOD void write(const Instruction& i, int64_t result, int64_t count, F32 value, int64_t x,
                               int64_t sample) {
    if (i.factor.node >= 0) value *= load_first(at(i.factor, x, sample) + result, count);
    for (const Reference& residual : i.residuals)
      value += residual.scale * load_first(at(residual, x, sample) + result, count);
    store_first(at(i.out, x, sample) + result, value, count);
  }

  // Few results: the products of inputs and weights side by side, then their sum.
  void run_dots(const Instruction& i, const Panel& panel, int64_t x, int64_t sample) {
    alignas(64) float values[kWidth] = {};
    for (int64_t o = 0; o < panel.count; ++o) {
      F32 products = {};
      for (size_t t = 0; t < i.terms.size(); ++t) {
        const Range& range = panel.ranges[t];
        const float* data = range.count ? source(i.terms[t], x, sample) : nullptr;
        if (!data) continue;
        const int64_t row = (range.count + 15) / 16 * 16;
        const float* weights = a_.packed + range.weights + o * row;
        for (int64_t k = 0; k < range.count; k += kWidth)
          products += load_first(data + range.begin + k, range.count - k) * load(weights + k);
      }
      values[o] = a_.packed[panel.bias + o] + static_cast<float>(sum(products));
    }
    F32 sums[2] = {load(values), F32{}};
    finish(i, panel, sums, x, sample);
  }

  void draw(int64_t x, int64_t step) {
    const Node* input = nullptr;
    for (const Node& node : a_.nodes)
      if (node.kind == NodeKind::Input) input = &node;
    for (int64_t s = 0; s < samples_; ++s)
      draw_.step(s, step, at(a_.output, x, s), input ? at(*input, y_, x, s) : nullptr);
  }

  const GenerateArgs& a_;
  int64_t first_, samples_, y_ = 0, inputs_ = 0;
  Draw draw_;
  Array<float> zeros_, packed_;
  Array<Source> sources_;
  Array<Span> spans_;
};

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::masked_conv
