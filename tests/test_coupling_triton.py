"""The Triton kernels of the coupling op in Triton's interpreter, and what the compiler makes of them; needs no GPU."""

import functools
import itertools
import os

import pytest
import torch

import dgm_kernels as dgm
from tests.contract import (
    assert_bitwise_repeatable,
    assert_inputs_unchanged,
    assert_passes_interpreted,
    compiled_usage,
    in_every_layout,
    strided_variants,
)
from tests.coupling_cases import (
    ADDITIVE_CASES,
    AFFINE_CASES,
    LOG_PROB_CASES,
    MASKS,
    SCALE_MAPS,
    SPLINE_CASES,
    _affine,
    mask_of,
    moved_shape,
    spline_operands,
    unchanged,
)
from tests.coupling_op import (
    SHAPES,
    SPLINE_SHAPES,
    affine_args,
    check_case,
    spline_args,
)
from tests.gradients import values_and_gradients

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HALF = [torch.float16, torch.bfloat16]
DGM = torch.ops.dgm


class TestInterpreted:
    """Collected only where TRITON_INTERPRET=1, which Triton reads when a kernel is defined."""

    __test__ = INTERPRETED

    @pytest.mark.parametrize("case", [*AFFINE_CASES, *ADDITIVE_CASES, *LOG_PROB_CASES], ids=str)
    def test_values_and_gradients(self, case):
        for shape in filter(case.takes, SHAPES):
            check_case("triton", case, shape)
        for shape, dtype in itertools.product(filter(case.takes, SHAPES[1:5:3]), HALF):
            check_case("triton", case, shape, dtype, coarse=dtype == torch.bfloat16)

    @pytest.mark.parametrize("case", SPLINE_CASES, ids=str)
    def test_values_and_gradients_of_splines(self, case):
        for shape in SPLINE_SHAPES:
            check_case("triton", case, shape)
        for shape, dtype in itertools.product(SPLINE_SHAPES[3:5], HALF):
            check_case("triton", case, shape, dtype, coarse=dtype == torch.bfloat16)

    @pytest.mark.parametrize("mask", MASKS)
    def test_every_mask_and_map(self, mask):
        for scale_map, inverse in itertools.product(SCALE_MAPS, (False, True)):
            check_case("triton", _affine(mask, scale_map, inverse), (2, 4, 3, 5))

    @pytest.mark.parametrize("case", [*AFFINE_CASES[:2], *SPLINE_CASES[:2]], ids=str)
    @pytest.mark.parametrize("which", [(0,), (1,)])
    def test_gradients_of_one_output(self, case, which):
        check_case("triton", case, (9, 16), which=which)

    @pytest.mark.parametrize("bins", [2, 3, 16, 33])
    def test_any_number_of_bins(self, bins):
        for tails, inverse in itertools.product(("linear", None), (False, True)):
            operands = spline_operands((5, 30), bins, tails, 3.0)
            operands = [operands[0], *(0.5 * raw for raw in operands[1:])]
            call = functools.partial(dgm.rational_quadratic_spline, tails=tails, inverse=inverse)
            with dgm.use_backend("triton"):
                actual = values_and_gradients(call, operands)
            exact = values_and_gradients(call, [operand.double() for operand in operands])
            for a, e in zip(actual, exact, strict=True):
                torch.testing.assert_close(a.double(), e, rtol=2e-3, atol=2e-5 * float(e.abs().max()))

    @pytest.mark.parametrize("shape", [(3, 8), (2, 4, 3, 5)])
    def test_masks_of_every_shape(self, shape):
        """Of the batch, a sample, the end of a sample, one channel, one element, and with gaps in memory."""
        x, shift, log_scale = torch.randn(3, *shape)
        ones = [(1,) * d + shape[d:] for d in range(len(shape) + 1)]
        channel = (1, *shape[1:2], *[1] * (len(shape) - 2))
        for mask_shape in (*ones, *(s[d:] for d, s in enumerate(ones)), channel, (shape[0], *[1] * (len(shape) - 1))):
            mask = torch.rand(mask_shape) < 0.5
            for given in (mask, *(strided_variants(mask) if mask.dim() else ())):
                with dgm.use_backend("triton"):
                    actual = dgm.affine_coupling(x, shift, log_scale, mask=given)
                with dgm.use_backend("reference"):
                    torch.testing.assert_close(actual, dgm.affine_coupling(x, shift, log_scale, mask=mask))

    def test_samples_with_gaps_are_read_where_they_are(self):
        """Shift and log-scale are halves of one network output, x every second row: views, not copies."""
        for elements in (8, 59, 1100):
            x, output = torch.randn(6, elements)[::2], torch.randn(3, 2 * elements)
            shift, log_scale = output.chunk(2, 1)
            expected = DGM.coupling_affine.triton(*affine_args(x.contiguous(), shift.contiguous(), log_scale.clone()))
            with assert_inputs_unchanged(x, output):
                actual = DGM.coupling_affine.triton(*affine_args(x, shift, log_scale))
            assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])

    def test_bins_of_one_output_are_read_where_they_are(self):
        x, raw = torch.randn(3, 7), torch.randn(3, 7, 23)
        views = raw.split((8, 8, 7), -1)
        expected = DGM.coupling_spline.triton(*spline_args(x, *(view.contiguous() for view in views)))
        with assert_inputs_unchanged(x, raw):
            actual = DGM.coupling_spline.triton(*spline_args(x, *views))
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])

    def test_any_strides_and_unchanged_inputs(self):
        calls = [
            (dgm.affine_coupling, [torch.randn(2, 3, 4) for _ in range(3)]),
            (dgm.rational_quadratic_spline, list(spline_operands((2, 3), 4, "linear", 3.0))),
            (dgm.standard_normal_log_prob, [torch.randn(2, 3, 4), torch.randn(2)]),
        ]
        for function, operands in calls:
            with dgm.use_backend("triton"):
                expected = values_and_gradients(function, operands)
                for given in in_every_layout(operands):
                    with assert_inputs_unchanged(*given):
                        actual = values_and_gradients(function, given)
                    torch.testing.assert_close(actual, expected, rtol=0, atol=0)

    def test_dtypes_may_differ(self):
        x, shift, log_scale = torch.randn(3, 9).bfloat16(), torch.randn(3, 9), torch.randn(3, 9).half()
        spline = list(spline_operands((3, 5), 4, "linear", 3.0))
        spline = [
            t.to(d) for t, d in zip(spline, (torch.float32, torch.half, torch.bfloat16, torch.float), strict=True)
        ]
        for function, operands in (
            (dgm.affine_coupling, [x, shift, log_scale]),
            (dgm.rational_quadratic_spline, spline),
        ):
            with dgm.use_backend("triton"):
                actual = values_and_gradients(function, operands)
            with dgm.use_backend("reference"):
                expected = values_and_gradients(function, operands)
            for a, e in zip(actual, expected, strict=True):
                assert a.dtype == e.dtype
                torch.testing.assert_close(a, e, rtol=2e-2 if a.dtype != torch.float32 else 1e-4, atol=2e-3)

    @pytest.mark.parametrize("mask", ["checkerboard", "random", "row"])
    @pytest.mark.parametrize("inverse", [False, True])
    def test_what_is_unchanged_reads_no_parameters(self, mask, inverse):
        for shape, scale_map in itertools.product(((2, 3, 5), (2, 1100)), SCALE_MAPS):
            keep = unchanged(mask_of(mask, shape), shape)
            x, shift, log_scale = torch.randn(3, *shape)
            x[keep & (torch.rand(shape) < 0.2)] = torch.nan
            options = {"mask": mask_of(mask, shape), "scale_map": scale_map, "inverse": inverse}
            results = []
            for junk in (0.0, torch.nan):
                operands = [x, shift.masked_fill(keep, junk), log_scale.masked_fill(keep, junk)]
                with dgm.use_backend("triton"):
                    results.append(values_and_gradients(functools.partial(dgm.affine_coupling, **options), operands))
            torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)
            y, logdet, _, to_shift, to_scale = results[1]
            assert torch.equal(y[keep].isnan(), x[keep].isnan()) and y[~keep].isfinite().all()
            assert logdet.isfinite().all()
            assert not to_shift[keep].any() and not to_scale[keep].any()

    @pytest.mark.parametrize("inverse", [False, True])
    @pytest.mark.parametrize("tails", [True, False])
    def test_a_nan_stays_where_it_is(self, tails, inverse):
        x, *raw = spline_operands((3, 5), 4, "linear" if tails else None, 3.0)
        clean = DGM.coupling_spline.triton(*spline_args(x, *raw, tails=tails, inverse=inverse))
        x[1, 2] = torch.nan
        y, logdet = DGM.coupling_spline.triton(*spline_args(x, *raw, tails=tails, inverse=inverse))
        assert y.isnan().nonzero().tolist() == [[1, 2]] and logdet.isnan().tolist() == [False, True, False]
        assert torch.equal(y[x == x], clean[0][x == x])
        for index in range(3):
            spoiled = [p.clone() for p in raw]
            spoiled[index][0, 3] = torch.nan
            inner = x.nan_to_num(0.0).clamp(-2.5, 2.5)
            y, logdet = DGM.coupling_spline.triton(*spline_args(inner, *spoiled, tails=tails, inverse=inverse))
            assert y.isnan().nonzero().tolist() == [[0, 3]] and logdet.isnan().tolist() == [True, False, False]

    @pytest.mark.parametrize("inverse", [False, True])
    def test_outside_of_the_domain(self, inverse):
        """The identity with tails, NaN without: nobody waits for a GPU to find out."""
        x = torch.tensor([[3.5, -1e30, torch.inf, -torch.inf, 3.0]])
        raw = spline_operands((1, 5), 6, "linear", 3.0)[1:]
        call = functools.partial(dgm.rational_quadratic_spline, inverse=inverse)
        with dgm.use_backend("triton"):
            y, logdet, to_x, *to_raw = values_and_gradients(call, (x, *raw), which=(0,))
        assert torch.equal(y[:, :4], x[:, :4]) and 3.0 - 1e-6 < y[0, 4] <= 3.0 and logdet.isfinite().all()
        for gradient in to_raw:
            assert not gradient[:, :4].any() and gradient.isfinite().all()
        assert to_x.isfinite().all()
        raw = spline_operands((1, 5), 6, None, 3.0)[1:]
        y, logdet = DGM.coupling_spline.triton(*spline_args(x, *raw, tails=False, inverse=inverse))
        assert y.isnan().tolist() == [[True] * 4 + [False]] and logdet.isnan().all()

    @pytest.mark.parametrize("dtype", [torch.float32, *HALF])
    def test_the_domain_is_never_left(self, dtype):
        """Also where the bound is no number of the dtype, and its rounding is larger."""
        for bound, inverse in itertools.product((1.0, 3.3, 4.71), (False, True)):
            raw = [p.to(dtype) for p in spline_operands((60, 4), 7, "linear", bound)[1:]]
            end = torch.tensor(bound).to(dtype)
            end = end if float(end) <= bound else torch.nextafter(end, torch.zeros_like(end))
            x = torch.stack([-end, -end * 0.998, end * 0.998, end]).to(dtype).repeat(60, 1)
            y, _ = DGM.coupling_spline.triton(*spline_args(x, *raw, bound=bound, inverse=inverse))
            assert float(y.double().abs().max()) <= bound

    def test_needles_and_cliffs(self):
        """Slopes from 1e-7 to 1e3: finite, increasing, and inverted to the digits that there are."""
        signs = torch.tensor(list(itertools.product((-30.0, 30.0), repeat=3)))
        pairs = torch.cartesian_prod(torch.arange(8), torch.arange(8))
        raw = [signs[pairs[:, 0]], signs[pairs[:, 1]], signs[pairs[:, 0]].flip(1)[:, :2]]
        raw = [p[:, None].expand(-1, 16, -1) for p in raw]
        x = torch.linspace(-3.0, 3.0, 16).expand(64, -1).contiguous()
        for inverse in (False, True):
            call = functools.partial(dgm.rational_quadratic_spline, inverse=inverse)
            with dgm.use_backend("triton"):
                y, *others = values_and_gradients(call, (x, *raw))
                back, _ = dgm.rational_quadratic_spline(y, *raw, inverse=not inverse)
                again, _ = dgm.rational_quadratic_spline(back, *raw, inverse=inverse)
            assert all(t.isfinite().all() for t in (y, *others))
            assert bool((y.diff(dim=1) >= -1e-5).all())
            assert bool((((back - x).abs() < 1e-5) | ((again - y).abs() < 1e-5)).all())

    def test_refuses_what_it_cannot_read(self):
        x, shift, log_scale = torch.randn(3, 4, 6)
        bad = {
            "sample of x must be contiguous": (x.t().contiguous().t(), shift, log_scale),
            "sample of shift must be contiguous": (x, torch.randn(4, 12)[:, ::2], log_scale),
            "log_scale must hold 4 samples of 6": (x, shift, log_scale[:, :5]),
        }
        for message, operands in bad.items():
            with pytest.raises(ValueError, match=message):
                DGM.coupling_affine.triton(*operands, None, 0, 6, -1, 6, 6, 0, False, torch.float32)
        with pytest.raises(ValueError, match="start and stop"):
            DGM.coupling_affine.triton(x, shift, log_scale, None, 0, 7, -1, 6, 6, 0, False, torch.float32)
        with pytest.raises(ValueError, match="fixed must hold 24 elements or divide"):
            DGM.coupling_affine.triton(x, shift, log_scale, x[0, :4] > 0, 0, 6, -1, 6, 6, 0, False, torch.float32)
        with pytest.raises(ValueError, match="sample of z must be contiguous"):
            DGM.coupling_log_prob.triton(x.t(), None, False)
        points, *raw = spline_operands((2, 3), 4, "linear", 3.0)
        with pytest.raises(ValueError, match=r"derivatives must have shape \(2, 3, 5\)"):
            DGM.coupling_spline.triton(*spline_args(points, *raw, tails=False))
        with pytest.raises(ValueError, match="heights must hold evenly spaced rows"):
            DGM.coupling_spline.triton(*spline_args(points, raw[0], torch.randn(2, 3, 8)[..., ::2], raw[2]))

    def test_zero_sizes(self):
        with dgm.use_backend("triton"):
            for shape in ((0, 3), (3, 0), (2, 4, 0, 3)):
                for case in (AFFINE_CASES[0], AFFINE_CASES[4], ADDITIVE_CASES[0], SPLINE_CASES[0]):
                    operands = case.make(shape)
                    y, logdet, *gradients = values_and_gradients(case.call, operands)
                    assert y.shape == shape and torch.equal(logdet, torch.zeros(shape[0]))
                    assert [g.shape for g in gradients] == [o.shape for o in operands]
                total = torch.randn(shape[0])
                assert torch.equal(dgm.logistic_log_prob(torch.empty(shape), total), total)

    def test_more_samples_than_a_grid_axis_holds(self):
        operands = torch.randn(3, 65536 + 7, 1)
        with dgm.use_backend("reference"):
            expected = dgm.affine_coupling(*operands)
        torch.testing.assert_close(DGM.coupling_affine.triton(*affine_args(*operands)), expected)

    def test_repeatable(self):
        affine = affine_args(*torch.randn(3, 3, 2500))
        assert_bitwise_repeatable(lambda: DGM.coupling_affine.triton(*affine))
        spline = spline_args(*spline_operands((2, 300), 5, "linear", 3.0))
        assert_bitwise_repeatable(lambda: DGM.coupling_spline.triton(*spline))
        z = torch.randn(2, 2500)
        assert_bitwise_repeatable(lambda: DGM.coupling_log_prob.triton(z, None, True))

    @pytest.mark.parametrize("mask", [None, "channels", "random"])
    def test_opcheck_affine(self, mask):
        x, (shift, log_scale) = torch.randn(2, 4, 3), torch.randn(2, *moved_shape(mask, (2, 4, 3)))
        operands = [t.requires_grad_() for t in (x, shift, log_scale)]
        torch.library.opcheck(DGM.coupling_affine.triton, affine_args(*operands, mask=mask_of(mask, x.shape)))

    def test_opcheck_spline_and_log_prob(self):
        operands = [t.requires_grad_() for t in spline_operands((2, 3), 4, "linear", 3.0)]
        torch.library.opcheck(DGM.coupling_spline.triton, spline_args(*operands))
        operands = [torch.randn(s).requires_grad_() for s in ((2, 3), (2,))]
        torch.library.opcheck(DGM.coupling_log_prob.triton, (*operands, False))


