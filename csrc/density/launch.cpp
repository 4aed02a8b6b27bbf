// Tensors to kernel arguments, allocation and threads of the density op. CPU only: on GPUs its kernels are Triton's.
#include "density/launch.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/tril.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "density/cpu.h"

namespace dgm::density {

namespace {

constexpr int64_t kWorthAThread = 1 << 17;  // operations on vectors' lanes: waking a thread costs some microseconds
constexpr int64_t kPanelsTogether = 32;     // a block of components is packed once for so many
constexpr int64_t kManyUnits = 64;
constexpr int64_t kMostPartials = 1 << 21;  // floats
constexpr int64_t kSampled = 1024;          // components that tell where the middle of all is
constexpr double kTolerance = 0x1p-9;       // nats that the rounding of products may cost

at::Tensor floats(at::IntArrayRef sizes) { return at::empty(sizes, at::TensorOptions(at::kFloat)); }
at::Tensor doubles(int64_t count) { return at::empty({count}, at::TensorOptions(at::kDouble)); }
float* data(const at::Tensor& x) { return x.mutable_data_ptr<float>(); }

const float* checked(const char* name, const at::Tensor& x, at::IntArrayRef sizes) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, name, " must be float32, got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.sizes() == sizes && x.is_contiguous() && x.is_cpu(), name, " must be contiguous of shape ", sizes,
                    " on the CPU, got ", x.sizes());
  return x.const_data_ptr<float>();
}

// Runs `run(begin, end)` over units of `work` operations each.
template <class Run>
void share(int64_t units, int64_t work, const Run& run) {
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(work, 1));
  at::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) { run(begin, end); });
}

// The same where each thread needs memory of its own.
template <class Run>
void share(int64_t units, int64_t work, int64_t memory, const Run& run) {
  share(units, work, [&](int64_t begin, int64_t end) {
    const at::Tensor own = floats({memory});
    run(data(own), begin, end);
  });
}

// A mixture, and the tensors that it points to.
struct Held {
  Mixture mixture;
  at::Tensor middle, inv;
};

// The mean of some of the components, with zeros up to whole vectors.
at::Tensor middle_of(const at::Tensor& y, bool wanted) {
  const int64_t features = y.size(1), step = std::max<int64_t>(1, y.size(0) / kSampled);
  at::Tensor middle = at::zeros({ceil_divide(features, 16) * 16}, at::TensorOptions(at::kFloat));
  if (wanted) middle.slice(0, 0, features).copy_(y.slice(0, 0, y.size(0), step).mean(0).nan_to_num_(0.0, 0.0, 0.0));
  return middle;
}

double greatest_square(const float* x, const Mixture& a, int64_t rows) {
  constexpr int64_t kRows = 256;
  const auto find = DGM_PICK_ISA(greatest_square);
  std::vector<float> found(ceil_divide(rows, kRows), 0.0f);
  share(static_cast<int64_t>(found.size()), kRows * a.features, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      found[i] = find(x, a.middle, a.features, i * kRows, std::min(rows, (i + 1) * kRows));
  });
  double greatest = 0.0;
  for (const float square : found) greatest = std::isfinite(square) ? std::max<double>(greatest, square) : greatest;
  return greatest;
}

// Whether |x|^2 + |y|^2 - 2 x.y is exact enough, given how far points are from the middle and how narrow components
// are. Of many components some are looked at.
Form form_of_numbers(const Mixture& a, const at::Tensor& y, const at::Tensor& inv, const OptionalTensor& q) {
  if (a.points == 0) return Form::Products;
  const at::Tensor some = y.slice(0, 0, a.components, std::max<int64_t>(1, a.components / kSampled)).contiguous();
  const double points = std::sqrt(greatest_square(a.x, a, a.points));
  const double components = std::sqrt(greatest_square(some.const_data_ptr<float>(), a, some.size(0)));
  const double narrow = std::pow(inv.abs().max().item<float>(), 2) * (present(q) ? q->max().item<float>() : 1.0);
  const double rounding = 0x1p-24 * 0.5 * narrow * std::pow(points + components, 2);
  return rounding <= kTolerance ? Form::Products : Form::Differences;
}

