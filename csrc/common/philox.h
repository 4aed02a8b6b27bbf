// Counter-based noise: Philox4x32-10 and Box-Muller, for CPU vectors and for CUDA threads.
// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the layout of the counter is in
// docs/design.md.
#pragma once

#include "common/dtype.h"

#ifdef __CUDACC__
#include "common/scalar.cuh"
#else
#include "common/vec.h"
#endif

namespace dgm {
namespace DGM_ISA_NAMESPACE {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

// What the rounds need of one seed: k0, k1 of each.
struct PhiloxKey {
  uint32_t k[20];
};

DGM_INLINE PhiloxKey philox_key(uint64_t seed) {
  PhiloxKey key;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
    key.k[2 * round] = k0;
    key.k[2 * round + 1] = k1;
  }
  return key;
}

// Of one (sample, step, stream): only c0 differs between the elements of a sample, so half of the first two rounds is
// the same for all of them and is done here once. X is uint32_t, or W for lanes of several samples.
template <class X>
struct PhiloxStart {
  X x1, x2, x3, x4;
};

DGM_INLINE PhiloxStart<uint32_t> philox_start(const PhiloxKey& key, uint64_t sample, uint32_t step, uint32_t stream) {
  const uint32_t c2 = static_cast<uint32_t>(sample);
  const uint32_t c3 = (stream << 24) | (static_cast<uint32_t>(sample >> 32) & 0xFFFFFFu);
  const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
  const uint32_t c0 = static_cast<uint32_t>(p1 >> 32) ^ step ^ key.k[0];  // after round 1
  const uint64_t q0 = static_cast<uint64_t>(kPhiloxM0) * c0;
  return {c3 ^ key.k[1], static_cast<uint32_t>(p1) ^ key.k[2], static_cast<uint32_t>(q0 >> 32) ^ key.k[3],
          static_cast<uint32_t>(q0) ^ key.k[5]};
}

// The rounds from kFirst on, which count from 0 to 9. W holds 32-bit counters: uint32_t, or CPU vectors of 64-bit lanes
// whose upper halves are ignored (a widening multiply reads only the lower ones) and left undefined.
template <int kFirst, class W>
DGM_INLINE void philox_rounds(W c0, W c1, W c2, W c3, const PhiloxKey& key, W (&word)[4]) {
  DGM_UNROLL
  for (int round = kFirst; round < 10; ++round) {
    W hi0, lo0, hi1, lo1;
    multiply(kPhiloxM0, c0, hi0, lo0);
    multiply(kPhiloxM1, c2, hi1, lo1);
    c0 = hi1 ^ c1 ^ broadcast<W>(key.k[2 * round]);
    c2 = hi0 ^ c3 ^ broadcast<W>(key.k[2 * round + 1]);
    c1 = lo1;
    c3 = lo0;
  }
  word[0] = c0;
  word[1] = c1;
  word[2] = c2;
  word[3] = c3;
}

// The four output words of counters `c0`.
template <class W>
DGM_INLINE void philox(W c0, const PhiloxStart<W>& start, const PhiloxKey& key, W (&word)[4]) {
  W hi0, lo0, hi1, lo1;
  multiply(kPhiloxM0, c0, hi0, lo0);  // round 1
  W c2 = hi0 ^ start.x1;
  multiply(kPhiloxM1, c2, hi1, lo1);  // round 2
  c0 = hi1 ^ start.x2;
  c2 = lo0 ^ start.x3;
  W c1 = lo1;
  multiply(kPhiloxM0, c0, hi0, lo0);  // round 3
  multiply(kPhiloxM1, c2, hi1, lo1);
  c0 = hi1 ^ c1 ^ broadcast<W>(key.k[4]);
  c2 = hi0 ^ start.x4;
  c1 = lo1;
  W c3 = lo0;
  philox_rounds<3>(c0, c1, c2, c3, key, word);
}

// What all elements of one (seed, sample, step, stream) share.
struct PhiloxSample {
  PhiloxKey key;
  PhiloxStart<uint32_t> start;
};

template <class W>
DGM_INLINE void philox(W c0, const PhiloxSample& s, W (&word)[4]) {
  const PhiloxStart<W> start = {broadcast<W>(s.start.x1), broadcast<W>(s.start.x2), broadcast<W>(s.start.x3),
                                broadcast<W>(s.start.x4)};
  philox(c0, start, s.key, word);
}

// The same where every lane has a counter of its own, all four words of it.
template <class W>
DGM_INLINE void philox(W c0, W c1, W c2, W c3, const PhiloxKey& key, W (&word)[4]) {
  philox_rounds<0>(c0, c1, c2, c3, key, word);
}

// ---- Functions. Each is within 2 ulp on the arguments that noise gives it. F is a float or CPU vectors of them.

// ln(1 + f) for 1 + f in [3/4, 3/2), a minimax polynomial.
template <class F>
DGM_INLINE F log_of_mantissa(F f) {
  auto p = f * 0.05559724196791649f - 0.12114135921001434f;
  p = p * f + 0.14904440939426422f;
  p = p * f - 0.16788817942142487f;
  p = p * f + 0.19982320070266724f;
  p = p * f - 0.24996361136436462f;
  p = p * f + 0.33333471417427063f;
  p = p * f - 0.5f;
  return p * (f * f) + f;
}

// -2 ln(u) for u in (0, 1]: u = 2^e (1 + f).
template <class F>
DGM_INLINE F minus_two_log(F u) {
  F e, f;
  split_exponent(u, e, f);
  return e * -1.3862943611198906f - log_of_mantissa(f) * 2.0f;
}

// sin and cos of `quarters` quarter turns, 0 to 4: the nearest whole one and minimax polynomials for the rest.
template <class F>
DGM_INLINE void sincos_quarters(F quarters, F& sine, F& cosine) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the nearest integer
  const auto shifted = quarters + kShift;
  const auto r = quarters - (shifted - kShift);
  const auto whole = bit_cast<U32>(shifted);
  const auto z = r * r;
  auto s = z * -0.00460165785625577f + 0.07968003302812576f;
  auto c = z * -0.020417282357811928f + 0.2536032199859619f;
  s = s * z - 0.6459634900093079f;
  c = c * z - 1.2336976528167725f;
  s = (s * z + 1.5707963705062866f) * r;
  c = c * z + 1.0f;
  const auto turned = whole << 30;  // bit 1, on top now: the sign of the sine; that of whole + 1 is the cosine's
  sine = flip_sign(select_odd(whole, c, s), turned);
  cosine = flip_sign(select_odd(whole, s, c), turned + 0x40000000u);
}

