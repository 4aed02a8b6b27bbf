// CPU loops of a Gaussian with full covariance: z = mu + L eps, whose rows are read up to the diagonal.
#pragma once

#include "common/panel.h"
#include "latent/chunk.h"

namespace dgm::latent {
namespace DGM_ISA_NAMESPACE {
namespace {

// What a sample needs beside L: its own row, noise, and a row of L where that is no float32.
struct TrilRows {
  explicit TrilRows(int64_t features) : mu(features + kBlock), eps(features + kBlock), row(features + kBlock) {}
  Array<float> mu, eps, row;
};

DGM_INLINE const float* floats_at(const RowsIn& rows, int64_t index, int64_t count, float* buffer) {
  const char* from = static_cast<const char*>(rows.data) + index * element_size(rows.dtype);
  if (rows.dtype == DType::Float32) return reinterpret_cast<const float*>(from);
  convert_to_floats(from, rows.dtype, count, buffer);
  return buffer;
}

DGM_INLINE const float* noise_of(const TrilArgs& a, int64_t sample, float* buffer) {
  const int64_t features = a.shape.elements;
  if (!a.noise.drawn)
    return floats_at({a.noise.given.data, a.noise.given.dtype, features}, sample * features, features, buffer);
  NormalStream stream(a.noise, a.shape.batch, sample, 0, features);
  stream.start(0);
  for (int64_t i = 0; i < features; i += kBlock) stream.block(buffer + i);
  return buffer;
}

// Adds l.eps and l.l up over the first `count` features.
DGM_INLINE void row_sums(const float* l, const float* eps, int64_t count, double& product, Sum& squares) {
  Sum sum;
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const F32 v = load(l + i);
    sum.add(v * load(eps + i));
    squares.add(v * v);
  }
  if (i < count) {
    const F32 v = load_part(l + i, count - i);
    sum.add(v * load_part(eps + i, count - i));
    squares.add(v * v);
  }
  product = sum.value();
}

DGM_NOINLINE void tril_sample(const TrilArgs& a, int64_t sample, TrilRows& b, float* z) {
  const int64_t features = a.shape.elements;
  const float* mu = floats_at(a.mu, sample * a.mu.stride, features, b.mu.data());
  const float* eps = noise_of(a, sample, b.eps.data());
  Sum squares;
  double means = 0.0, logs = 0.0;
  for (int64_t i = 0; i < features; ++i) {
    const float* l = floats_at(a.factor, sample * a.factor.stride + i * features, i + 1, b.row.data());
    double product;
    row_sums(l, eps, i + 1, product, squares);
    z[i] = static_cast<float>(static_cast<double>(mu[i]) + product);
    means += static_cast<double>(mu[i]) * static_cast<double>(mu[i]);
    logs += __builtin_log(static_cast<double>(l[i]));
  }
  a.kl[sample] = static_cast<float>(0.5 * (squares.value() + means - static_cast<double>(features)) - logs);
}

DGM_NOINLINE void tril_sample_backward(const TrilArgs& a, int64_t sample, TrilRows& b, float* to_mu, float* to_row) {
  const int64_t features = a.shape.elements;
  const float* mu = floats_at(a.mu, sample * a.mu.stride, features, b.mu.data());
  const float* eps = noise_of(a, sample, b.eps.data());
  const float k = a.grad_kl ? a.grad_kl[sample] : 0.0f;
  const char* grad = static_cast<const char*>(a.grad.data);
  if (grad)
    convert_to_floats(grad + sample * a.grad.stride * element_size(a.grad.dtype), a.grad.dtype, features, to_mu);
  else
    std::memset(to_mu, 0, features * sizeof(float));
  const int size = element_size(a.grad_factor.dtype);
  char* out = static_cast<char*>(a.grad_factor.data) + sample * features * features * size;
  for (int64_t i = 0; i < features; ++i, out += features * size) {
    const float* l = floats_at(a.factor, sample * a.factor.stride + i * features, i + 1, b.row.data());
    const float g = to_mu[i];
    float* row = a.grad_factor.dtype == DType::Float32 ? reinterpret_cast<float*>(out) : to_row;
    for (int64_t j = 0; j <= i; ++j) row[j] = g * eps[j] + k * l[j];
    if (a.grad_kl) row[i] -= k / l[i];
    std::memset(row + i + 1, 0, (features - i - 1) * sizeof(float));
    if (row == to_row) convert_from_floats(row, features, a.grad_factor.dtype, out);
  }
  for (int64_t i = 0; i < features; ++i) to_mu[i] += k * mu[i];
}

}  // namespace
}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::latent
