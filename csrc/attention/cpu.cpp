// CPU loops of the attention op; built once per instruction set, without torch headers.
#include "attention/cpu.h"

#include "attention/backward.h"
#include "attention/decode.h"
#include "attention/forward.h"
#include "attention/jvp.h"

namespace dgm::attention {
namespace DGM_ISA_NAMESPACE {

int64_t panel_width() { return kPanel; }

int64_t panels(const ForwardArgs& a) { return Panels(a).number(); }

int64_t blocks(const ForwardArgs& a) { return ceil_divide(Tiling(a).number(), kTilesTogether); }

bool has_pairs() { return Pair::kPairs; }

int64_t forward_memory(const ForwardArgs& a, bool pairs) {
  return pairs ? Forward<Pair>(a, nullptr).size() : Forward<Single>(a, nullptr).size();
}

void forward(const ForwardArgs& a, bool pairs, float* memory, int64_t begin, int64_t end) {
  return pairs ? run_forward<Pair>(a, memory, begin, end) : run_forward<Single>(a, memory, begin, end);
}

int64_t backward_memory(const BackwardArgs& a, bool pairs) {
  return pairs ? Backward<Pair>(a, nullptr).size() : Backward<Single>(a, nullptr).size();
}

void backward(const BackwardArgs& a, bool pairs, float* memory, int64_t begin, int64_t end) {
  return pairs ? run_backward<Pair>(a, memory, begin, end) : run_backward<Single>(a, memory, begin, end);
}

void backward_queries(const BackwardArgs& a, int64_t begin, int64_t end) {
  const int64_t panels = Panels(a).number();
  for (int64_t i = begin; i < end; ++i) finish_queries(a, i / panels / a.heads, i / panels % a.heads, i % panels);
}

int64_t jvp_memory(const JvpArgs& a) { return Jvp(a, nullptr).size(); }

void jvp(const JvpArgs& a, float* memory, int64_t begin, int64_t end) {
  Jvp work(a, memory);
  const int64_t panels = Panels(a).number();
  for (int64_t i = begin; i < end; ++i)
    work.unit(i / panels / a.heads, i / panels % a.heads, folded(i % panels, panels));
}

void decode(const DecodeArgs& a, int64_t begin, int64_t end) {
  Decode work(a);
  for (int64_t i = begin; i < end; ++i) work.unit(i / a.parts / a.key_heads, i / a.parts % a.key_heads, i % a.parts);
}

void decode_combine(const DecodeArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) combine_parts(a, i / a.heads, i % a.heads);
}

}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::attention