class TestNotInterpreted:
    __test__ = not INTERPRETED

    def test_in_the_interpreter(self):
        """Runs the tests above in a process of their own: Triton interprets all kernels of a process or none."""
        assert_passes_interpreted(__file__)

    @pytest.mark.parametrize(
        ("name", "loads", "stores"),
        [
            ("affine_fp32", 6, 2),
            ("affine_bf16", 3, 1),
            ("affine_checkerboard_bf16", 3, 1),
            ("affine_mask_fp32", 6, 2),
            ("affine_64_columns_bf16", 3, 1),
            ("affine_backward_fp32", 8, 6),
            ("affine_backward_bf16", 4, 3),
            ("affine_backward_tanh_inverse_bf16", 3, 3),
            ("log_prob_normal_fp32", 2, 0),
            ("spline_fp32", 4, 0),
            ("spline_backward_bf16", 2, 2),
        ],
    )
    def test_compiled_accesses_are_16_bytes_and_nothing_spills(self, name, loads, stores):
        """A thread has 8 elements of every tensor: two 16-byte accesses in float32, one in 16 bits.

        Of a spline these are the 8 widths and heights; the 7 derivatives are no multiple of 16 bytes.
        """
        from dgm_kernels.coupling.triton import aot_specs

        usage = compiled_usage(aot_specs(), name)
        assert (usage.wide_loads, usage.wide_stores) == (loads, stores)
        assert (usage.spill_bytes, usage.stack_bytes) == (0, 0)
        assert usage.registers <= 96
