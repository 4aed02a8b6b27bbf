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
  Jvp(const JvpArgs& a, float* memory) : a_(a) {
    Scratch scratch(memory);
    const int64_t tiles = ceil_divide(a.keys, kTile) * kTileRow;
    tiles_ = scratch.take(tiles * a.features), tangent_tiles_ = scratch.take(tiles * a.features);
    value_rows_ = scratch.take(a.keys * a.value_features),
    tangent_value_rows_ = scratch.take(a.keys * a.value_features);
    queries_ = scratch.take(kPanel * a.features), tangent_queries_ = scratch.take(kPanel * a.features);
    sums_ = scratch.take(kPanel * (a.value_features + kWidth)), results_ = scratch.take(kPanel * a.value_features);
    weights_ = scratch.take(kBlockKeys * kPanel), tangents_ = scratch.take(kBlockKeys * kPanel);
    size_ = scratch.taken(memory);
  }

  int64_t size() const { return size_; }

  void unit(int64_t batch, int64_t head, int64_t panel) {
    prepare(batch, head / (a_.heads / a_.key_heads));
    const int64_t query = panel * kPanel, count = rows_in(panel, a_.queries), position = a_.mask.first + query;
    const float factor = a_.scale * kLog2E;
    turn_rows<Single>(a_.q, batch, head, query, count, kPanel, a_.features, a_.rope, position, factor, kPanel,
                      queries_);
    turn_rows<Single>(a_.tangent_q, batch, head, query, count, kPanel, a_.features, a_.rope, position, factor, kPanel,
                      tangent_queries_);
    std::memset(sums_, 0, kPanel * a_.value_features * sizeof(float));
    const float* logs = a_.lse + (batch * a_.heads + head) * a_.queries + query;
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const bool blind = lane >= count || logs[lane] == kMinusInfinity;
      logs_[lane] = blind ? -kMinusInfinity : logs[lane] * kLog2E, means_[lane] = 0.0f;
    }
    const Lanes lanes(a_.mask, query, count, a_.keys);
    for (int64_t key = lanes.first_key() / kBlockKeys * kBlockKeys; key < lanes.last_key(); key += kBlockKeys)
      visit(batch, head, query, count, lanes, key);
    finish(batch, head, query, count);
  }

 private:
  void prepare(int64_t batch, int64_t key_head) {
    if (batch == batch_ && key_head == key_head_) return;
    batch_ = batch, key_head_ = key_head;
    make_tiles<Single>(a_.k, batch, key_head, 0, a_.keys, a_.features, a_.rope, tiles_);
    make_tiles<Single>(a_.tangent_k, batch, key_head, 0, a_.keys, a_.features, a_.rope, tangent_tiles_);
    const int64_t row = a_.value_features;
    values_ = dense_rows(a_.v, batch, key_head, 0, a_.keys, row, {}, 0, row, value_rows_);
    tangent_values_ = dense_rows(a_.tangent_v, batch, key_head, 0, a_.keys, row, {}, 0, row, tangent_value_rows_);
  }

  void visit(int64_t batch, int64_t head, int64_t query, int64_t queries, const Lanes& lanes, int64_t key) {
    Run runs[2 * kTilesTogether];
    int64_t number = 0, keys = 0;
    const bool always = a_.mask.slopes || a_.mask.bias.data || a_.mask.keep.data;
    for (int64_t t = 0; t < kTilesTogether && key < a_.keys; ++t, key += kTile) {
      const int64_t count = a_.keys - key < kTile ? a_.keys - key : kTile;
      const Sight sight = lanes.sight(key, count);
      if (sight == Sight::None) continue;
      float *weights = weights_ + keys * kPanel, *tangents = tangents_ + keys * kPanel;
      const int64_t at = key / kTile * kTileRow * a_.features;
      scores<Single>(tiles_ + at, count, queries_, a_.features, 1.0f, weights);
      if (always || sight == Sight::Part) adjust(a_, lanes, sight, batch, head, query, queries, key, count, weights);
      with_positions(count, [&](auto positions) {
        tile_tangents<positions()>(tiles_ + at, tangent_tiles_ + at, queries_, tangent_queries_, a_.features, tangents);
      });
      weigh(count, weights, tangents);
      runs[number++] = {values_ + key * a_.value_features, tangents, count};
      runs[number++] = {tangent_values_ + key * a_.value_features, weights, count};
      keys += count;
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
        const F32 p = power_of_two_below_one(load(weight) - logs), moved = p * (load(tangent) * kLn2);
        store(weight, p);
        store(tangent, moved);
        mean += moved;
      }
      store(means_ + half * kWidth, mean);
    }
  }

  void finish(int64_t batch, int64_t head, int64_t query, int64_t count) {
    turn_rows<Single>(a_.result, batch, head, query, count, kPanel, a_.value_features, {}, 0, 1.0f, kPanel, results_);
    alignas(64) float factors[kPanel];
    for (int half = 0; half < 2; ++half) store(factors + half * kWidth, broadcast_float(1.0f));
    for (int64_t d = 0; d < a_.value_features; ++d)
      for (int half = 0; half < 2; ++half) {
        const int64_t at = d * kPanel + half * kWidth;
        store(sums_ + at, load(sums_ + at) - load(means_ + half * kWidth) * load(results_ + at));
      }
    std::memcpy(a_.lse_tangent + (batch * a_.heads + head) * a_.queries + query, means_, count * sizeof(float));
    write_panel(sums_, count, a_.value_features, factors, {}, 0, a_.out, row_at(a_.out, batch, head, query));
  }

  const JvpArgs& a_;
  int64_t size_ = 0, batch_ = -1, key_head_ = -1;
  float *tiles_, *tangent_tiles_, *value_rows_, *tangent_value_rows_, *queries_, *tangent_queries_, *sums_, *results_,
      *weights_, *tangents_;
  const float *values_ = nullptr, *tangent_values_ = nullptr;
  alignas(64) float logs_[kPanel], means_[kPanel];
};

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::attention
