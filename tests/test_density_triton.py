"""The Triton kernels of the density op in Triton's interpreter, and what the compiler makes of them; needs no GPU."""

import functools
import math
import os

import pytest
import torch

import dgm_kernels as dgm
from tests.contract import (
    assert_bitwise_repeatable,
    assert_inputs_unchanged,
    assert_passes_interpreted,
    compiled_usage,
    max_error,
)
from tests.density_cases import CASES, DENOISER_CASES, EM_CASES, KDE_CASES, MIXTURE_CASES, MMD_CASES, Sizes
from tests.gradients import with_grads

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DGM = torch.ops.dgm
NATIVE_CASES = [case for case in CASES if not case.is_full]  # full covariances are computed by the reference
SMALL = (Sizes(1, 1, 1), Sizes(3, 2, 2), Sizes(37, 35, 17))
WIDE = Sizes(3, 35, 150)  # two parts of a row


def check(case, sizes: Sizes) -> None:
    """At most four times as far off as the worse of eager's two forms: the largest error of one draw is luck."""
    operands = case.make(sizes)
    exact = with_grads(case.call_eager, [operand.double() for operand in operands], case.trained)
    differs = functools.partial(case.call_eager, differences=True)
    forms = [with_grads(call, operands, case.trained) for call in (case.call_eager, differs)]
    with dgm.use_backend("triton"):
        actual = with_grads(case.call, operands, case.trained)
    rounding = 1e-6 * max(1.0, math.sqrt(sizes.features) / 4) + sizes.features * 2**-24
    for index, (a, e) in enumerate(zip(actual, exact, strict=True)):
        scale = max(1.0, float(e.abs().max()))
        eager = max(max_error(form[index], e) for form in forms) / scale
        assert max_error(a, e) / scale <= 4 * eager + 2 * rounding, f"output {index} of {sizes}"