Held hold(DGM_MIXTURE_PARAMETERS, bool gathers = false) {
  TORCH_CHECK_VALUE(x.dim() == 2 && y.dim() == 2 && y.size(0) > 0,
                    "x and y must be [points, features] and "
                    "[components, features] with at least one component, got ",
                    x.sizes(), " and ", y.sizes());
  Held held;
  Mixture& a = held.mixture;
  a.points = x.size(0), a.components = y.size(0), a.features = x.size(1);
  a.x = checked("x", x, {a.points, a.features}), a.y = checked("y", y, {a.components, a.features});
  held.middle = middle_of(y, true), a.middle = held.middle.const_data_ptr<float>();
  held.inv = inv.dim() == 3 && gathers ? inv.tril() : inv;
  if (inv.dim() == 3) {
    a.form = Form::Triangles;
    a.inv = checked("inv", held.inv, {a.components, a.features, a.features});
  } else if (inv.dim() == 2) {
    a.form = Form::Diagonals;
    a.inv = checked("inv", inv, {a.components, a.features});
  } else {
    a.inv_stride = inv.numel() == 1 ? 0 : 1;
    a.inv = checked("inv", inv, {a.inv_stride ? a.components : 1});
  }
  TORCH_CHECK_VALUE(!present(q) || inv.dim() == 1, "q must be absent where inv is not a number a component");
  if (present(q)) a.q = checked("q", *q, {a.points});
  a.offset_stride = offset.numel() == 1 ? 0 : 1;
  a.offset = checked("offset", offset, {a.offset_stride ? a.components : 1});
  if (inv.dim() == 1) a.form = form_of_numbers(a, y, inv, q);
  return held;
}

// Operations that a panel of points costs with all components.
int64_t panel_work(const Mixture& a, int64_t width) {
  const int64_t each = a.form == Form::Triangles ? a.features * a.features / 2 : 2 * a.features;
  return DGM_PICK_ISA(panel_width)() * a.components * (each + width + 16);
}

// `width` numbers a point are kept for every part.
Plan plan_of(const Mixture& a, int64_t width) {
  const int64_t panel = DGM_PICK_ISA(panel_width)(), panels = ceil_divide(a.points, panel);
  const int64_t block = DGM_PICK_ISA(block_of)(a.form), blocks = ceil_divide(a.components, block);
  Plan plan;
  plan.panels = std::max<int64_t>(1, std::min(panels, kPanelsTogether));
  plan.groups = ceil_divide(panels, plan.panels);
  plan.padded = plan.groups * plan.panels * panel;
  const int64_t most = std::max<int64_t>(1, kMostPartials / std::max<int64_t>(1, plan.padded * (width + 2)));
  const int64_t wanted = std::min({ceil_divide(kManyUnits, std::max<int64_t>(plan.groups, 1)), blocks, most});
  plan.part_components = ceil_divide(blocks, wanted) * block;
  plan.parts = ceil_divide(a.components, plan.part_components);
  return plan;
}

int64_t unit_work(const Mixture& a, const Plan& plan, int64_t width) {
  return panel_work(a, width) * plan.panels / plan.parts;
}

// The components about the middle: differences of their sums from a point keep their digits wherever the data lie.
at::Tensor centred(const Held& held, const at::Tensor& y) { return y - held.middle.slice(0, 0, y.size(1)); }

const Mixture& mixture_of(const Held& held) { return held.mixture; }

}  // namespace

std::tuple<at::Tensor, at::Tensor> log_prob(DGM_MIXTURE_PARAMETERS, bool full) {
  const Held held = hold(x, y, inv, q, offset);
  LogProbArgs args;
  args.mixture = mixture_of(held), args.plan = plan_of(args.mixture, 0);
  const int64_t points = args.mixture.points, units = args.plan.groups * args.plan.parts;
  at::Tensor lse = floats({points});
  at::Tensor r = full ? floats({points, args.mixture.components}) : floats({0, 0});
  const at::Tensor partials = floats({2 * args.plan.parts + 1, args.plan.padded});
  args.most = data(partials), args.sums = args.most + args.plan.parts * args.plan.padded;
  args.missing = args.sums + args.plan.parts * args.plan.padded;
  args.lse = data(lse);
  const auto run = DGM_PICK_ISA(log_prob), again = DGM_PICK_ISA(responsibilities);
  const auto finish = DGM_PICK_ISA(log_prob_finish);
  const int64_t memory = DGM_PICK_ISA(log_prob_floats)(args), work = unit_work(args.mixture, args.plan, 0);
  share(units, work, memory, [&](float* own, int64_t begin, int64_t end) { run(args, own, begin, end); });
  share(ceil_divide(points, DGM_PICK_ISA(panel_width)()), 256,
        [&](int64_t begin, int64_t end) { finish(args, begin, end); });
  if (full) {
    args.responsibilities = data(r);
    share(units, work, memory, [&](float* own, int64_t begin, int64_t end) { again(args, own, begin, end); });
    r.div_(r.sum(1, true));  // 1, but for the rounding of the logarithm that they are relative to
  }
  return {std::move(lse), std::move(r)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> moments(const at::Tensor& weight, const at::Tensor& lse,
                                                       DGM_MIXTURE_PARAMETERS) {
  const Held held = hold(x, y, inv, q, offset);
  MomentArgs args;
  args.mixture = mixture_of(held);
  const Mixture& a = args.mixture;
  const bool full = a.form == Form::Triangles, diagonal = a.form == Form::Diagonals;
  const int64_t vector = DGM_PICK_ISA(vector_width)(), panel = DGM_PICK_ISA(panel_width)();
  args.row = ceil_divide(a.features, vector) * vector;
  args.second = full ? (a.features + 1) * args.row : diagonal ? args.row : 1;
  args.blocks = ceil_divide(a.components, DGM_PICK_ISA(block_of)(a.form));
  const int64_t most = std::max<int64_t>(1, 2 * kMostPartials / (a.components * (args.row + args.second)));
  args.parts = std::max<int64_t>(
      1, std::min({most, ceil_divide(kManyUnits, args.blocks), ceil_divide(a.points, kPanelsTogether * panel)}));
  args.part_points = ceil_divide(ceil_divide(a.points, args.parts), panel) * panel;
  args.weight = checked("weight", weight, {a.points}), args.lse = checked("lse", lse, {a.points});
  const at::Tensor partials = floats({args.parts * a.components * (1 + args.row + args.second)});
  args.count = data(partials), args.first = args.count + args.parts * a.components;
  args.moments = args.first + args.parts * a.components * args.row;
  at::Tensor count = floats({a.components}), first = floats({a.components, a.features});
  at::Tensor second = full       ? floats({a.components, a.features, a.features})
                      : diagonal ? floats({a.components, a.features})
                                 : floats({a.components});
  args.out_count = data(count), args.out_first = data(first), args.out_second = data(second);
  const auto run = DGM_PICK_ISA(moments);
  const auto finish = DGM_PICK_ISA(moments_finish);
  const int64_t work = panel_work(a, 2 * args.second) / args.blocks * ceil_divide(args.part_points, panel);
  share(args.blocks * args.parts, work, DGM_PICK_ISA(moments_floats)(args),
        [&](float* own, int64_t begin, int64_t end) { run(args, own, begin, end); });
  share(a.components, args.parts * (args.row + args.second),
        [&](int64_t begin, int64_t end) { finish(args, begin, end); });
  return {std::move(count), std::move(first), std::move(second)};
}

namespace {

// Plans and runs what `args` has been told of. The totals of a kernel are added to where they pointed.
void run_gather(GatherArgs& args) {
  args.plan = plan_of(args.mixture, args.width);
  const Plan& plan = args.plan;
  const bool sums = args.gather == Gather::RbfSum || args.gather == Gather::PolynomialSum;
  const at::Tensor each = floats({2 * plan.parts + 1, sums ? 0 : plan.padded});
  const at::Tensor partials = floats({sums ? 0 : plan.parts, plan.padded, args.width});
  const int64_t units = plan.groups * plan.parts, points = args.mixture.points;
  const at::Tensor totals = doubles(sums ? units : 0);
  args.most = data(each), args.sums = args.most + plan.parts * plan.padded;
  args.missing = args.sums + plan.parts * plan.padded;
  args.partials = data(partials);
  double* const total = args.totals;
  args.totals = totals.mutable_data_ptr<double>();
  const auto run = DGM_PICK_ISA(gather);
  const auto finish = DGM_PICK_ISA(gather_finish);
  share(units, unit_work(args.mixture, plan, args.width), DGM_PICK_ISA(gather_floats)(args),
        [&](float* own, int64_t begin, int64_t end) { run(args, own, begin, end); });
  if (sums) {
    for (int64_t i = 0; i < units; ++i) *total += args.totals[i];
    return;
  }
  const int64_t panel = DGM_PICK_ISA(panel_width)();
  share(ceil_divide(points, panel), panel * args.width * plan.parts,
        [&](int64_t begin, int64_t end) { finish(args, begin, end); });
}

}  // namespace

at::Tensor grad_x(const at::Tensor& grad, const at::Tensor& lse, DGM_MIXTURE_PARAMETERS) {
  const Held held = hold(x, y, inv, q, offset, true);
  GatherArgs args;
  args.gather = Gather::Gradient;
  args.mixture = mixture_of(held);
  at::Tensor out = floats(x.sizes()), rows;
  if (args.mixture.form == Form::Diagonals) {
    const at::Tensor factor = inv.square();
    const std::vector<at::Tensor> halves{factor * centred(held, y), factor};
    rows = at::cat(halves, 1);
  } else if (args.mixture.form == Form::Triangles) {
    rows = held.inv;
  } else {
    rows = centred(held, y);
  }
  args.width = rows.dim() == 3 ? args.mixture.features : rows.size(1);
  args.rows = rows.const_data_ptr<float>();
  args.weight = checked("grad", grad, {args.mixture.points}), args.lse = checked("lse", lse, {args.mixture.points});
  args.out = data(out);
  run_gather(args);
  return out;
}

std::tuple<at::Tensor, at::Tensor> mean(const at::Tensor& x, const at::Tensor& y, const at::Tensor& q,
                                        const at::Tensor& offset) {
  const at::Tensor one = at::ones({1}, at::TensorOptions(at::kFloat));
  const Held held = hold(x, y, one, q, offset);
  GatherArgs args;
  args.gather = Gather::Mean;
  args.mixture = mixture_of(held);
  at::Tensor out = floats(x.sizes()), lse = floats({x.size(0)});
  args.width = args.mixture.features, args.rows = args.mixture.y;
  args.out = data(out), args.out_lse = data(lse);
  run_gather(args);
  return {std::move(out), std::move(lse)};
}

at::Tensor mean_grad(const at::Tensor& grad, const OptionalTensor& grad_lse, const at::Tensor& mean,
                     const at::Tensor& lse, const at::Tensor& x, const at::Tensor& y, const at::Tensor& q,
                     const at::Tensor& offset) {
  const at::Tensor one = at::ones({1}, at::TensorOptions(at::kFloat));
  const Held held = hold(x, y, one, q, offset);
  GatherArgs args;
  args.gather = Gather::MeanGradient;
  args.mixture = mixture_of(held);
  at::Tensor out = floats(x.sizes());
  const at::Tensor rows = centred(held, y);
  args.width = args.mixture.features, args.rows = rows.const_data_ptr<float>();
  args.grad = checked("grad", grad, x.sizes()), args.lse = checked("lse", lse, {x.size(0)});
  checked("mean", mean, x.sizes());
  // The kernel multiplies with components about the middle.
  at::Tensor weight = (grad * (held.middle.slice(0, 0, args.mixture.features) - mean)).sum(1);
  if (present(grad_lse)) weight.add_(*grad_lse);
  args.weight = weight.const_data_ptr<float>();
  args.out = data(out);
  run_gather(args);
  return out;
}

namespace {

void run_kernel(GatherArgs& args, const at::Tensor& x, const at::Tensor& y, at::ArrayRef<double> numbers, bool rbf) {
  TORCH_CHECK_VALUE(!numbers.empty() && numbers.size() <= kMostNumbers && (rbf || numbers.size() == 3),
                    "numbers must hold 1 to ", kMostNumbers, " factors, or three numbers of a polynomial, got ",
                    numbers.size());
  const at::TensorOptions options(at::kFloat);
  // The rounding of squared distances counts as much as the narrowest kernel makes it.
  const at::Tensor one = at::ones({1}, options), zero = at::zeros({1}, options);
  const double narrowest = 2.0 * *std::max_element(numbers.begin(), numbers.end());
  Held held = hold(x, y, one, {}, zero);
  if (rbf)
    held.mixture.form = form_of_numbers(held.mixture, y, at::full({1}, std::sqrt(narrowest), options), {});
  else
    held.mixture.form = Form::Dots, held.middle.zero_();
  args.mixture = held.mixture;
  const at::Tensor rows = args.width ? centred(held, y) : at::Tensor();
  if (args.width) args.rows = rows.const_data_ptr<float>();
  args.numbers = static_cast<int32_t>(numbers.size());
  for (size_t i = 0; i < numbers.size(); ++i) args.number[i] = static_cast<float>(numbers[i]);
  run_gather(args);
}

}  // namespace

at::Tensor kernel_sum(const at::Tensor& x, const at::Tensor& y, int64_t kind, at::ArrayRef<double> numbers, bool same) {
  GatherArgs args;
  args.gather = kind == 0 ? Gather::RbfSum : Gather::PolynomialSum;
  args.same = same;
  at::Tensor total = at::zeros({}, at::TensorOptions(at::kDouble));
  args.totals = total.mutable_data_ptr<double>();
  run_kernel(args, x, y, numbers, kind == 0);
  return total;
}

at::Tensor kernel_sum_grad(const at::Tensor& x, const at::Tensor& y, int64_t kind, at::ArrayRef<double> numbers,
                           bool same) {
  GatherArgs args;
  args.gather = kind == 0 ? Gather::RbfGradient : Gather::PolynomialGradient;
  args.same = same;
  at::Tensor out = floats(x.sizes());
  args.width = x.size(1);
  args.out = data(out);
  run_kernel(args, x, y, numbers, kind == 0);
  return out;
}

}  // namespace dgm::density
