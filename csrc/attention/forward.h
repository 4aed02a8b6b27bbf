// Attention forward: panels of queries against blocks of keys, with the softmax's denominator kept as they go by.
#pragma once

#include "attention/mask.h"
#include "attention/rows.h"

namespace dgm::attention {
namespace DGM_ISA_NAMESPACE {
namespace {

// Panels of queries of a head, against all its keys: a unit of work.
template <class Lane>
class Forward {
 public:
  Forward(const ForwardArgs& a, float* memory) : a_(a), tiling_(a), panels_(a), depth_(depth_of<Lane>(a.features)) {
    Scratch scratch(memory);
    const int64_t tiles = tiling_.number();
    tiles_ = scratch.take(tiles * kTileRow * depth_);
    value_rows_ = scratch.take((Lane::kPairs ? tiles * (kTile / 2) : a.keys) * a.value_features);
    queries_ = scratch.take(a.panels * kPanel * depth_);
    sums_ = scratch.take(kPanel * (a.panels * a.value_features + kWidth));
    largest_ = scratch.take(a.panels * kPanel), denominators_ = scratch.take(a.panels * kPanel);
    scores_ = scratch.take(kBlockKeys * kPanel), pairs_ = scratch.take(kBlockKeys / 2 * kPanel);
    size_ = scratch.taken(memory);
  }

  int64_t size() const { return size_; }

  void unit(int64_t batch, int64_t head, int64_t index) {
    prepare(batch, head / (a_.heads / a_.key_heads));
    const int64_t first = index * a_.panels, left = panels_.number() - first;
    const int64_t number = left < a_.panels ? left : a_.panels;
    Panel panels[kPanelsTogether];
    Lanes lanes[kPanelsTogether];
    int64_t begin = a_.keys, end = 0;
    for (int64_t p = 0; p < number; ++p) {
      panels[p] = panels_[first + p];
      lanes[p] = Lanes(a_.mask, panels[p], a_.keys);
      if (lanes[p].first_key() < begin) begin = lanes[p].first_key();
      if (lanes[p].last_key() > end) end = lanes[p].last_key();
      start(batch, head, panels[p], p);
    }
    // Blocks begin at the same tiles whatever the unit, and so do the sums: a result does not depend on what is
    // computed beside it.
    const int64_t last = begin < end ? tiling_.tile_of(end - 1) + 1 : 0;
    for (int64_t tile = last ? tiling_.tile_of(begin) / kTilesTogether * kTilesTogether : 0; tile < last;
         tile += kTilesTogether)
      for (int64_t p = 0; p < number; ++p) visit(batch, head, panels[p], p, lanes[p], tile);
    for (int64_t p = 0; p < number; ++p) finish(batch, head, panels[p], p);
  }

 private:
  // Keys in tiles and values in rows, of a head that others may share.
  void prepare(int64_t batch, int64_t key_head) {
    if (batch == batch_ && key_head == key_head_) return;
    batch_ = batch, key_head_ = key_head;
    make_tiles<Lane>(a_.k, batch, key_head, tiling_, 0, tiling_.number(), a_.features, a_.rope, tiles_);
    values_ = value_rows_;
    if constexpr (Lane::kPairs)
      make_pairs(a_.v, batch, key_head, tiling_, 0, tiling_.number(), a_.value_features, {}, value_rows_);
    else
      values_ = dense_rows(a_.v, batch, key_head, 0, a_.keys, a_.value_features, {}, a_.value_features, value_rows_);
  }

  void start(int64_t batch, int64_t head, const Panel& panel, int64_t p) {
    turn_rows<Lane>(a_.q, batch, head, panel.places(), panel.count, kPanel, a_.features, a_.rope, a_.mask.first,
                    a_.scale * kLog2E, kPanel, queries_ + p * kPanel * depth_);
    std::memset(sums_ + p * kPanel * a_.value_features, 0, kPanel * a_.value_features * sizeof(float));
    for (int half = 0; half < 2; ++half) {
      store(largest_ + p * kPanel + half * kWidth, broadcast_float(kMinusInfinity));
      store(denominators_ + p * kPanel + half * kWidth, F32{});
    }
  }

  // The scores of a block of tiles, their exponentials, and the values that these weigh.
  void visit(int64_t batch, int64_t head, const Panel& panel, int64_t p, const Lanes& lanes, int64_t first) {
    Run runs[kTilesTogether];
    int64_t number = 0, rows = 0;
    alignas(64) float most[kPanel], factors[kPanel];
    std::memcpy(most, largest_ + p * kPanel, sizeof most);
    for (int64_t index = first; index < first + kTilesTogether && index < tiling_.number(); ++index) {
      const KeyTile tile = tiling_[index];
      const Sight sight = lanes.sight(tile.key, tile.count);
      if (sight == Sight::None) continue;
      float* to = scores_ + rows * kPanel;
      const bool adjusted = sight == Sight::Part || adjusts_all(a_.mask);
      scores<Lane>(tiles_ + index * kTileRow * depth_, tile.count, queries_ + p * kPanel * depth_, depth_,
                   a_.scale * kLog2E, to, adjusted ? nullptr : most);
      if (adjusted) {
        adjust(a_.mask, lanes, sight, batch, head, panel, tile, to);
        find_largest(to, tile.count, most);
      }
      if constexpr (Lane::kPairs) {
        runs[number++] = {values_ + index * (kTile / 2) * a_.value_features, pairs_ + rows / 2 * kPanel,
                          (tile.count + 1) / 2};
        if (tile.count % 2) hide_row(to + tile.count * kPanel);  // the other half of the last pair
        rows += (tile.count + 1) / 2 * 2;
      } else {
        runs[number++] = {values_ + tile.key * a_.value_features, to, tile.count};
        rows += tile.count;
      }
    }
    if (number == 0) return;
    exponentials(rows, most, largest_ + p * kPanel, denominators_ + p * kPanel, factors);
    weighted_sums<Lane>(runs, number, a_.value_features, a_.value_features, factors,
                        sums_ + p * kPanel * a_.value_features);
  }

