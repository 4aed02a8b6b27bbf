// Gradients of attention: blocks of keys against panels of queries, with the probabilities computed again.
#pragma once

#include <initializer_list>

#include "attention/mask.h"
#include "attention/rows.h"

namespace dgm::attention {
namespace DGM_ISA_NAMESPACE {
namespace {

// What a head's queries are needed as: turned in panels for the scores, in rows (of pairs of queries, if lanes are
// pairs) for the gradients of keys and values.
template <class Lane>
class QuerySide {
 public:
  QuerySide(const BackwardArgs& a, Scratch& scratch)
      : a_(a),
        panels_(a),
        depth_(depth_of<Lane>(a.features)),
        value_depth_(depth_of<Lane>(a.value_features)),
        row_(whole_vectors(a.features)),
        value_row_(whole_vectors(a.value_features)) {
    const int64_t panels = panels_.number();
    turned_ = scratch.take(panels * kPanel * depth_), turned_grad_ = scratch.take(panels * kPanel * value_depth_);
    rows_ = scratch.take(panels * kRows * row_), grad_rows_ = scratch.take(panels * kRows * value_row_);
    logs_ = scratch.take(panels * kPanel), deltas_ = scratch.take(panels * kPanel);
    results_ = scratch.take(kPanel * value_depth_);
  }

  void prepare(int64_t batch, int64_t head) {
    const RopeArgs none;
    for (int64_t index = 0; index < panels_.number(); ++index) {
      const Panel panel = panels_[index];
      turn_rows<Lane>(a_.q, batch, head, panel.places(), panel.count, kPanel, a_.features, a_.rope, a_.mask.first,
                      a_.scale * kLog2E, kPanel, turned_ + index * kPanel * depth_);
      turn_rows<Lane>(a_.grad, batch, head, panel.places(), panel.count, kPanel, a_.value_features, none, 0, 1.0f,
                      kPanel, turned_grad_ + index * kPanel * value_depth_);
      copy_rows(a_.q, batch, head, panel, a_.features, a_.rope, row_, rows_ + index * kRows * row_);
      copy_rows(a_.grad, batch, head, panel, a_.value_features, none, value_row_,
                grad_rows_ + index * kRows * value_row_);
      prepare_queries(batch, head, panel, index);
    }
  }

  const Panels& panels() const { return panels_; }
  const float* turned(int64_t panel) const { return turned_ + panel * kPanel * depth_; }
  const float* turned_grad(int64_t panel) const { return turned_grad_ + panel * kPanel * value_depth_; }
  const float* rows(int64_t panel) const { return rows_ + panel * kRows * row_; }
  const float* grad_rows(int64_t panel) const { return grad_rows_ + panel * kRows * value_row_; }
  const float* logs(int64_t panel) const { return logs_ + panel * kPanel; }
  const float* deltas(int64_t panel) const { return deltas_ + panel * kPanel; }
  int64_t row() const { return row_; }
  int64_t value_row() const { return value_row_; }

 private:
  static constexpr int64_t kRows = Lane::kPairs ? kPanel / 2 : kPanel;

  // Rows beyond the last query are zeros: their weights are zeros too, but what memory holds could be NaN.
  void copy_rows(const Rows& x, int64_t batch, int64_t head, const Panel& panel, int64_t features, const RopeArgs& rope,
                 int64_t row, float* to) {
    std::memset(to, 0, kRows * row * sizeof(float));
    if constexpr (Lane::kPairs) {
      for (int64_t n = 0; n < panel.count; n += 2)
        pair_rows(x, batch, head, panel.query[n], n + 1 < panel.count ? panel.query[n + 1] : -1, features, rope,
                  a_.mask.first, to + n / 2 * row);
    } else {
      alignas(64) float wide[kMaxFeatures + kWidth];
      for (int64_t n = 0; n < panel.count; ++n) {
        const char* from = row_at(x, batch, head, panel.query[n]);
        const float* found = lanes_of<Single>(x, from, features, rope, a_.mask.first + panel.query[n], wide);
        std::memcpy(to + n * row, found, features * sizeof(float));
      }
    }
  }

  // The log of the denominator in units of log 2, infinite where there is no query or it sees no key: then every
  // probability is 0. And delta = sum(dO O), less the gradient of that log; added up as dP = sum(dO V) is, so that of a
  // query that sees one key, where O = V, the difference is 0.
  void prepare_queries(int64_t batch, int64_t head, const Panel& panel, int64_t index) {
    float *logs = logs_ + index * kPanel, *deltas = deltas_ + index * kPanel;
    turn_rows<Lane>(a_.result, batch, head, panel.places(), panel.count, kPanel, a_.value_features, {}, 0, 1.0f, kPanel,
                    results_);
    const float* grads = turned_grad(index);
    F32 sums[2] = {};
    for (int64_t d = 0; d < value_depth_; ++d)
      for (int half = 0; half < 2; ++half) {
        const int64_t at = d * kPanel + half * kWidth;
        sums[half] = Lane::multiply_add(load(results_ + at), load(grads + at), sums[half]);
      }
    for (int half = 0; half < 2; ++half) store(deltas + half * kWidth, sums[half]);
    const int64_t first = (batch * a_.heads + head) * a_.queries;
    for (int64_t n = 0; n < kPanel; ++n) {
      const float log = n < panel.count ? a_.lse[first + panel.query[n]] : kMinusInfinity;
      logs[n] = log == kMinusInfinity ? -kMinusInfinity : log * kLog2E;
      // Of a query that sees no key the gradient of lse does not count, whatever it is.
      if (a_.grad_lse && log != kMinusInfinity) deltas[n] -= a_.grad_lse[first + panel.query[n]];
    }
  }

