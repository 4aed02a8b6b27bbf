// Gradients of attention: blocks of keys against panels of queries, with the probabilities computed again.
#pragma once

#include "attention/mask.h"
#include "attention/rows.h"

namespace dgm::attention {
namespace DGM_ISA_NAMESPACE {
namespace {

// What a head's queries are needed as: turned in panels for the scores, in rows for the gradients of keys and values.
class QuerySide {
 public:
  QuerySide(const BackwardArgs& a, Scratch& scratch)
      : a_(a), row_(whole_vectors(a.features)), value_row_(whole_vectors(a.value_features)) {
    const int64_t queries = panels_of(a.queries) * kPanel;
    turned_ = scratch.take(queries * a.features), turned_grad_ = scratch.take(queries * a.value_features);
    rows_ = scratch.take(queries * row_), grad_rows_ = scratch.take(queries * value_row_);
    logs_ = scratch.take(queries), deltas_ = scratch.take(queries);
  }

  void prepare(int64_t batch, int64_t head) {
    for (int64_t panel = 0; panel < panels_of(a_.queries); ++panel) {
      const int64_t query = panel * kPanel, count = rows_in(panel, a_.queries), position = a_.mask.first + query;
      turn_rows<Single>(a_.q, batch, head, query, count, kPanel, a_.features, a_.rope, position, a_.scale * kLog2E,
                        kPanel, turned_ + query * a_.features);
      turn_rows<Single>(a_.grad, batch, head, query, count, kPanel, a_.value_features, {}, 0, 1.0f, kPanel,
                        turned_grad_ + query * a_.value_features);
    }
    // Rows beyond the last query are zeros: their weights are zeros too, but what memory holds could be NaN.
    const int64_t queries = panels_of(a_.queries) * kPanel;
    copy_rows(a_.q, batch, head, a_.features, a_.rope, a_.mask.first, row_, rows_);
    copy_rows(a_.grad, batch, head, a_.value_features, {}, 0, value_row_, grad_rows_);
    for (int64_t n = 0; n < queries; ++n) prepare_query(batch, head, n);
  }

  const float* turned(int64_t panel) const { return turned_ + panel * kPanel * a_.features; }
  const float* turned_grad(int64_t panel) const { return turned_grad_ + panel * kPanel * a_.value_features; }
  const float* rows(int64_t panel) const { return rows_ + panel * kPanel * row_; }
  const float* grad_rows(int64_t panel) const { return grad_rows_ + panel * kPanel * value_row_; }
  const float* logs(int64_t panel) const { return logs_ + panel * kPanel; }
  const float* deltas(int64_t panel) const { return deltas_ + panel * kPanel; }
  int64_t row() const { return row_; }
  int64_t value_row() const { return value_row_; }

 private:
  void copy_rows(const Rows& x, int64_t batch, int64_t head, int64_t features, const RopeArgs& rope, int64_t position,
                 int64_t row, float* to) {
    const int64_t queries = panels_of(a_.queries) * kPanel;
    const float* found = dense_rows(x, batch, head, 0, a_.queries, features, rope, position, row, to);
    if (found != to) std::memcpy(to, found, a_.queries * row * sizeof(float));
    std::memset(to + a_.queries * row, 0, (queries - a_.queries) * row * sizeof(float));
  }

  // The log of the denominator in units of log 2, infinite where there is no query or it sees no key: then every
  // probability is 0. And sum(dO O), less the gradient of that log.
  void prepare_query(int64_t batch, int64_t head, int64_t n) {
    if (n >= a_.queries) {
      logs_[n] = -kMinusInfinity, deltas_[n] = 0.0f;
      return;
    }
    const int64_t index = (batch * a_.heads + head) * a_.queries + n;
    logs_[n] = a_.lse[index] == kMinusInfinity ? -kMinusInfinity : a_.lse[index] * kLog2E;
    alignas(64) float result[kMaxFeatures + kWidth];
    read_row(a_.result, row_at(a_.result, batch, head, n), a_.value_features, {}, 0, result);
    const float* grad = grad_rows_ + n * value_row_;
    F32 sum = {};
    for (int64_t d = 0; d < a_.value_features; d += kWidth)
      sum += keep_first(a_.value_features - d, load(result + d) * load(grad + d));
    deltas_[n] = static_cast<float>(dgm::DGM_ISA_NAMESPACE::sum(sum)) - (a_.grad_lse ? a_.grad_lse[index] : 0.0f);
  }

  const BackwardArgs& a_;
  int64_t row_, value_row_;
  float *turned_, *turned_grad_, *rows_, *grad_rows_, *logs_, *deltas_;
};

// A unit of work: the keys of a part, of one key head, against all queries of the heads that share it.
class Backward {
 public:
  Backward(const BackwardArgs& a, float* memory) : a_(a), scratch_(memory), queries_(a, scratch_) {
    most_ = ceil_divide(ceil_divide(a.keys, kBlockKeys), a.parts) * kBlockKeys;
    key_tiles_ = scratch_.take(most_ / kTile * kTileRow * a.features);
    value_tiles_ = scratch_.take(most_ / kTile * kTileRow * a.value_features);
    key_rows_ = scratch_.take(most_ * a.features);
    grad_k_ = scratch_.take(most_ * queries_.row()), grad_v_ = scratch_.take(most_ * queries_.value_row());
    weights_ = scratch_.take(kBlockKeys * kPanel), grads_ = scratch_.take(kBlockKeys * kPanel);
    size_ = scratch_.taken(memory);
  }

  int64_t size() const { return size_; }

