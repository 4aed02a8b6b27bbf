// Normal noise of several samples in one run. Where samples end between groups of lanes, a group has one sample; else
// every lane counts for itself which sample and which element it is at.
#pragma once

#include "common/philox.h"

namespace dgm {
namespace DGM_ISA_NAMESPACE {
namespace {

constexpr int kBlockCounters = kBlock / 4;  // a counter makes four normal numbers
constexpr int kHalves = 2 * kGroups;        // vectors of 64-bit lanes that hold a block's counters

typedef int64_t I64 __attribute__((vector_size(4 * kWidth)));
typedef Pack<U64, kHalves> Lanes;

// Lane l of a group works out counter (l % 4) * kWidth / 4 + l / 4 of it: after transpose4 the elements are in order.
// The even lanes and the odd ones are two vectors of 64-bit lanes, as the multiply wants them.
struct LaneOrder {
  uint64_t counter[kBlockCounters] = {};
  constexpr LaneOrder() {
    for (int group = 0; group < kGroups; ++group)
      for (int lane = 0; lane < kWidth; ++lane) {
        const int place = (2 * group + lane % 2) * (kWidth / 2) + lane / 2;
        counter[place] = static_cast<uint64_t>(group * kWidth + lane % 4 * (kWidth / 4) + lane / 4);
      }
  }
};

constexpr LaneOrder kLaneOrder;

// The noise of rows [row, ...) from element `first` on, `count` elements of each (`first` is a multiple of 4). A row
// has ceil(count / 4) counters, so that its numbers lie at a distance of 4 ceil(count / 4) in what block() writes.
class NormalStream {
 public:
  NormalStream(const NoiseArgs& noise, int64_t batch, int64_t row, int64_t first, int64_t count)
      : noise_(noise), batch_(batch), key_(philox_key(noise)) {
    counters_ = count > 0 ? (count + 3) / 4 : 1;
    first_ = first / 4;
    first_row_ = row;
    if (whole_groups()) return;
    rows_a_block_ = kBlockCounters / counters_;
    rest_ = kBlockCounters % counters_;
    place(row);
  }

  // From the beginning, at this step of the key.
  void start(int64_t step) {
    step_ = step;
    group_row_ = first_row_;
    group_counter_ = 0;
    if (whole_groups()) return;
    row_ = start_row_;
    counter_ = start_counter_;
  }

  // The next kBlock numbers.
  void block(float* to) { whole_groups() ? block_of_groups(to) : block_of_lanes(to); }

 private:
  bool whole_groups() const { return counters_ % kWidth == 0; }

  __attribute__((noinline)) void block_of_groups(float* to) {
    Lanes counter, word[4];
    PhiloxStart<Lanes> start;
    DGM_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      const int64_t row = group_row_ < batch_ ? group_row_ : batch_ - 1;  // the last block may reach further
      const PhiloxStart<uint32_t> of_row = philox_start(key_, noise_, row, step_);
      for (int i = 2 * g; i < 2 * g + 2; ++i) {
        const U64 number = load_unaligned<U64>(kLaneOrder.counter + i % 2 * (kWidth / 2));
        counter.v[i] = number + static_cast<uint64_t>(first_ + group_counter_);
        start.x1.v[i] = broadcast<U64>(of_row.x1);
        start.x2.v[i] = broadcast<U64>(of_row.x2);
        start.x3.v[i] = broadcast<U64>(of_row.x3);
        start.x4.v[i] = broadcast<U64>(of_row.x4);
      }
      group_counter_ += kWidth;
      if (group_counter_ == counters_) group_counter_ = 0, ++group_row_;
    }
    philox(counter, start, key_, word);
    store_normals(word, to);
  }

  __attribute__((noinline)) void block_of_lanes(float* to) {
    Lanes c1, sample, word[4];
    key_of_lanes(c1, sample);
    const Lanes c3 = (sample >> 32 & 0xFFFFFFu) + (static_cast<uint64_t>(noise_.stream) << 24);
    philox(counter_ + static_cast<uint64_t>(first_), c1, sample, c3, key_, word);
    advance();
    store_normals(word, to);
  }

  // Which counter of a row a lane begins with, and how many rows further; exact for the few counters of a block.
  void place(int64_t row) {
    const uint64_t reciprocal = static_cast<uint64_t>((65536 + counters_ - 1) / counters_);
    for (int i = 0; i < kHalves; ++i) {
      const U64 number = load_unaligned<U64>(kLaneOrder.counter + i * kWidth / 2);
      const U64 further = (number * reciprocal) >> 16;
      start_row_.v[i] = further + static_cast<uint64_t>(row);
      start_counter_.v[i] = number - further * static_cast<uint64_t>(counters_);
    }
  }

  DGM_INLINE_METHOD void advance() {
    DGM_UNROLL
    for (int i = 0; i < kHalves; ++i) {
      const U64 next = counter_.v[i] + static_cast<uint64_t>(rest_);
      const U64 over = reinterpret_cast<U64>(reinterpret_cast<I64>(next) >= I64{} + counters_);  // all bits, or none
      counter_.v[i] = next - (over & static_cast<uint64_t>(counters_));
      row_.v[i] = row_.v[i] + static_cast<uint64_t>(rows_a_block_) - over;
    }
  }

  DGM_INLINE_METHOD void key_of_lanes(Lanes& c1, Lanes& sample) const {
    const uint64_t step = static_cast<uint64_t>(noise_.step + step_);
    if (__builtin_expect(!noise_.samples && !noise_.step_tensor, 1)) {
      for (int i = 0; i < kHalves; ++i) c1.v[i] = U64{} + step;
      sample = row_ + static_cast<uint64_t>(noise_.first_sample);
      return;
    }
    for (int i = 0; i < kHalves; ++i)
      for (int lane = 0; lane < kWidth / 2; ++lane) {
        const int64_t given = static_cast<int64_t>(row_.v[i][lane]), row = given < batch_ ? given : batch_ - 1;
        const int64_t more = noise_.step_tensor ? noise_.step_tensor[row * noise_.step_stride] : 0;
        c1.v[i][lane] = step + static_cast<uint64_t>(more);
        sample.v[i][lane] = static_cast<uint64_t>(noise_.samples ? noise_.samples[row] : noise_.first_sample + row);
      }
  }

  static DGM_INLINE_METHOD void store_normals(const Lanes (&word)[4], float* to) {
    Pack<U32, kHalves> radius, angle;
    for (int g = 0; g < kGroups; ++g)
      for (int half = 0; half < 2; ++half) {
        const Lanes &r = word[2 * half], &a = word[2 * half + 1];
        radius.v[2 * g + half] = zip_lower_halves(r.v[2 * g], r.v[2 * g + 1]);
        angle.v[2 * g + half] = zip_lower_halves(a.v[2 * g], a.v[2 * g + 1]);
      }
    Pack<F32, kHalves> cosine, sine;
    box_muller(radius, angle, cosine, sine);
    DGM_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      F32 v[4] = {cosine.v[2 * g], sine.v[2 * g], cosine.v[2 * g + 1], sine.v[2 * g + 1]};
      transpose4(v);
      for (int i = 0; i < 4; ++i) store(to + (4 * g + i) * kWidth, v[i]);
    }
  }

  const NoiseArgs& noise_;
  const int64_t batch_;
  const PhiloxKey key_;
  int64_t counters_, first_, first_row_, step_ = 0;
  int64_t group_row_, group_counter_;                // of the next group
  int64_t rows_a_block_, rest_;                      // of lanes that count for themselves
  Lanes start_row_, start_counter_, row_, counter_;  // likewise
};

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm
