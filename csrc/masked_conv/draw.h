// Draws the channels of a pixel from what the network says of it.
#pragma once

#include <cmath>

#include "common/elementary.h"
#include "common/philox.h"
#include "masked_conv/generate_args.h"
#include "masked_conv/panel.h"
#include "masked_conv/pixel_args.h"

namespace dgm::masked_conv {
namespace DGM_ISA_NAMESPACE {

namespace {

// The entry whose part of (0, 1] `uniform` falls into; `sums` has room for one number an entry.
DGM_INLINE int64_t draw_categorical(const float* logits, int64_t levels, float uniform, double* sums) {
  float most = logits[0];
  for (int64_t v = 1; v < levels; ++v) most = logits[v] > most ? logits[v] : most;
  double total = 0.0;
  for (int64_t v = 0; v < levels; v += kWidth) {
    const int64_t left = levels - v;
    const F32 weights = exponential_in_range(at_least(load_first(logits + v, left) - most, -105.0f));
    for (int64_t i = 0; i < kWidth && i < left; ++i) sums[v + i] = total += static_cast<double>(weights[i]);
  }
  const float bound = uniform * static_cast<float>(total);
  int64_t low = 0, high = levels - 1;  // the sums rise: the first that reaches the bound
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (static_cast<float>(sums[middle]) < bound)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

class Draw {
 public:
  Draw(const GenerateArgs& args, int64_t first, int64_t samples)
      : a_(args),
        first_(first),
        samples_(samples),
        groups_((args.channels + (args.kind == OutputKind::LogisticMixture) + 3) / 4),
        mixtures_((args.nodes[args.output.node].channels - args.output.channel) / (args.channels == 3 ? 10 : 3)),
        keys_(samples),
        uniforms_(samples * groups_ * 4),
        sums_(mixtures_ > args.levels ? mixtures_ : args.levels) {
    for (int64_t s = 0; s < samples; ++s) keys_[s] = philox_sample(args.noise, first + s, 0);
  }

  // Noise of the pixel's channels.
  void pixel(int64_t y, int64_t x) {
    pixel_ = y * a_.width + x;
    for (int64_t s = 0; s < samples_; ++s)
      for (int64_t group = 0; group < groups_; ++group) {
        U64 words[4];
        philox(U64{} + static_cast<uint64_t>(pixel_ * groups_ + group), keys_[s], words);
        for (int j = 0; j < 4; ++j)
          uniforms_[(s * groups_ + group) * 4 + j] =
              static_cast<float>(static_cast<uint32_t>(words[j][0])) * 0x1p-32f + 0x1p-33f;
      }
  }

  // Draws channel order[step] of a sample (a mixture: all channels), and lets the network's input have it.
  void step(int64_t sample, int64_t step, const float* output, float* input) {
    const float* uniform = uniforms_.data() + sample * groups_ * 4;
    if (a_.kind == OutputKind::LogisticMixture) {
      draw_mixture(sample, output, uniform, input);
      return;
    }
    const int64_t channel = a_.order[step];
    const int64_t level =
        a_.kind == OutputKind::Bernoulli
            ? uniform[channel] > 1.0f / (1.0f + std::exp(output[channel]))
            : draw_categorical(output + channel * a_.levels, a_.levels, uniform[channel], sums_.data());
    put(sample, channel, level, input);
  }

 private:
  void put(int64_t sample, int64_t channel, int64_t level, float* input) {
    const int64_t to = ((first_ + sample) * a_.channels + channel) * a_.height * a_.width + pixel_;
    if (a_.known[to]) level = a_.given[to];
    a_.result[to] = level;
    if (input) input[channel] = static_cast<float>(level) * a_.scale + a_.offset;
  }

  void draw_mixture(int64_t sample, const float* parameters, const float* uniform, float* input) {
    const int64_t k = draw_categorical(parameters, mixtures_, uniform[0], sums_.data());
    const int64_t numbers = a_.channels == 3 ? 3 : 2;
    const float last = static_cast<float>(a_.levels - 1), half = 0.5f * last,
                width = static_cast<float>(2.0 / (a_.levels - 1));
    float values[3];
    for (int64_t c = 0; c < a_.channels; ++c) {
      const auto parameter = [&](int64_t channel, int64_t j) {
        return parameters[mixtures_ + (channel * numbers + j) * mixtures_ + k];
      };
      float mean = parameter(c, 0);
      for (int64_t earlier = 0; numbers == 3 && earlier < c; ++earlier)  // coefficient 0: of red for green
        mean += std::tanh(parameter(c - 1 + earlier, 2)) * values[earlier];
      const float u = std::fmin(std::fmax(uniform[1 + c], 1e-5f), static_cast<float>(1.0 - 1e-5));
      const float raw = parameter(c, 1), log_scale = raw < kMinLogScale ? kMinLogScale : raw;  // NaN stays: level 0
      const float drawn = mean + std::exp(log_scale) * (std::log(u) - std::log1p(-u));
      const float level = std::nearbyint((std::fmin(std::fmax(drawn, -1.0f), 1.0f) + 1.0f) * half);
      values[c] = level * width - 1.0f;
      put(sample, c, static_cast<int64_t>(level), input);
    }
  }

  const GenerateArgs& a_;
  int64_t first_, samples_, groups_, mixtures_, pixel_ = 0;
  Array<PhiloxSample> keys_;
  Array<float> uniforms_;
  Array<double> sums_;
};

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::masked_conv
