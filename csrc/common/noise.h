// Normal noise of several samples in one run: every lane counts for itself which sample and which element it is at.
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
      : noise_(noise), batch_(batch) {
    const int64_t seed = noise.seed_tensor ? noise.seed_tensor[0] : noise.seed;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
    for (int round = 0; round < 10; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1)
      key_[2 * round] = k0, key_[2 * round + 1] = k1;
    counters_ = count > 0 ? (count + 3) / 4 : 1;
    first_ = first / 4;
    rows_a_block_ = kBlockCounters / counters_;
    rest_ = kBlockCounters % counters_;
    place(row);
  }

  // From the beginning, at this step of the key.
  void start(int64_t step) {
    row_ = start_row_;
    counter_ = start_counter_;
    step_ = step;
  }

  // The next kBlock numbers.
  __attribute__((noinline)) void block(float* to) {
    Lanes c1, sample, word[4];
    key_of_lanes(c1, sample);
    const Lanes c3 = (sample >> 32 & 0xFFFFFFu) + (static_cast<uint64_t>(noise_.stream) << 24);
    philox(counter_ + static_cast<uint64_t>(first_), c1, sample, c3, key_, word);
    advance();
    store_normals(word, to);
  }

 private:
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
  uint32_t key_[20];
  int64_t counters_, first_, rows_a_block_, rest_, step_ = 0;
  Lanes start_row_, start_counter_, row_, counter_;
};

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm
