// Tensors to kernel arguments, allocation and threads of attention.
#include "attention/launch.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_permuted.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <functional>
#include <limits>

#include "attention/cpu.h"

namespace dgm::attention {

namespace {

constexpr int64_t kWorthAThread = 1 << 18;  // multiplications: waking a thread costs some microseconds
constexpr int64_t kFewHeads = 8;            // fewer are cut into parts of the keys, so that threads have work
constexpr int64_t kManyUnits = 64;

at::Tensor floats(int64_t count) { return at::empty({count}, at::TensorOptions(at::kFloat)); }

void check_rows(const char* name, const at::Tensor& x, int64_t batch, int64_t heads, int64_t rows, int64_t features,
                at::ScalarType dtype) {
  const std::array<int64_t, 4> expected{batch, heads, rows, features};
  TORCH_CHECK_VALUE(x.sizes() == at::IntArrayRef(expected), name, " must have shape ", at::IntArrayRef(expected),
                    ", got ", x.sizes());
  TORCH_CHECK_VALUE(x.is_cpu(), name, " must be on the CPU, got ", x.device());
  TORCH_CHECK_TYPE(x.scalar_type() == dtype && x.is_floating_point(), name, " must be ", dtype, ", got ",
                   x.scalar_type());
  TORCH_CHECK_VALUE(features <= 1 || x.stride(3) == 1 || x.numel() == 0, name,
                    " must have contiguous features, got strides ", x.strides());
}

template <class Form>
Form rows_of(const char* name, const at::Tensor& x) {
  Form rows;
  rows.data = const_cast<void*>(x.const_data_ptr());
  rows.dtype = dtype_of(name, x);
  rows.batch = x.stride(0), rows.head = x.stride(1), rows.row = x.stride(2);
  return rows;
}

// The result for queries with their dimensions in memory in the order of those of q; op.empty_like_queries in Python.
at::Tensor empty_like_queries(const at::Tensor& q, int64_t features) {
  const std::array<int64_t, 4> sizes{q.size(0), q.size(1), q.size(2), features};
  std::array<int64_t, 4> order{0, 1, 2, 3};
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return q.stride(a) > q.stride(b); });
  if (order[3] != 3 || !q.permute(order).is_contiguous()) return at::empty(sizes, q.options());
  return at::empty_permuted(sizes, order, q.options());
}

Scores scores_of(const char* name, const OptionalTensor& x, const ForwardArgs& a) {
  if (!present(x)) return {};
  const std::array<int64_t, 4> expected{a.batch, a.heads, a.queries, a.keys};
  TORCH_CHECK_VALUE(x->sizes() == at::IntArrayRef(expected), name, " must have shape ", at::IntArrayRef(expected),
                    ", got ", x->sizes());
  TORCH_CHECK_VALUE(x->is_cpu(), name, " must be on the CPU, got ", x->device());
  return {x->const_data_ptr(), dtype_of(name, *x), x->stride(0), x->stride(1), x->stride(2), x->stride(3)};
}

const float* floats_of(const char* name, const OptionalTensor& x, at::IntArrayRef sizes) {
  if (!present(x)) return nullptr;
  TORCH_CHECK_VALUE(x->sizes() == sizes && x->is_cpu() && x->is_contiguous() && x->scalar_type() == at::kFloat, name,
                    " must be contiguous float32 of shape ", sizes, " on the CPU, got ", x->scalar_type(), " ",
                    x->sizes());
  return x->const_data_ptr<float>();
}

// What all kernels but decoding read.
void fill(ForwardArgs& a, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, DGM_ATTENTION_SETTINGS) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must have four dimensions, got ",
                    q.sizes(), ", ", k.sizes(), " and ", v.sizes());
  a.batch = q.size(0), a.heads = q.size(1), a.queries = q.size(2), a.features = q.size(3);
  a.key_heads = k.size(1), a.keys = k.size(2), a.value_features = v.size(3);
  check_rows("q", q, a.batch, a.heads, a.queries, a.features, q.scalar_type());
  check_rows("k", k, a.batch, a.key_heads, a.keys, a.features, q.scalar_type());
  check_rows("v", v, a.batch, a.key_heads, a.keys, a.value_features, q.scalar_type());
  TORCH_CHECK_VALUE(a.heads == 0 || (a.key_heads > 0 && a.heads % a.key_heads == 0),
                    "k must have a number of heads that divides that of q, ", a.heads, ", got ", a.key_heads);
  TORCH_CHECK_VALUE(std::max(a.features, a.value_features) <= kMaxFeatures, "q and v must have at most ", kMaxFeatures,
                    " features, got ", a.features, " and ", a.value_features);
  a.q = rows_of<Rows>("q", q), a.k = rows_of<Rows>("k", k), a.v = rows_of<Rows>("v", v);
  a.scale = static_cast<float>(scale);
  if (present(bounds)) {
    TORCH_CHECK_VALUE(bounds->dim() == 2 && bounds->size(0) == a.queries && bounds->size(1) == 2 && bounds->is_cpu() &&
                          bounds->is_contiguous() && bounds->scalar_type() == at::kInt,
                      "bounds must be contiguous int32 [", a.queries, ", 2] on the CPU, got ", bounds->sizes());
    a.mask.bounds = bounds->const_data_ptr<int32_t>();
  }
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(0 <= width && width <= kMost && 0 <= radius && radius <= kMost,
                    "width and radius must be in [0, 2**31), got ", width, " and ", radius);
  a.mask.width = static_cast<int32_t>(width), a.mask.radius = static_cast<int32_t>(radius), a.mask.first = first;
  a.mask.keep = scores_of("keep", keep, a), a.mask.bias = scores_of("bias", bias, a);
  a.mask.slopes = floats_of("slopes", slopes, {a.heads});
  if (!present(rope)) return;
  TORCH_CHECK_VALUE(rope->dim() == 3 && rope->size(2) == 2 && 2 * rope->size(1) <= a.features &&
                        rope->size(0) >= std::max(first + a.queries, a.keys),
                    "rope must have shape [positions, pairs, 2] for all positions, got ", rope->sizes());
  a.rope = {floats_of("rope", rope, rope->sizes()), rope->size(1), interleaved};
}