  const BackwardArgs& a_;
  Panels panels_;
  int64_t depth_, value_depth_, row_, value_row_;
  float *turned_, *turned_grad_, *rows_, *grad_rows_, *logs_, *deltas_, *results_;
};

// A unit of work: the keys of a part, of one key head, against all queries of the heads that share it.
template <class Lane>
class Backward {
 public:
  Backward(const BackwardArgs& a, float* memory)
      : a_(a),
        tiling_(a),
        scratch_(memory),
        queries_(a, scratch_),
        depth_(depth_of<Lane>(a.features)),
        value_depth_(depth_of<Lane>(a.value_features)),
        blocks_(ceil_divide(tiling_.number(), kTilesTogether)) {
    const int64_t tiles = ceil_divide(blocks_, a.parts) * kTilesTogether, keys = tiles * kTile;
    key_tiles_ = scratch_.take(tiles * kTileRow * depth_),
    value_tiles_ = scratch_.take(tiles * kTileRow * value_depth_);
    key_rows_ = scratch_.take(keys * a.features);
    grad_k_ = scratch_.take(keys * queries_.row()), grad_v_ = scratch_.take(keys * queries_.value_row());
    weights_ = scratch_.take(kBlockKeys * kPanel), grads_ = scratch_.take(kBlockKeys * kPanel);
    key_pairs_ = scratch_.take(kBlockKeys / 2 * kPanel);
    size_ = scratch_.taken(memory);
  }

  int64_t size() const { return size_; }

  void unit(int64_t part, int64_t batch, int64_t key_head) {
    first_ = blocks_ * part / a_.parts * kTilesTogether, last_ = blocks_ * (part + 1) / a_.parts * kTilesTogether;
    if (last_ > tiling_.number()) last_ = tiling_.number();
    if (first_ < last_) prepare(batch, key_head);
    const int64_t shared = a_.heads / a_.key_heads, panels = queries_.panels().number(), size = a_.features * kPanel;
    for (int64_t head = key_head * shared; head < (key_head + 1) * shared; ++head) {
      float* to = a_.grad_panels + ((part * a_.batch + batch) * a_.heads + head) * panels * size;
      std::memset(to, 0, panels * size * sizeof(float));
      if (first_ >= last_) continue;
      queries_.prepare(batch, head);
      for (int64_t tile = first_; tile < last_; tile += kTilesTogether)
        for (int64_t panel = 0; panel < panels; ++panel) visit(batch, head, panel, tile, to + panel * size);
    }
    if (first_ < last_) finish(batch, key_head);
  }

 private:
  void prepare(int64_t batch, int64_t key_head) {
    begin_ = tiling_[first_].key, end_ = tiling_[last_ - 1].key + tiling_[last_ - 1].count;
    make_tiles<Lane>(a_.k, batch, key_head, tiling_, first_, last_, a_.features, a_.rope, key_tiles_);
    make_tiles<Lane>(a_.v, batch, key_head, tiling_, first_, last_, a_.value_features, {}, value_tiles_);
    rows_ = key_rows_;
    if constexpr (Lane::kPairs)
      make_pairs(a_.k, batch, key_head, tiling_, first_, last_, a_.features, a_.rope, key_rows_);
    else
      rows_ = dense_rows(a_.k, batch, key_head, begin_, end_, a_.features, a_.rope, a_.features, key_rows_);
    std::memset(grad_k_, 0, (end_ - begin_) * queries_.row() * sizeof(float));
    std::memset(grad_v_, 0, (end_ - begin_) * queries_.value_row() * sizeof(float));
  }

  void visit(int64_t batch, int64_t head, int64_t index, int64_t first, float* grad_queries) {
    const Panel panel = queries_.panels()[index];
    const Lanes lanes(a_.mask, panel, a_.keys);
    Run runs[kTilesTogether];
    int64_t number = 0, keys = 0;
    for (int64_t t = first; t < first + kTilesTogether && t < last_; ++t) {
      const KeyTile tile = tiling_[t];
      const Sight sight = lanes.sight(tile.key, tile.count);
      if (sight == Sight::None) continue;
      float *weights = weights_ + keys * kPanel, *grads = grads_ + keys * kPanel;
      const int64_t at = (t - first_) * kTileRow, row = tile.key - begin_;
      scores<Lane>(key_tiles_ + at * depth_, tile.count, queries_.turned(index), depth_, a_.scale * kLog2E, weights);
      scores<Lane>(value_tiles_ + at * value_depth_, tile.count, queries_.turned_grad(index), value_depth_, 1.0f,
                   grads);
      if (sight == Sight::Part || adjusts_all(a_.mask))
        adjust(a_.mask, lanes, sight, batch, head, panel, tile, weights);
      weigh(index, tile.count, weights, grads);
      runs[number++] = queries_first(t, row, tile.count, weights, grads);
      outer_sums<Lane>(weights, tile.count, queries_.grad_rows(index), queries_.value_row(),
                       grad_v_ + row * queries_.value_row());
      outer_sums<Lane>(grads, tile.count, queries_.rows(index), queries_.row(), grad_k_ + row * queries_.row());
      keys += (tile.count + 1) / 2 * 2;
    }
    if (number > 0) weighted_sums<Lane>(runs, number, a_.features, a_.features, nullptr, grad_queries);
  }

