// Attention forward: panels of queries against blocks of keys, with the softmax's denominator kept as they go by.
#pragma once

#include "attention/mask.h"
#include "attention/rows.h"

namespace dgm::attention {
namespace DGM_ISA_NAMESPACE {
namespace {

// A block of keys that a panel looks at: the tiles of which any key is seen, their scores one after the other.
struct Block {
  Run runs[kTilesTogether];  // rows of the values (in pairs: of pairs) and weights
  int64_t number = 0, keys = 0;
};

// What the units of a head share, and what a unit of work keeps.
template <class Lane>
class Forward {
 public:
  Forward(const ForwardArgs& a, float* memory) : a_(a) {
    Scratch scratch(memory);
    depth_ = depth_of<Lane>(a.features);
    tiles_ = scratch.take(ceil_divide(a.keys, kTile) * kTileRow * depth_);
    value_rows_ = scratch.take(depth_of<Lane>(a.keys + kTile) * a.value_features);
    queries_ = scratch.take(a.panels * kPanel * depth_);
    sums_ = scratch.take(kPanel * (a.panels * a.value_features + kWidth));
    largest_ = scratch.take(a.panels * kPanel), denominators_ = scratch.take(a.panels * kPanel);
    scores_ = scratch.take(kBlockKeys * kPanel), pairs_ = scratch.take(kBlockKeys / 2 * kPanel);
    size_ = scratch.taken(memory);
  }

  int64_t size() const { return size_; }

  void unit(int64_t batch, int64_t head, int64_t index) {
    prepare(batch, head / (a_.heads / a_.key_heads));
    const int64_t first = index * a_.panels, last = panels_of(a_.queries);
    const int64_t panels = last - first < a_.panels ? last - first : a_.panels;
    Lanes lanes[kMostPanels];
    int64_t begin = a_.keys, end = 0;
    for (int64_t p = 0; p < panels; ++p) {
      lanes[p] = Lanes(a_.mask, (first + p) * kPanel, queries_in(first + p), a_.keys);
      if (lanes[p].first_key() < begin) begin = lanes[p].first_key();
      if (lanes[p].last_key() > end) end = lanes[p].last_key();
      start(batch, head, first + p, p);
    }
    for (int64_t key = begin / kBlockKeys * kBlockKeys; key < end; key += kBlockKeys)
      for (int64_t p = 0; p < panels; ++p) visit(batch, head, first + p, p, lanes[p], key);
    for (int64_t p = 0; p < panels; ++p) finish(batch, head, first + p, p);
  }

  static constexpr int64_t kMostPanels = 4;

 private:
  int64_t queries_in(int64_t panel) const { return rows_in(panel, a_.queries); }

  // Keys in tiles and values in rows, of a head that others may share.
  void prepare(int64_t batch, int64_t key_head) {
    if (batch == batch_ && key_head == key_head_) return;
    batch_ = batch, key_head_ = key_head;
    make_tiles<Lane>(a_.k, batch, key_head, 0, a_.keys, a_.features, a_.rope, tiles_);
    if constexpr (Lane::kPairs) {
      pair_rows(a_.v, batch, key_head, a_.keys, a_.value_features, value_rows_);
      values_ = value_rows_;
    } else {
      values_ = dense_rows(a_.v, batch, key_head, 0, a_.keys, a_.value_features, {}, 0, a_.value_features, value_rows_);
    }
  }

  void start(int64_t batch, int64_t head, int64_t panel, int64_t p) {
    turn_rows<Lane>(a_.q, batch, head, panel * kPanel, queries_in(panel), kPanel, a_.features, a_.rope,
                    a_.mask.first + panel * kPanel, a_.scale * kLog2E, kPanel, queries_ + p * kPanel * depth_);
    std::memset(sums_ + p * kPanel * a_.value_features, 0, kPanel * a_.value_features * sizeof(float));
    for (int half = 0; half < 2; ++half) {
      store(largest_ + p * kPanel + half * kWidth, broadcast_float(kMinusInfinity));
      store(denominators_ + p * kPanel + half * kWidth, F32{});
    }
  }