Rows result_rows(const char* name, const at::Tensor& x, const ForwardArgs& a, const at::Tensor& q) {
  check_rows(name, x, a.batch, a.heads, a.queries, a.value_features, q.scalar_type());
  return rows_of<Rows>(name, x);
}

// Runs `run(memory, begin, end)` over units of work, each thread with `memory` floats of its own.
void share(int64_t units, int64_t work, int64_t memory, const std::function<void(float*, int64_t, int64_t)>& run) {
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(work, 1));
  at::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    const at::Tensor own = floats(memory);
    run(own.mutable_data_ptr<float>(), begin, end);
  });
}

int64_t panels_of(const ForwardArgs& a) { return a.queries == 0 ? 0 : DGM_PICK_ISA_BF16(panels)(a); }

bool multiplies_pairs(const at::Tensor& q) {
  return q.scalar_type() == at::kBFloat16 && DGM_PICK_ISA_BF16(has_pairs)();
}

// Multiplications of a panel of queries with all keys.
int64_t panel_work(const ForwardArgs& a) {
  return DGM_PICK_ISA_BF16(panel_width)() * a.keys * (a.features + a.value_features);
}

}  // namespace

#define DGM_GIVEN_SETTINGS bounds, width, radius, keep, bias, slopes, rope, interleaved, first, scale

std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                             DGM_ATTENTION_SETTINGS) {
  ForwardArgs args;
  fill(args, q, k, v, DGM_GIVEN_SETTINGS);
  const at::Tensor out = empty_like_queries(q, args.value_features);
  const at::Tensor lse = at::empty({args.batch, args.heads, args.queries}, q.options().dtype(at::kFloat));
  const int64_t heads = args.batch * args.heads, panels = panels_of(args);
  if (heads * panels == 0) return {out, lse};
  args.out = rows_of<OutputRows>("out", out), args.lse = lse.mutable_data_ptr<float>();
  // Several panels read a block of keys while it is in the first-level cache; but threads must find enough units.
  args.panels = std::clamp<int64_t>(heads * panels / kManyUnits, 1, kPanelsTogether);
  args.units = ceil_divide(panels, args.panels);
  const bool pairs = multiplies_pairs(q);
  const auto forward = DGM_PICK_ISA_BF16(forward);
  share(heads * args.units, args.panels * panel_work(args), DGM_PICK_ISA_BF16(forward_memory)(args, pairs),
        [&](float* memory, int64_t begin, int64_t end) { forward(args, pairs, memory, begin, end); });
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad, const OptionalTensor& grad_lse,
                                                        const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                        const at::Tensor& out, const at::Tensor& lse,
                                                        DGM_ATTENTION_SETTINGS) {
  BackwardArgs args;
  fill(args, q, k, v, DGM_GIVEN_SETTINGS);
  const at::Tensor rows = args.value_features > 1 && grad.stride(3) != 1 ? grad.contiguous() : grad;
  const OptionalTensor of_lse = present(grad_lse) ? OptionalTensor(grad_lse->to(at::kFloat).contiguous()) : grad_lse;
  args.grad = result_rows("grad", rows, args, q), args.result = result_rows("out", out, args, q);
  const std::array<int64_t, 3> per_query{args.batch, args.heads, args.queries};
  args.lse = const_cast<float*>(floats_of("lse", lse, per_query)),
  args.grad_lse = floats_of("grad_lse", of_lse, per_query);
  const at::Tensor grad_q = empty_like_queries(q, args.features), grad_k = empty_like_queries(k, args.features);
  const at::Tensor grad_v = empty_like_queries(v, args.value_features);
  args.grad_q = rows_of<OutputRows>("grad_q", grad_q);
  args.grad_k = rows_of<OutputRows>("grad_k", grad_k), args.grad_v = rows_of<OutputRows>("grad_v", grad_v);
  const int64_t panels = panels_of(args), key_heads = args.batch * args.key_heads;
  const int64_t blocks = DGM_PICK_ISA(blocks)(args);
  if (key_heads == 0) return {grad_q, grad_k, grad_v};
  args.parts = std::clamp<int64_t>(kFewHeads / key_heads, 1, std::max<int64_t>(blocks, 1));
  const int64_t panel = DGM_PICK_ISA(panel_width)();
  const at::Tensor sums = floats(panel * (args.parts * args.batch * args.heads * panels * args.features + panel));
  args.grad_panels = sums.mutable_data_ptr<float>();
  const auto run = DGM_PICK_ISA_BF16(backward);
  const bool pairs = multiplies_pairs(q);
  const int64_t work = args.heads / args.key_heads * panels * panel_work(args) * 2 / args.parts;
  share(args.parts * key_heads, work, DGM_PICK_ISA_BF16(backward_memory)(args, pairs),
        [&](float* memory, int64_t begin, int64_t end) { run(args, pairs, memory, begin, end); });
  const auto finish = DGM_PICK_ISA(backward_queries);
  share(args.batch * args.heads * panels, args.features * 64, 0,
        [&](float*, int64_t begin, int64_t end) { finish(args, begin, end); });
  return {grad_q, grad_k, grad_v};
}

