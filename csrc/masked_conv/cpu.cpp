// CPU loops of the masked_conv op; built once per instruction set, without torch headers.
#include "masked_conv/cpu.h"

#include "masked_conv/categorical.h"
#include "masked_conv/conv.h"
#include "masked_conv/gate.h"
#include "masked_conv/generate.h"
#include "masked_conv/mixture.h"

namespace dgm::masked_conv {
namespace DGM_ISA_NAMESPACE {

int64_t panel_width() { return kPanel; }

void conv(const ConvArgs& a, float* scratch, int64_t begin, int64_t end) {
  const int64_t panels = panels_of(a.outputs);
  Array<Source> sources(a.number);
  for (int64_t unit = begin, copied = -1; unit < end; ++unit) {
    const int64_t part = unit % a.panel_parts, index = unit / a.panel_parts;
    const int64_t sample = index / a.areas;
    const Area area = area_of(a, index % a.areas);
    if (index != copied) copy_padded(a, sample, area, scratch);
    copied = index;
    for (int64_t panel = panels * part / a.panel_parts; panel < panels * (part + 1) / a.panel_parts; ++panel)
      conv_panel(a, scratch, sample, panel, area, sources.data());
  }
}

void weight_grad_rows(const WeightGradArgs& a, int64_t begin, int64_t end) {
  const int64_t plane = a.height * a.width, stride = padded_inputs(a);
  for (int64_t sample = begin; sample < end; ++sample) {
    const char* x = sample_of(a.x, sample, a.inputs * plane);
    planes_to_rows(a.x, x, a.inputs, plane, stride, a.x_rows + sample * plane * stride);
    const char* grad = sample_of(a.grad, sample, a.outputs * plane);
    for (int64_t panel = 0; panel < panels_of(a.outputs); ++panel) {
      const int64_t first = panel * kPanel;
      planes_to_rows(a.grad, grad + first * plane * element_size(a.grad.dtype), a.outputs - first, plane, kPanel,
                     a.grad_rows + (panel * a.batch + sample) * plane * kPanel);
    }
  }
}

int64_t weight_grad_units(const WeightGradArgs& a) {
  const int64_t groups = (a.number + kTapsTogether - 1) / kTapsTogether;
  return panels_of(a.outputs) * Pieces(a.inputs).number * groups;
}

void weight_grad(const WeightGradArgs& a, int64_t begin, int64_t end) {
  const int64_t groups = (a.number + kTapsTogether - 1) / kTapsTogether;
  const Pieces inputs(a.inputs);
  alignas(64) float totals[kTapsTogether * kTile * kPanel];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t group = unit % groups, piece = unit / groups % inputs.number, panel = unit / groups / inputs.number;
    const int64_t first = group * kTapsTogether, last = first + kTapsTogether;
    weight_grad_unit(a, panel, inputs.begin(piece), inputs.length(piece), first, last < a.number ? last : a.number,
                     totals);
  }
}

void generate(const GenerateArgs& args, int64_t first, int64_t samples) { Generator(args, first, samples).run(); }

}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::masked_conv
