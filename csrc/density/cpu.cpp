// CPU loops of the density op; built once per instruction set, without torch headers.
#include "density/cpu.h"

#include <type_traits>

#include "density/gather.h"
#include "density/moments.h"

namespace dgm::density {
namespace DGM_ISA_NAMESPACE {
namespace {

// Calls `call` with the work that `gather` stands for. Means and kernels have a number for all components, gradients
// any form.
template <class Call>
void with_gathering(const GatherArgs& a, float* memory, const Call& call) {
  const auto numbers = [&](auto gather) {
    if (a.mixture.form == Form::Products)
      call(Gathering<Products, gather()>(a, Products(a.mixture), memory));
    else
      call(Gathering<Differences, gather()>(a, Differences(a.mixture), memory));
  };
  switch (a.gather) {
    case Gather::Mean:
      return numbers(std::integral_constant<Gather, Gather::Mean>{});
    case Gather::MeanGradient:
      return numbers(std::integral_constant<Gather, Gather::MeanGradient>{});
    case Gather::RbfGradient:
      return numbers(std::integral_constant<Gather, Gather::RbfGradient>{});
    case Gather::RbfSum:
      return numbers(std::integral_constant<Gather, Gather::RbfSum>{});
    case Gather::PolynomialGradient:
      return call(Gathering<Dots, Gather::PolynomialGradient>(a, Dots(a.mixture), memory));
    case Gather::PolynomialSum:
      return call(Gathering<Dots, Gather::PolynomialSum>(a, Dots(a.mixture), memory));
    default:
      break;
  }
  if (a.mixture.form == Form::Diagonals)
    call(Gathering<Diagonals, Gather::Gradient>(a, Diagonals(a.mixture), memory));
  else if (a.mixture.form == Form::Triangles)
    call(Gathering<Triangles, Gather::Gradient>(a, Triangles(a.mixture), memory));
  else
    numbers(std::integral_constant<Gather, Gather::Gradient>{});
}

}  // namespace

int64_t panel_width() { return kPanel; }
int64_t vector_width() { return kWidth; }

int64_t block_of(Form form) {
  int64_t block = Dots::kBlock;
  if (form == Form::Dots) return block;
  with_scorer(Mixture{.form = form}, [&](auto scorer) { block = decltype(scorer)::kBlock; });
  return block;
}

float greatest_square(const float* x, const float* middle, int64_t features, int64_t begin, int64_t end) {
  float greatest = 0.0f;
  for (int64_t n = begin; n < end; ++n) {
    F32 sums = {};
    for (int64_t d = 0; d < features; d += kWidth) {
      const int64_t left = features - d;
      const F32 v = load_first(x + n * features + d, left) - keep_first(left, load(middle + d));
      sums += v * v;
    }
    const float square = static_cast<float>(sum(sums));
    if (!(square <= greatest)) greatest = square;  // NaN too
  }
  return greatest;
}

int64_t log_prob_floats(const LogProbArgs& a) {
  int64_t size = 0;
  with_scorer(a.mixture, [&](auto scorer) { size = LogProb(a, scorer, nullptr).size(); });
  return size;
}

void log_prob(const LogProbArgs& a, float* memory, int64_t begin, int64_t end) {
  with_scorer(a.mixture, [&](auto scorer) {
    LogProb work(a, scorer, memory);
    for (int64_t i = begin; i < end; ++i) work.unit(i);
  });
}

void log_prob_finish(const LogProbArgs& a, int64_t begin, int64_t end) {
  const LogProb work(a, Products(a.mixture), nullptr);
  for (int64_t i = begin; i < end; ++i) work.finish(i);
}

void responsibilities(const LogProbArgs& a, float* memory, int64_t begin, int64_t end) {
  with_scorer(a.mixture, [&](auto scorer) {
    LogProb work(a, scorer, memory);
    for (int64_t i = begin; i < end; ++i) work.responsibilities(i);
  });
}

int64_t gather_floats(const GatherArgs& a) {
  int64_t size = 0;
  with_gathering(a, nullptr, [&](auto work) { size = work.size(); });
  return size;
}

void gather(const GatherArgs& a, float* memory, int64_t begin, int64_t end) {
  with_gathering(a, memory, [&](auto work) {
    for (int64_t i = begin; i < end; ++i) work.unit(i);
  });
}

void gather_finish(const GatherArgs& a, int64_t begin, int64_t end) {
  with_gathering(a, nullptr, [&](const auto& work) {
    for (int64_t i = begin; i < end; ++i) work.finish(i);
  });
}

int64_t moments_floats(const MomentArgs& a) {
  int64_t size = 0;
  with_scorer(a.mixture, [&](auto scorer) { size = Moments(a, scorer, nullptr).size(); });
  return size;
}

void moments(const MomentArgs& a, float* memory, int64_t begin, int64_t end) {
  with_scorer(a.mixture, [&](auto scorer) {
    Moments work(a, scorer, memory);
    for (int64_t i = begin; i < end; ++i) work.unit(i);
  });
}

void moments_finish(const MomentArgs& a, int64_t begin, int64_t end) {
  with_scorer(a.mixture, [&](auto scorer) {
    const Moments work(a, scorer, nullptr);
    for (int64_t i = begin; i < end; ++i) work.finish(i);
  });
}

}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::density