std::tuple<at::Tensor, at::Tensor> jvp(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                       const at::Tensor& tangent_q, const at::Tensor& tangent_k,
                                       const at::Tensor& tangent_v, const at::Tensor& out, const at::Tensor& lse,
                                       DGM_ATTENTION_SETTINGS) {
  JvpArgs args;
  fill(args, q, k, v, DGM_GIVEN_SETTINGS);
  const auto dtype = q.scalar_type();
  check_rows("tangent_q", tangent_q, args.batch, args.heads, args.queries, args.features, dtype);
  check_rows("tangent_k", tangent_k, args.batch, args.key_heads, args.keys, args.features, dtype);
  check_rows("tangent_v", tangent_v, args.batch, args.key_heads, args.keys, args.value_features, dtype);
  args.tangent_q = rows_of<Rows>("tangent_q", tangent_q), args.tangent_k = rows_of<Rows>("tangent_k", tangent_k);
  args.tangent_v = rows_of<Rows>("tangent_v", tangent_v), args.result = result_rows("out", out, args, q);
  args.lse = const_cast<float*>(floats_of("lse", lse, {args.batch, args.heads, args.queries}));
  const at::Tensor tangent = empty_like_queries(q, args.value_features),
                   lse_tangent = at::empty(lse.sizes(), lse.options());
  args.out = rows_of<OutputRows>("tangent", tangent), args.lse_tangent = lse_tangent.mutable_data_ptr<float>();
  args.rope.rounds = multiplies_pairs(q);
  const auto run = DGM_PICK_ISA(jvp);
  share(args.batch * args.heads * panels_of(args), 2 * panel_work(args), DGM_PICK_ISA(jvp_memory)(args),
        [&](float* memory, int64_t begin, int64_t end) { run(args, memory, begin, end); });
  return {tangent, lse_tangent};
}

at::Tensor decode(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, int64_t begin, int64_t end,
                  int64_t width, int64_t radius, const OptionalTensor& slopes, int64_t position, double scale) {
  ForwardArgs checked;
  fill(checked, q, keys, values, {}, width, radius, {}, {}, slopes, {}, false, 0, scale);
  TORCH_CHECK_VALUE(checked.queries == 1, "q must have one query a head, got ", q.sizes());
  TORCH_CHECK_VALUE(0 <= begin && begin <= end && end <= checked.keys, "begin and end must be in [0, ", checked.keys,
                    "], got ", begin, " and ", end);
  DecodeArgs args;
  args.batch = checked.batch, args.heads = checked.heads, args.key_heads = checked.key_heads;
  args.begin = begin, args.end = end, args.features = checked.features, args.value_features = checked.value_features;
  args.q = checked.q, args.k = checked.k, args.v = checked.v;
  args.width = checked.mask.width, args.radius = checked.mask.radius, args.slopes = checked.mask.slopes;
  args.position = position, args.scale = checked.scale;
  args.parts = ceil_divide(end - begin, kDecodePart);
  const at::Tensor out = at::empty({args.batch, args.heads, 1, args.value_features}, q.options());
  args.out = rows_of<OutputRows>("out", out);
  const at::Tensor partial = floats(args.batch * args.heads * args.parts * (args.value_features + 2));
  args.partial = partial.mutable_data_ptr<float>();
  if (out.numel() == 0) return out;
  const auto run = DGM_PICK_ISA(decode), combine = DGM_PICK_ISA(decode_combine);
  const int64_t work =
      args.heads / args.key_heads * std::min(end - begin, kDecodePart) * (args.features + args.value_features);
  share(args.batch * args.key_heads * args.parts, 4 * work, 0,
        [&](float*, int64_t first, int64_t last) { run(args, first, last); });
  combine(args, 0, args.batch * args.heads);
  return out;
}

}  // namespace dgm::attention
