// The directional derivative of attention, for results and denominators that are known.
#pragma once

#include "attention/mask.h"
#include "attention/rows.h"

namespace dgm::attention {
namespace DGM_ISA_NAMESPACE {
namespace {

// With S' the derivative of the scores and m = sum P S': O' = (P S') V + P V' - m O, and m is that of the denominator.
class Jvp {
 public:
  Jvp(const JvpArgs& a, float* memory) : a_(a), tiling_(a), panels_(a) {
    Scratch scratch(memory);
    const int64_t tiles = tiling_.number() * kTileRow * a.features, values = a.keys * a.value_features;
    tiles_ = scratch.take(tiles), tangent_tiles_ = scratch.take(tiles);
    value_rows_ = scratch.take(values), tangent_value_rows_ = scratch.take(values);
    queries_ = scratch.take(kPanel * a.features), tangent_queries_ = scratch.take(kPanel * a.features);
    sums_ = scratch.take(kPanel * (a.value_features + kWidth)), results_ = scratch.take(kPanel * a.value_features);
    weights_ = scratch.take(kBlockKeys * kPanel), tangents_ = scratch.take(kBlockKeys * kPanel);
    size_ = scratch.taken(memory);
  }

  int64_t size() const { return size_; }

  void unit(int64_t batch, int64_t head, int64_t index) {
    prepare(batch, head / (a_.heads / a_.key_heads));
    const Panel panel = panels_[index];
    const float factor = a_.scale * kLog2E;
    turn_rows<Single>(a_.q, batch, head, panel.places(), panel.count, kPanel, a_.features, a_.rope, a_.mask.first,
                      factor, kPanel, queries_);
    turn_rows<Single>(a_.tangent_q, batch, head, panel.places(), panel.count, kPanel, a_.features, a_.rope,
                      a_.mask.first, factor, kPanel, tangent_queries_);
    std::memset(sums_, 0, kPanel * a_.value_features * sizeof(float));
    const float* logs = a_.lse + (batch * a_.heads + head) * a_.queries;
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const float log = lane < panel.count ? logs[panel.query[lane]] : kMinusInfinity;
      logs_[lane] = log == kMinusInfinity ? -kMinusInfinity : log * kLog2E, means_[lane] = 0.0f;
    }
    const Lanes lanes(a_.mask, panel, a_.keys);
    for (int64_t tile = 0; tile < tiling_.number(); tile += kTilesTogether) visit(batch, head, panel, lanes, tile);
    finish(batch, head, panel);
  }

 private:
  void prepare(int64_t batch, int64_t key_head) {
    if (batch == batch_ && key_head == key_head_) return;
    batch_ = batch, key_head_ = key_head;
    const int64_t number = tiling_.number(), row = a_.value_features;
    make_tiles<Single>(a_.k, batch, key_head, tiling_, 0, number, a_.features, a_.rope, tiles_);
    make_tiles<Single>(a_.tangent_k, batch, key_head, tiling_, 0, number, a_.features, a_.rope, tangent_tiles_);
    values_ = dense_rows(a_.v, batch, key_head, 0, a_.keys, row, {}, row, value_rows_);
    tangent_values_ = dense_rows(a_.tangent_v, batch, key_head, 0, a_.keys, row, {}, row, tangent_value_rows_);
  }

  void visit(int64_t batch, int64_t head, const Panel& panel, const Lanes& lanes, int64_t first) {
    Run runs[2 * kTilesTogether];
    int64_t number = 0, keys = 0;
    for (int64_t index = first; index < first + kTilesTogether && index < tiling_.number(); ++index) {
      const KeyTile tile = tiling_[index];
      const Sight sight = lanes.sight(tile.key, tile.count);
      if (sight == Sight::None) continue;
      float *weights = weights_ + keys * kPanel, *tangents = tangents_ + keys * kPanel;
      const int64_t at = index * kTileRow * a_.features;
      scores<Single>(tiles_ + at, tile.count, queries_, a_.features, 1.0f, weights);
      if (sight == Sight::Part || adjusts_all(a_.mask))
        adjust(a_.mask, lanes, sight, batch, head, panel, tile, weights);
      with_positions(tile.count, [&](auto positions) {
        tile_tangents<positions()>(tiles_ + at, tangent_tiles_ + at, queries_, tangent_queries_, a_.features, tangents);
      });
      weigh(tile.count, weights, tangents);
      runs[number++] = {values_ + tile.key * a_.value_features, tangents, tile.count};
      runs[number++] = {tangent_values_ + tile.key * a_.value_features, weights, tile.count};
      keys += tile.count;
    }
    if (number > 0) weighted_sums<Single>(runs, number, a_.value_features, a_.value_features, nullptr, sums_);
  }

  // Scores to P, their derivatives to P S'; the tangents came in units of log 2, for which the queries were scaled.
  void weigh(int64_t count, float* weights, float* tangents) {
    for (int half = 0; half < 2; ++half) {
      const F32 logs = load(logs_ + half * kWidth);
      F32 mean = load(means_ + half * kWidth);
      for (int64_t n = 0; n < count; ++n) {
        float *weight = weights + n * kPanel + half * kWidth, *tangent = tangents + n * kPanel + half * kWidth;
        const F32 p = power_of_two_below_one(at_most(load(weight) - logs, 0.0f)), moved = p * (load(tangent) * kLn2);
        store(weight, p);
        store(tangent, moved);
        mean += moved;
      }
      store(means_ + half * kWidth, mean);
    }
  }

  void finish(int64_t batch, int64_t head, const Panel& panel) {
    turn_rows<Single>(a_.result, batch, head, panel.places(), panel.count, kPanel, a_.value_features, {}, 0, 1.0f,
                      kPanel, results_);
    alignas(64) float factors[kPanel];
    for (int half = 0; half < 2; ++half) store(factors + half * kWidth, broadcast_float(1.0f));
    for (int64_t d = 0; d < a_.value_features; ++d)
      for (int half = 0; half < 2; ++half) {
        const int64_t at = d * kPanel + half * kWidth;
        store(sums_ + at, load(sums_ + at) - load(means_ + half * kWidth) * load(results_ + at));
      }
    float* means = a_.lse_tangent + (batch * a_.heads + head) * a_.queries;
    for (int64_t n = 0; n < panel.count; ++n) means[panel.query[n]] = means_[n];
    write_panel(sums_, panel, a_.value_features, factors, {}, 0, a_.out, batch, head);
  }

  const JvpArgs& a_;
  Tiling tiling_;
  Panels panels_;
  int64_t size_ = 0, batch_ = -1, key_head_ = -1;
  float *tiles_, *tangent_tiles_, *value_rows_, *tangent_value_rows_, *queries_, *tangent_queries_, *sums_, *results_,
      *weights_, *tangents_;
  const float *values_ = nullptr, *tangent_values_ = nullptr;
  alignas(64) float logs_[kPanel], means_[kPanel];
};

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::attention