  void unit(int64_t part, int64_t batch, int64_t key_head) {
    const int64_t blocks = ceil_divide(a_.keys, kBlockKeys);
    begin_ = blocks * part / a_.parts * kBlockKeys, end_ = blocks * (part + 1) / a_.parts * kBlockKeys;
    if (end_ > a_.keys) end_ = a_.keys;
    const int64_t shared = a_.heads / a_.key_heads;
    if (begin_ < end_) prepare(batch, key_head);
    for (int64_t head = key_head * shared; head < (key_head + 1) * shared; ++head) {
      const int64_t panels = panels_of(a_.queries), size = a_.features * kPanel;
      float* to = a_.grad_panels + ((part * a_.batch + batch) * a_.heads + head) * panels * size;
      std::memset(to, 0, panels * size * sizeof(float));
      if (begin_ >= end_) continue;
      queries_.prepare(batch, head);
      for (int64_t key = begin_; key < end_; key += kBlockKeys)
        for (int64_t panel = 0; panel < panels; ++panel) visit(batch, head, panel, key, to + panel * size);
    }
    if (begin_ < end_) finish(batch, key_head);
  }

 private:
  void prepare(int64_t batch, int64_t key_head) {
    make_tiles<Single>(a_.k, batch, key_head, begin_, end_, a_.features, a_.rope, key_tiles_);
    make_tiles<Single>(a_.v, batch, key_head, begin_, end_, a_.value_features, {}, value_tiles_);
    rows_ = dense_rows(a_.k, batch, key_head, begin_, end_, a_.features, a_.rope, 0, a_.features, key_rows_);
    std::memset(grad_k_, 0, (end_ - begin_) * queries_.row() * sizeof(float));
    std::memset(grad_v_, 0, (end_ - begin_) * queries_.value_row() * sizeof(float));
  }

  void visit(int64_t batch, int64_t head, int64_t panel, int64_t key, float* grad_queries) {
    const Lanes lanes(a_.mask, panel * kPanel, rows_in(panel, a_.queries), a_.keys);
    Run runs[kTilesTogether];
    int64_t number = 0, keys = 0;
    for (int64_t t = 0; t < kTilesTogether && key < end_; ++t, key += kTile) {
      const int64_t count = end_ - key < kTile ? end_ - key : kTile;
      const Sight sight = lanes.sight(key, count);
      if (sight == Sight::None) continue;
      float *weights = weights_ + keys * kPanel, *grads = grads_ + keys * kPanel;
      tile(batch, head, panel, lanes, sight, key, count, weights, grads);
      outer_sums(weights, count, queries_.grad_rows(panel), queries_.value_row(),
                 grad_v_ + (key - begin_) * queries_.value_row());
      outer_sums(grads, count, queries_.rows(panel), queries_.row(), grad_k_ + (key - begin_) * queries_.row());
      runs[number++] = {rows_ + (key - begin_) * a_.features, grads, count};
      keys += count;
    }
    if (number > 0) weighted_sums<Single>(runs, number, a_.features, a_.features, nullptr, grad_queries);
  }

  // The probabilities P of a tile, and dS = P (dP - delta).
  void tile(int64_t batch, int64_t head, int64_t panel, const Lanes& lanes, Sight sight, int64_t key, int64_t count,
            float* weights, float* grads) {
    const int64_t index = (key - begin_) / kTile * kTileRow;
    scores<Single>(key_tiles_ + index * a_.features, count, queries_.turned(panel), a_.features, 1.0f, weights);
    scores<Single>(value_tiles_ + index * a_.value_features, count, queries_.turned_grad(panel), a_.value_features,
                   1.0f, grads);
    if (a_.mask.slopes || a_.mask.bias.data || a_.mask.keep.data || sight == Sight::Part)
      adjust(a_, lanes, sight, batch, head, panel * kPanel, rows_in(panel, a_.queries), key, count, weights);
    const float *logs = queries_.logs(panel), *deltas = queries_.deltas(panel);
    for (int64_t n = 0; n < count; ++n)
      for (int half = 0; half < 2; ++half) {
        float *weight = weights + n * kPanel + half * kWidth, *grad = grads + n * kPanel + half * kWidth;
        const F32 p = power_of_two_below_one(load(weight) - load(logs + half * kWidth));
        store(weight, p);
        store(grad, p * (load(grad) - load(deltas + half * kWidth)));
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
  Scratch scratch_;
  QuerySide queries_;
  int64_t most_ = 0, size_ = 0, begin_ = 0, end_ = 0;
  float *key_tiles_, *value_tiles_, *key_rows_, *grad_k_, *grad_v_, *weights_, *grads_;
  const float* rows_ = nullptr;
};

// The gradients of a panel of queries: the sum of those of all parts, in their order.
DGM_INLINE void finish_queries(const BackwardArgs& a, int64_t batch, int64_t head, int64_t panel) {
  const int64_t panels = panels_of(a.queries), size = a.features * kPanel;
  const int64_t apart = a.batch * a.heads * panels * size;
  float* sums = a.grad_panels + ((batch * a.heads + head) * panels + panel) * size;
  for (int64_t part = 1; part < a.parts; ++part)
    for (int64_t i = 0; i < size; i += kWidth) store(sums + i, load(sums + i) + load(sums + part * apart + i));
  alignas(64) float factors[kPanel];
  for (int half = 0; half < 2; ++half) store(factors + half * kWidth, broadcast_float(a.scale));
  write_panel(sums, rows_in(panel, a.queries), a.features, factors, a.rope, a.mask.first + panel * kPanel, a.grad_q,
              row_at(a.grad_q, batch, head, panel * kPanel));
}

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::attention