// A word as a number in (0, 1].
template <class U>
DGM_INLINE auto uniform(U word) {
  return to_float(word) * 0x1p-32f + 0x1p-33f;
}

// Two words as two independent standard normal numbers. 4 u is exact, so the angle may be taken in quarter turns.
template <class U, class F>
DGM_INLINE void box_muller(U radius_word, U angle_word, F& first, F& second) {
  const F radius = square_root(minus_two_log(uniform(radius_word)));
  F sine, cosine;
  sincos_quarters(to_float(angle_word) * 0x1p-30f + 0x1p-31f, sine, cosine);
  first = radius * cosine;
  second = radius * sine;
}

DGM_INLINE PhiloxKey philox_key(const NoiseArgs& noise) {
  return philox_key(static_cast<uint64_t>(noise.seed_tensor ? noise.seed_tensor[0] : noise.seed));
}

DGM_INLINE PhiloxStart<uint32_t> philox_start(const PhiloxKey& key, const NoiseArgs& noise, int64_t row, int64_t step) {
  const int64_t sample = noise.samples ? noise.samples[row] : noise.first_sample + row;
  if (noise.step_tensor) step += noise.step_tensor[row * noise.step_stride];
  return philox_start(key, static_cast<uint64_t>(sample), static_cast<uint32_t>(noise.step + step), noise.stream);
}

DGM_INLINE PhiloxSample philox_sample(const NoiseArgs& noise, int64_t row, int64_t step) {
  const PhiloxKey key = philox_key(noise);
  return {key, philox_start(key, noise, row, step)};
}

}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm
