// Times the CPU loops of the sampler op alone, on one thread: no Python, no dispatcher, no allocation.
//
//   g++ -O3 -std=c++20 -fno-math-errno -fno-trapping-math -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c
//     -mprefer-vector-width=512 -DDGM_ISA_NAMESPACE=isa_default -Icsrc bench/kernel_alone.cpp csrc/sampler/cpu.cpp
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

#include "sampler/cpu.h"

namespace cpu = dgm::sampler::isa_default;

// Lower quartile of 60 calls, in microseconds.
template <class Call>
double microseconds(const Call& call) {
  std::vector<double> times;
  for (int i = 0; i < 60; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    call();
    times.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count());
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 4];
}

int main() {
  const dgm::sampler::Shape shape{64, 3 * 64 * 64};
  std::vector<float> x(shape.batch * shape.elements, 0.3f), m(x.size(), 0.2f), out(x.size());
  const float row[dgm::sampler::kStepColumns] = {1.0f, -0.5f, -1.0f, 1.0f, 0.5f, 0.5f, 0.0f, 0.0f, 0.1f};
  const int64_t blocks = shape.batch * ((shape.elements + cpu::block_elements() - 1) / cpu::block_elements());

  dgm::sampler::NoiseLikeArgs noise;
  noise.shape = shape;
  noise.noise.drawn = true;
  noise.out.data = out.data();
  const auto draw = [&](dgm::sampler::NoiseKind kind) {
    noise.kind = kind;
    return microseconds([&] { cpu::noise_like(noise, 0, blocks); });
  };

  dgm::sampler::StepArgs step;
  step.shape = shape;
  step.rows.data = row;
  step.rows.count = 1;
  step.noise = noise.noise;
  step.x.data = x.data();
  step.model_output.data = m.data();
  step.out.data = out.data();
  const auto run = [&](bool drawn) {
    step.noise.drawn = drawn;
    return microseconds([&] { cpu::step(step, 0, blocks); });
  };

  std::printf("64x3x64x64 float32, one thread, us: words %.0f, normals %.0f, step with noise %.0f, without %.0f\n",
              draw(dgm::sampler::NoiseKind::Bits), draw(dgm::sampler::NoiseKind::Normal), run(true), run(false));
}