  // Scores to the probabilities P, their gradients to dS = P (dP - delta).
  void weigh(int64_t index, int64_t count, float* weights, float* grads) {
    const float *logs = queries_.logs(index), *deltas = queries_.deltas(index);
    for (int64_t n = 0; n < count; ++n)
      for (int half = 0; half < 2; ++half) {
        float *weight = weights + n * kPanel + half * kWidth, *grad = grads + n * kPanel + half * kWidth;
        const F32 p = power_of_two_below_one(at_most(load(weight) - load(logs + half * kWidth), 0.0f));
        store(weight, p);
        store(grad, p * (load(grad) - load(deltas + half * kWidth)));
      }
  }

  // The run of a tile for the gradients of the queries. If lanes are pairs, dS becomes one of pairs of keys for it;
  // then both P and dS become pairs of queries where they are, for the gradients of keys and values.
  Run queries_first(int64_t tile, int64_t row, int64_t count, float* weights, float* grads) {
    if constexpr (!Lane::kPairs) {
      return {rows_ + row * a_.features, grads, count};
    } else {
      float* pairs = key_pairs_ + (grads - grads_) / 2;
      for (int64_t n = 0; n < count; n += 2)
        for (int half = 0; half < 2; ++half) {
          const float* low = grads + n * kPanel + half * kWidth;
          store(pairs + n / 2 * kPanel + half * kWidth,
                pair_lanes(load(low), n + 1 < count ? load(low + kPanel) : F32{}));
        }
      for (float* rows : {weights, grads})
        for (int64_t n = 0; n < count; ++n)
          store(rows + n * kWidth, pair_neighbours(load(rows + n * kPanel), load(rows + n * kPanel + kWidth)));
      return {rows_ + (tile - first_) * (kTile / 2) * a_.features, pairs, (count + 1) / 2};
    }
  }

  void finish(int64_t batch, int64_t key_head) {
    for (int64_t n = begin_; n < end_; ++n) {
      float* grad = grad_k_ + (n - begin_) * queries_.row();
      for (int64_t d = 0; d < queries_.row(); d += kWidth) store(grad + d, load(grad + d) * a_.scale);
      if (a_.rope.table) rotate(a_.rope, n, true, grad);
      convert_from_floats(grad, a_.features, a_.grad_k.dtype, row_at(a_.grad_k, batch, key_head, n));
      convert_from_floats(grad_v_ + (n - begin_) * queries_.value_row(), a_.value_features, a_.grad_v.dtype,
                          row_at(a_.grad_v, batch, key_head, n));
    }
  }

  const BackwardArgs& a_;
  Tiling tiling_;
  Scratch scratch_;
  QuerySide<Lane> queries_;
  int64_t depth_, value_depth_, blocks_, size_ = 0, first_ = 0, last_ = 0, begin_ = 0,
                                         end_ = 0;  // tiles and keys of the part
  float *key_tiles_, *value_tiles_, *key_rows_, *grad_k_, *grad_v_, *weights_, *grads_, *key_pairs_;
  const float* rows_ = nullptr;
};

template <class Lane>
DGM_INLINE void run_backward(const BackwardArgs& a, float* memory, int64_t begin, int64_t end) {
  Backward<Lane> work(a, memory);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t part = i % a.parts, key_head = i / a.parts % a.key_heads, batch = i / a.parts / a.key_heads;
    work.unit(part, batch, key_head);
  }
}

// The gradients of a panel of queries: the sum of those of all parts, in their order.
DGM_INLINE void finish_queries(const BackwardArgs& a, int64_t batch, int64_t head, int64_t index) {
  const Panels panels(a);
  const int64_t size = a.features * kPanel, apart = a.batch * a.heads * panels.number() * size;
  float* sums = a.grad_panels + ((batch * a.heads + head) * panels.number() + index) * size;
  for (int64_t part = 1; part < a.parts; ++part)
    for (int64_t i = 0; i < size; i += kWidth) store(sums + i, load(sums + i) + load(sums + part * apart + i));
  alignas(64) float factors[kPanel];
  for (int half = 0; half < 2; ++half) store(factors + half * kWidth, broadcast_float(a.scale));
  write_panel(sums, panels[index], a.features, factors, a.rope, a.mask.first, a.grad_q, batch, head);
}

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::attention
