// CPU loops of the norm op; built once per instruction set, without torch headers.
#include "norm/cpu.h"

#include "norm/finish.h"
#include "norm/groups.h"
#include "norm/rows.h"

namespace dgm::norm {
namespace DGM_ISA_NAMESPACE {

void rows(const RowsArgs& a, int64_t begin, int64_t end) {
  Modulation modulation(a.size);
  Buffers buffers(4 * padded(a.size) + kPageFloats);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Part part(a, unit);
    modulation.enter(a, part.sample);
    for (int64_t row = part.first; row < part.last; ++row) forward_row(a, modulation, row, buffers.data());
  }
}

void rows_backward(const RowsArgs& a, int64_t begin, int64_t end) {
  constexpr int kRows = 4;
  Modulation modulation(a.size);
  Buffers buffers(kRows * kBackwardBuffers * padded(a.size));
  for (int64_t unit = begin; unit < end; ++unit) {
    const Part part(a, unit);
    modulation.enter(a, part.sample);
    float* sums = a.partials + unit * a.sums * a.size;
    if (a.sums) std::memset(sums, 0, a.sums * a.size * sizeof(float));
    int64_t row = part.first;
    for (; row + kRows <= part.last; row += kRows) backward_rows<kRows>(a, modulation, row, buffers.data(), sums);
    for (; row < part.last; ++row) backward_rows<1>(a, modulation, row, buffers.data(), sums);
  }
}

void group_silu(const GroupArgs& a, int64_t begin, int64_t end) {
  Buffers buffers(2 * padded(a.channels / a.groups * a.elements));
  for (int64_t unit = begin; unit < end; ++unit) forward_group(a, unit, buffers.data());
}

void group_silu_backward(const GroupArgs& a, int64_t begin, int64_t end) {
  Buffers buffers(kGroupBuffers * padded(a.channels / a.groups * a.elements) + kPageFloats);
  for (int64_t unit = begin; unit < end; ++unit) backward_group(a, unit, buffers.data());
}

void finish(const FinishArgs& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) finish_columns(a, block * kFinishColumns);
}

}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::norm
