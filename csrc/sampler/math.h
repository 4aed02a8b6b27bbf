// The formulas of the sampler op, templated on the scalar: CPU vectors and CUDA floats. Columns as in sampler/table.py.
#pragma once

#include "common/philox.h"
#include "sampler/args.h"

namespace dgm::sampler {
namespace DGM_ISA_NAMESPACE {

using namespace ::dgm::DGM_ISA_NAMESPACE;

struct StepRow {
  float px, pm, lo, hi, ax, a0, am, ah, an, ak, sk, pad;
};

struct TrainingRow {
  float alpha, sigma, cx, cn, weight, pad[3];
};

// m = m_u + w (m_c - m_u)
template <class F>
DGM_INLINE F guided(F conditional, F unconditional, float scale) {
  return unconditional + scale * (conditional - unconditional);
}

// x0 = clip(px x + pm m, lo, hi), or clip(px x + pm m, -s, s) / s
template <class F>
DGM_INLINE F clean_sample(const StepRow& r, F x, F m) {
  return at_most(at_least(r.px * x + r.pm * m, r.lo), r.hi);
}

template <class F>
DGM_INLINE F clean_sample(const StepRow& r, F x, F m, float s) {
  return at_most(at_least(r.px * x + r.pm * m, -s), s) / s;
}

// ax x + a0 x0 + am m; history and noise are added where there are any
template <class F>
DGM_INLINE F affine(const StepRow& r, F x, F x0, F m) {
  return r.ax * x + r.a0 * x0 + r.am * m;
}

// (1 - mask) x' + mask (ak known + sk noise): exact where the mask is 0 or 1
template <class F>
DGM_INLINE F inpainted(const StepRow& r, F next, F known, F mask, F noise) {
  return mask * (r.ak * known + r.sk * noise) + (1.0f - mask) * next;
}

// x_t = alpha x0 + sigma noise
template <class F>
DGM_INLINE F noised(const TrainingRow& r, F x0, F noise) {
  return r.alpha * x0 + r.sigma * noise;
}

// m - (cx x0 + cn noise)
template <class F>
DGM_INLINE F residual(const TrainingRow& r, F m, F x0, F noise) {
  return m - (r.cx * x0 + r.cn * noise);
}

}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::sampler
