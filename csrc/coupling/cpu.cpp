// CPU loops of the coupling op; built once per instruction set, without torch headers.
#include "coupling/cpu.h"

#include <type_traits>

#include "coupling/affine.h"
#include "coupling/made.h"
#include "coupling/spline.h"

namespace dgm::coupling {
namespace DGM_ISA_NAMESPACE {

void affine(const AffineArgs& a, int64_t begin, int64_t end) {
  ChunkReader x, shift, raw;
  ChunkWriter y;
  MaskReader mask;
  alignas(64) float logs[kChunk];
  const auto copy = [&](const Chunk& c) { copy_chunk(a.x, a.y, c, x, y); };
  const int64_t together = samples_together(a);
  for (int64_t unit = begin; unit < end;) {
    const Piece p(a, together, unit, end);
    for (int64_t i = 0; i < p.rows; ++i) a.partials[unit + i] = 0.0;
    for_each_chunk(p.row, p.rows, p.first, p.begin, copy);
    for_each_chunk(p.row, p.rows, p.begin, p.end, [&](const Chunk& c) {
      const int64_t start = a.region.start;
      Runs r = {c.rows,
                c.count,
                x.read(a.x, c),
                shift.read(a.shift, c, start),
                raw.read(a.log_scale, c, start),
                mask.read(a.region, c),
                y.open(a.y, c),
                logs};
      join_rows(r, r.x, r.shift, r.raw, r.y);
      run(a, r);
      y.close();
      if (r.raw.data)
        for (int64_t i = 0; i < c.rows; ++i) a.partials[unit + i] += total(logs + i * c.count, c.count);
    });
    for_each_chunk(p.row, p.rows, p.end, p.last, copy);
    unit += p.rows;
  }
}

void affine_backward(const AffineArgs& a, int64_t begin, int64_t end) {
  ChunkReader grad, output, shift, raw;
  ChunkWriter to_x, to_shift, to_raw;
  MaskReader mask;
  alignas(64) float grad_logdet[kChunk] = {};
  const auto copy = [&](const Chunk& c) { copy_chunk(a.grad, a.grad_x, c, grad, to_x); };
  const int64_t together = samples_together(a);
  for (int64_t unit = begin; unit < end;) {
    const Piece p(a, together, unit, end);
    for_each_chunk(p.row, p.rows, p.first, p.begin, copy);
    for_each_chunk(p.row, p.rows, p.begin, p.end, [&](const Chunk& c) {
      if (a.grad_logdet)
        for (int64_t i = 0; i < c.rows; ++i) fill(grad_logdet + i * c.count, c.count, a.grad_logdet[c.row + i]);
      const int64_t start = a.region.start;
      BackwardRuns r = {c.rows,
                        c.count,
                        grad.read(a.grad, c),
                        output.read(a.x, c),
                        shift.read(a.shift, c, start),
                        raw.read(a.log_scale, c, start),
                        grad_logdet,
                        mask.read(a.region, c),
                        to_x.open(a.grad_x, c),
                        to_shift.open(a.grad_shift, c, start),
                        to_raw.open(a.grad_log_scale, c, start)};
      join_rows(r, r.grad, r.output, r.shift, r.raw, r.grad_x, r.grad_shift, r.grad_raw);
      run(a, r);
      to_x.close(), to_shift.close(), to_raw.close();
    });
    for_each_chunk(p.row, p.rows, p.end, p.last, copy);
    unit += p.rows;
  }
}

int64_t spline_width() { return kWidth; }

void spline(const SplineArgs& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) spline_block(a, block * kWidth);
}

void finish_spline(const SplineArgs& a, int64_t begin, int64_t end) {
  for (int64_t sample = begin; sample < end; ++sample)
    a.logdet[sample] = static_cast<float>(total(a.log_slopes + sample * a.elements, a.elements));
}

void spline_backward(const SplineArgs& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) spline_backward_block(a, block * kWidth);
}

void log_prob(const LogProbArgs& a, int64_t begin, int64_t end) {
  ChunkReader reader;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit % a.parts * kPartElements;
    const int64_t last = first + kPartElements < a.elements ? first + kPartElements : a.elements;
    a.partials[unit] = 0.0;
    for_each_chunk(unit / a.parts, 1, first, last, [&](const Chunk& c) {
      a.partials[unit] += base_log_density(reader.read(a.z, c).data, c.count, a.logistic);
    });
  }
}

int64_t made_width() { return kTile * kWidth; }

void made_inverse(const MadeArgs& a, float* scratch, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kTile * kWidth, left = a.batch - first;
    if (left > kWidth)
      invert_tile<kTile>(a, first, left < kTile * kWidth ? left : kTile * kWidth, scratch);
    else
      invert_tile<1>(a, first, left, scratch);
  }
}

}  // namespace DGM_ISA_NAMESPACE
}  // namespace dgm::coupling