class TestInterpreted:
    """Collected only where TRITON_INTERPRET=1, which Triton reads when a kernel is defined."""

    __test__ = INTERPRETED

    @pytest.mark.parametrize("case", NATIVE_CASES, ids=str)
    def test_values_and_gradients(self, case):
        for sizes in filter(case.takes, SMALL):
            check(case, sizes)

    @pytest.mark.parametrize(
        "case", [MIXTURE_CASES[2], MIXTURE_CASES[5], DENOISER_CASES[6], MMD_CASES[1], MMD_CASES[2]], ids=str
    )
    def test_long_rows(self, case):
        check(case, WIDE)

    @pytest.mark.parametrize("case", [MIXTURE_CASES[0], MIXTURE_CASES[4], DENOISER_CASES[6], MMD_CASES[1]], ids=str)
    def test_split_along_the_components_and_in_pieces(self, case, monkeypatch):
        """As many components and few points are, at sizes that the interpreter can take."""
        from dgm_kernels.density import triton

        for name, number in (("_LEAST", 64), ("_PIECE", 1 << 10), ("_PIECE_POINTS", 16), ("_PART", 8)):
            monkeypatch.setattr(triton, name, number)
        for sizes in (Sizes(19, 140, 3), Sizes(2, 140, 130)):
            check(case, sizes)

    def test_factors_of_the_points(self):
        """``q``, which the public functions give to the posterior mean alone."""
        from dgm_kernels.density import reference

        x, y, offset, weight, q = torch.randn(5, 3), torch.randn(7, 3), torch.randn(7), torch.randn(5), torch.rand(5)
        for inv in (torch.rand(1) + 0.5, torch.rand(7) + 0.5, torch.rand(7, 3) + 0.5):
            wide = [t.double() for t in (x, y, inv, q, offset)]
            lse, r = DGM.density_log_prob.triton(x, y, inv, q, offset, True)
            points = wide[0].requires_grad_()
            exact_lse, exact_r = reference.responsibilities(*wide)
            (to_x,) = torch.autograd.grad((exact_lse * weight).sum(), points)
            exact = [exact_lse, exact_r, to_x, *reference.moments(weight.double(), *wide)]
            actual = [lse, r, DGM.density_grad_x.triton(weight, lse, x, y, inv, q, offset)]
            actual += DGM.density_moments.triton(weight, lse, x, y, inv, q, offset)
            for a, e in zip(actual, exact, strict=True):
                torch.testing.assert_close(a.double(), e.detach(), rtol=1e-5, atol=3e-6)

    def test_a_weight_of_zero_removes_a_component(self):
        x, means = torch.randn(5, 3), torch.randn(4, 3)
        weights = torch.tensor([0.25, 0.0, 0.5, 0.25])
        kept = weights > 0
        for scale in (torch.ones(1), torch.ones(4), 0.5 + torch.rand(4, 3)):
            some = scale if len(scale) == 1 else scale[kept]
            with dgm.use_backend("triton"):
                actual = dgm.mixture_log_prob(x, means, scale=scale, weights=weights)
                expected = dgm.mixture_log_prob(x, means[kept], scale=some, weights=weights[kept])
                sums = dgm.mixture_em_statistics(x, means, scale=scale, weights=weights)
                denoised = dgm.empirical_denoiser(x, means, 0.7, 0.5, weights=weights)
                fewer = dgm.empirical_denoiser(x, means[kept], 0.7, 0.5, weights=weights[kept])
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(denoised, fewer, rtol=1e-5, atol=1e-5)
            assert not any(t[~kept].any() for t in sums[1:])

    @pytest.mark.parametrize("distance", [40.0, 1e4])
    def test_far_tails_are_finite_and_right(self, distance):
        case = MIXTURE_CASES[3]
        for shape in ((1,), (5,), (5, 3)):
            means, scale = torch.randn(5, 3), 0.5 + torch.rand(shape)
            x = (distance * torch.nn.functional.normalize(torch.randn(4, 3), dim=1)).requires_grad_()
            exact = case.eager(x.detach().double(), means.double(), scale=scale.double(), differences=True)
            with dgm.use_backend("triton"):
                actual, r = dgm.mixture_log_prob(x, means, scale=scale, return_responsibilities=True)
                (gradient,) = torch.autograd.grad(dgm.mixture_log_prob(x, means, scale=scale).sum(), x)
            torch.testing.assert_close(actual.detach().double(), exact, rtol=2e-6, atol=0)
            torch.testing.assert_close(r.sum(1).detach(), torch.ones(4), rtol=1e-5, atol=0)
            assert gradient.isfinite().all() and bool((gradient * x < 0).any(1).all())

    def test_narrow_components_keep_their_digits(self):
        """Spreads of 0.1 at distances of 100 from the middle: by products all digits of the spread would be lost."""
        means = torch.tensor([[100.0, -100.0, 100.0], [-100.0, 100.0, -100.0]])
        x = means.repeat(10, 1) + 0.1 * torch.randn(20, 3)
        t = (x.double().view(10, 2, 3) - means.double()).square().sum(0)
        for scale, expected in ((torch.full((2,), 0.1), t.sum(1)), (torch.full((2, 3), 0.1), t)):
            with dgm.use_backend("triton"):
                sums = dgm.mixture_em_statistics(x, means, scale=scale)
            torch.testing.assert_close(sums.counts, torch.tensor([10.0, 10.0]), rtol=1e-6, atol=0)
            torch.testing.assert_close(sums.second.double(), expected, rtol=1e-5, atol=0)
        with dgm.use_backend("triton"):
            near = dgm.empirical_denoiser(x, means, 1.0, 1e-3)
        torch.testing.assert_close(near, means.repeat(10, 1), rtol=1e-6, atol=0)

    def test_a_nan_stays_where_it_is(self):
        x, means = torch.randn(4, 3), torch.randn(5, 3)
        x[2, 1] = torch.nan
        for scale in (torch.ones(1), torch.ones(5, 3)):
            with dgm.use_backend("triton"):
                assert dgm.mixture_log_prob(x, means, scale=scale).isnan().tolist() == [False, False, True, False]
        with dgm.use_backend("triton"):
            denoised = dgm.empirical_denoiser(x, means, 0.7, 0.5)
        assert denoised.isnan().all(1).tolist() == [False, False, True, False] and not denoised[[0, 1, 3]].isnan().any()

    @pytest.mark.parametrize("case", [*MIXTURE_CASES[3:6:2], KDE_CASES[0], DENOISER_CASES[5]], ids=str)
    def test_zero_points(self, case):
        with dgm.use_backend("triton"):
            outputs = with_grads(case.call, case.make(Sizes(0, 5, 3)), case.trained)
        assert outputs[0].numel() == 0 and not any(t.any() for t in outputs)

    @pytest.mark.parametrize("case", [MIXTURE_CASES[5], EM_CASES[2], DENOISER_CASES[6], MMD_CASES[1]], ids=str)
    def test_repeatable_and_inputs_unchanged(self, case):
        operands = case.make(Sizes(9, 40, 3))
        with dgm.use_backend("triton"), assert_inputs_unchanged(*operands):
            assert_bitwise_repeatable(lambda: with_grads(case.call, operands, case.trained), runs=2)

    def test_operands_with_gaps_in_memory(self):
        """Of the ops themselves; the public functions give them contiguous ones."""
        x, y, inv, offset = torch.randn(4, 6)[:, ::2], torch.randn(3, 5).t(), torch.rand(10)[::2] + 0.5, torch.randn(5)
        actual = DGM.density_log_prob.triton(x, y, inv, None, offset, True)
        expected = DGM.density_log_prob.triton(*(t.contiguous() for t in (x, y, inv)), None, offset, True)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))

    def test_refuses_full_covariances(self):
        x, y, offset = torch.randn(4, 3), torch.randn(5, 3), torch.randn(5)
        with pytest.raises(ValueError, match=r"inv must have one or two dimensions.* got shape \(5, 3, 3\)"):
            DGM.density_log_prob.triton(x, y, torch.eye(3).expand(5, 3, 3), None, offset, False)

    @pytest.mark.parametrize("shape", [(1,), (4,), (4, 3)])
    def test_opcheck_of_mixtures(self, shape):
        x, y, offset, weight, q = torch.randn(5, 3), torch.randn(4, 3), torch.randn(4), torch.randn(5), torch.rand(5)
        leaves = [t.requires_grad_() for t in (x.clone(), y.clone(), torch.rand(shape) + 0.5, offset.clone())]
        torch.library.opcheck(DGM.density_log_prob.triton, (*leaves[:3], None, leaves[3], False))
        inv = torch.rand(shape) + 0.5
        torch.library.opcheck(DGM.density_moments.triton, (weight, weight, x, y, inv, q, offset))
        torch.library.opcheck(DGM.density_grad_x.triton, (weight, weight, x, y, inv, q, offset))

    def test_opcheck_of_means_and_kernel_sums(self):
        x, y, offset, shift, q = torch.randn(5, 3), torch.randn(4, 3), torch.randn(4), torch.randn(5), torch.rand(5)
        torch.library.opcheck(DGM.density_mean.triton, (x.clone().requires_grad_(), y, q, offset))
        torch.library.opcheck(DGM.density_mean_grad.triton, (x, shift, x, shift, x, y, q, offset))
        for kind, numbers, other, same in ((0, [0.5, 2.0], y, False), (1, [0.3, 1.0, 3.0], x, True)):
            leaves = [t.clone().requires_grad_() for t in (x, other)]
            torch.library.opcheck(DGM.density_kernel_sum.triton, (*leaves, kind, numbers, same))
            torch.library.opcheck(DGM.density_kernel_sum_grad.triton, (x, other, kind, numbers, same))


class TestNotInterpreted:
    __test__ = not INTERPRETED

    def test_in_the_interpreter(self):
        """Runs the tests above in a process of their own: Triton interprets all kernels of a process or none."""
        assert_passes_interpreted(__file__)

    @pytest.mark.parametrize(
        ("name", "loads", "stores"),
        [
            ("log_prob_spherical_64", 5, 0),
            ("grad_x_diagonal_64", 14, 4),
            ("mean_64", 9, 4),
            ("moments_64", 7, 8),
            ("weighted_rows_784", 0, 8),
        ],
    )
    def test_compiled_accesses_are_16_bytes_and_nothing_spills(self, name, loads, stores):
        """At least so many; tiles that are loaded ahead are not among them, but copied to shared memory."""
        from dgm_kernels.density.triton import aot_specs

        usage = compiled_usage(aot_specs(), name)
        assert usage.wide_loads >= loads and usage.wide_stores >= stores
        assert (usage.spill_bytes, usage.stack_bytes) == (0, 0)