  static void hide_row(float* scores) {
    for (int half = 0; half < 2; ++half) store(scores + half * kWidth, broadcast_float(kMinusInfinity));
  }

  static void find_largest(const float* scores, int64_t rows, float* most) {
    for (int half = 0; half < 2; ++half) {
      F32 found = load(most + half * kWidth);
      for (int64_t n = 0; n < rows; ++n) found = larger(load(scores + n * kPanel + half * kWidth), found);
      store(most + half * kWidth, found);
    }
  }

  // Scores s become 2^(s - m), m the greatest so far of each query; `factors` are for what was summed with an older m.
  void exponentials(int64_t keys, const float* most, float* largest, float* denominators, float* factors) {
    F32 sum[2] = {}, shift[2];
    for (int half = 0; half < 2; ++half) {
      const F32 now = load(most + half * kWidth);
      shift[half] = now == kMinusInfinity ? F32{} : now;  // of a query that has seen nothing
      store(factors + half * kWidth, power_of_two_below_one(load(largest + half * kWidth) - shift[half]));
      store(largest + half * kWidth, now);
    }
    // In two sums, for a chain of additions would wait for each.
    F32 other[2] = {};
    int64_t n = 0;
    for (; n + 2 <= keys; n += 2)
      for (int half = 0; half < 2; ++half) {
        float* at = scores_ + n * kPanel + half * kWidth;
        const F32 low = power_of_two_below_one(load(at) - shift[half]);
        const F32 high = power_of_two_below_one(load(at + kPanel) - shift[half]);
        sum[half] += low, other[half] += high;
        put(n, half, at, low, high);
      }
    for (; n < keys; ++n)
      for (int half = 0; half < 2; ++half) {
        float* at = scores_ + n * kPanel + half * kWidth;
        const F32 low = power_of_two_below_one(load(at) - shift[half]);
        sum[half] += low;
        put(n, half, at, low, F32{});
      }
    for (int half = 0; half < 2; ++half) {
      float* to = denominators + half * kWidth;
      store(to, load(to) * load(factors + half * kWidth) + (sum[half] + other[half]));
    }
  }

  DGM_INLINE_METHOD void put(int64_t n, int half, float* at, F32 low, F32 high) {
    if constexpr (Lane::kPairs) {
      store(pairs_ + n / 2 * kPanel + half * kWidth, pair_lanes(low, high));
    } else {
      store(at, low);
      store(at + kPanel, high);  // of an odd number behind the last key, where nothing is read
    }
  }

  void finish(int64_t batch, int64_t head, const Panel& panel, int64_t p) {
    alignas(64) float factors[kPanel], logs[kPanel];
    for (int half = 0; half < 2; ++half) {
      const F32 sum = load(denominators_ + p * kPanel + half * kWidth);
      const F32 most = load(largest_ + p * kPanel + half * kWidth);
      const auto blind = sum == 0.0f;
      store(factors + half * kWidth, blind ? F32{} : 1.0f / sum);
      const F32 log = most * kLn2 + logarithm(blind ? broadcast_float(1.0f) : sum);
      store(logs + half * kWidth, blind ? broadcast_float(kMinusInfinity) : log);
    }
    float* lse = a_.lse + (batch * a_.heads + head) * a_.queries;
    for (int64_t n = 0; n < panel.count; ++n) lse[panel.query[n]] = logs[n];
    write_panel(sums_ + p * kPanel * a_.value_features, panel, a_.value_features, factors, {}, 0, a_.out, batch, head);
  }

  const ForwardArgs& a_;
  Tiling tiling_;
  Panels panels_;
  int64_t depth_, size_ = 0, batch_ = -1, key_head_ = -1;
  float *tiles_, *value_rows_, *queries_, *sums_, *largest_, *denominators_, *scores_, *pairs_;
  const float* values_ = nullptr;
};

template <class Lane>
DGM_INLINE void run_forward(const ForwardArgs& a, float* memory, int64_t begin, int64_t end) {
  Forward<Lane> work(a, memory);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t head = i / a.units % a.heads, batch = i / a.units / a.heads;
    work.unit(batch, head, folded(i % a.units, a.units));
  }
}

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::attention