  // The scores of a block, their exponentials, and the values that these weigh.
  void visit(int64_t batch, int64_t head, int64_t panel, int64_t p, const Lanes& lanes, int64_t key) {
    Block block;
    const bool always = a_.mask.slopes || a_.mask.bias.data || a_.mask.keep.data;
    for (int64_t t = 0; t < kTilesTogether && key < a_.keys; ++t, key += kTile) {
      const int64_t count = a_.keys - key < kTile ? a_.keys - key : kTile;
      const Sight sight = lanes.sight(key, count);
      if (sight == Sight::None) continue;
      float* to = scores_ + block.keys * kPanel;
      scores<Lane>(tiles_ + key / kTile * kTileRow * depth_, count, queries_ + p * kPanel * depth_, depth_,
                   a_.scale * kLog2E, to);
      if (always || sight == Sight::Part)
        adjust(a_, lanes, sight, batch, head, panel * kPanel, queries_in(panel), key, count, to);
      if constexpr (Lane::kPairs) {
        block.runs[block.number] = {values_ + key / 2 * a_.value_features, pairs_ + block.keys / 2 * kPanel,
                                    (count + 1) / 2};
      } else {
        block.runs[block.number] = {values_ + key * a_.value_features, to, count};
      }
      block.number += 1, block.keys += count;
    }
    if (block.number == 0) return;
    alignas(64) float factors[kPanel];
    exponentials(block.keys, largest_ + p * kPanel, denominators_ + p * kPanel, factors);
    weighted_sums<Lane>(block.runs, block.number, a_.value_features, a_.value_features, factors,
                        sums_ + p * kPanel * a_.value_features);
  }

  // Scores s become 2^(s - m), m the greatest so far of each query; `factors` are for what was summed with an older m.
  void exponentials(int64_t keys, float* largest, float* denominators, float* factors) {
    F32 most[2] = {load(largest), load(largest + kWidth)}, sum[2] = {};
    for (int64_t n = 0; n < keys; ++n)
      for (int half = 0; half < 2; ++half) most[half] = larger(load(scores_ + n * kPanel + half * kWidth), most[half]);
    F32 shift[2];
    for (int half = 0; half < 2; ++half) {
      shift[half] = most[half] == kMinusInfinity ? F32{} : most[half];  // of a query that has seen nothing
      store(factors + half * kWidth, power_of_two_below_one(load(largest + half * kWidth) - shift[half]));
      store(largest + half * kWidth, most[half]);
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
      store(pairs_ + n / 2 * kPanel + half * kWidth, pair(low, high));
    } else {
      store(at, low);
      store(at + kPanel, high);  // of an odd number behind the last key, where nothing is read
    }
  }

#if defined(__AVX512BF16__)
  static DGM_INLINE_METHOD F32 pair(F32 low, F32 high) {
    const __m512bh both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low));
    const U32 halves = reinterpret_cast<U32>(both);
    return bit_cast<F32>(interleave_halves(halves));
  }

  // Words 0, 16, 1, 17, ... of 32 words of 16 bits.
  static DGM_INLINE_METHOD U32 interleave_halves(U32 halves) {
    alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i order = load_unaligned<__m512i>(kOrder);
    return reinterpret_cast<U32>(_mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(halves)));
  }
#else
  static DGM_INLINE_METHOD F32 pair(F32 low, F32) { return low; }
#endif

  void finish(int64_t batch, int64_t head, int64_t panel, int64_t p) {
    const int64_t query = panel * kPanel, count = queries_in(panel);
    alignas(64) float factors[kPanel], logs[kPanel];
    for (int half = 0; half < 2; ++half) {
      const F32 sum = load(denominators_ + p * kPanel + half * kWidth);
      const F32 most = load(largest_ + p * kPanel + half * kWidth);
      const auto blind = sum == 0.0f;
      store(factors + half * kWidth, blind ? F32{} : 1.0f / sum);
      const F32 log = most * kLn2 + logarithm(blind ? broadcast_float(1.0f) : sum);
      store(logs + half * kWidth, blind ? broadcast_float(kMinusInfinity) : log);
    }
    std::memcpy(a_.lse + (batch * a_.heads + head) * a_.queries + query, logs, count * sizeof(float));
    write_panel(sums_ + p * kPanel * a_.value_features, count, a_.value_features, factors, {}, 0, a_.out,
                row_at(a_.out, batch, head, query));
  }

  const ForwardArgs& a_;
  int64_t depth_ = 0, size_ = 0, batch_ = -1, key_head_ = -1;
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
