"""Values of the density op: parity, dtypes, far tails, far and narrow data, edges; finite data sets (F8, G5, H3)."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from dgm_kernels import (
    EMStatistics,
    Schedule,
    empirical_denoiser,
    kde_log_prob,
    mixture_em_statistics,
    mixture_log_prob,
    mmd,
    use_backend,
)
from dgm_kernels.density import reference
from tests.cases import BACKENDS
from tests.contract import assert_parity
from tests.density_cases import (
    CASES,
    DENOISER_CASES,
    EM_CASES,
    KDE_CASES,
    MIXTURE_CASES,
    MMD_CASES,
    PREDICTIONS,
    SIZES,
    SMALL,
    Sizes,
    as_tuple,
    eager_denoiser,
    eager_mixture,
    random_factor,
)
from tests.density_errors import Draw, assert_parity_of_draws

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@on_every_backend
@every_case
def test_parity(case, backend):
    for sizes in filter(case.takes, SIZES):

        def draw(sizes: Sizes = sizes) -> Draw:
            operands = case.make(sizes)
            exact = as_tuple(case.call_eager(*(operand.double() for operand in operands)))
            forms = [as_tuple(case.call_eager(*operands, differences=differences)) for differences in case.forms(sizes)]
            with use_backend(backend):
                return as_tuple(case.call(*operands)), forms, exact

        outputs = as_tuple(case.call_eager(*case.make(SMALL)))
        names = [f"output {index}" for index in range(len(outputs))]
        assert_parity_of_draws(draw, sizes, names, slack=2.0)


@every_case
def test_float64_reference_is_the_formula(case):
    for sizes in filter(case.takes, (Sizes(1, 1, 1), Sizes(59, 31, 3), Sizes(7, 12, 40))):
        operands = case.make(sizes, torch.float64)
        actual, expected = as_tuple(case.call(*operands)), as_tuple(case.call_eager(*operands))
        assert all(output.dtype == torch.float64 for output in actual)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def by_differences(x: Tensor, means: Tensor, scale: Tensor) -> Tensor:
    """The exact mixture's log-density, in float64 and from the differences of points and means."""
    return eager_mixture(x.double(), means.double(), scale=scale.double(), differences=True)


@on_every_backend
@pytest.mark.parametrize("shape", [(1,), (31,), (31, 16)], ids=str)
def test_no_digits_are_lost_to_a_product(shape, backend):
    """Of points among the components float32 keeps 6 digits, as the differences of points and means do."""
    x, means = torch.randn(113, 16), torch.randn(31, 16)
    scale = 0.5 + torch.rand(shape)
    with use_backend(backend):
        actual = mixture_log_prob(x, means, scale=scale)
    torch.testing.assert_close(actual.double(), by_differences(x, means, scale), rtol=2e-6, atol=2e-6)


@on_every_backend
@every_case
def test_16_bit_operands_are_worked_on_in_float32(case, backend):
    """The bits of a call on the same numbers in float32; what a denoiser returns has the dtype of x_t."""
    for dtype in (torch.bfloat16, torch.float16):
        operands = case.make(Sizes(9, 5, 3), dtype)
        if "weights" in case.names:  # numbers of a few bits that sum to 1
            operands[case.names.index("weights")] = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625], dtype=dtype)
        if "covariance" in case.names:
            covariance = operands[case.names.index("covariance")]
            operands[case.names.index("covariance")] = (covariance + torch.eye(3, dtype=dtype)).clone()
        with use_backend(backend):
            actual = as_tuple(case.call(*operands))
            expected = list(as_tuple(case.call(*(operand.float() for operand in operands))))
        if case in DENOISER_CASES:
            expected[0] = expected[0].to(dtype)
        assert [a.dtype for a in actual] == [e.dtype for e in expected]
        torch.testing.assert_close(actual, tuple(expected), rtol=0, atol=0)


@on_every_backend
def test_one_float64_operand_makes_all_float64(backend):
    """On the reference, which alone has float64."""
    x, means, scale = torch.randn(3, 2), torch.randn(4, 2), torch.ones(4)
    with use_backend("auto" if backend != "reference" else backend):
        for index in range(3):
            given = [t.double() if i == index else t for i, t in enumerate((x, means, scale))]
            result = mixture_log_prob(*given[:2], scale=given[2])
            assert result.dtype == torch.float64
            torch.testing.assert_close(result, by_differences(x, means, scale), rtol=1e-12, atol=1e-12)
        assert kde_log_prob(x, means, torch.tensor(0.5, dtype=torch.float64)).dtype == torch.float64
        assert mmd(x, means.double()).dtype == torch.float64
        denoised = empirical_denoiser(x, means.double(), 0.5, 0.5, return_log_prob=True)
        assert [t.dtype for t in denoised] == [torch.float32, torch.float64]


@on_every_backend
@every_case
def test_leading_dimensions_and_single_points(case, backend):
    """[..., D] has the values of [points, D]; of a point alone the result has no dimension of points."""
    if case in MMD_CASES:
        pytest.skip("takes matrices")
    operands = case.make(Sizes(12, 5, 3))
    per_point = [operand.shape[:1] == (12,) for operand in operands]
    with use_backend(backend):
        flat = as_tuple(case.call(*operands))
        for shape in ((3, 4), (2, 1, 6)):
            wide = [o.view(*shape, *o.shape[1:]) if each else o for o, each in zip(operands, per_point, strict=True)]
            for actual, expected in zip(as_tuple(case.call(*wide)), flat, strict=True):
                if case not in EM_CASES:
                    assert actual.shape == (*shape, *expected.shape[1:])
                torch.testing.assert_close(actual.reshape(expected.shape), expected, rtol=0, atol=0)
        if case not in EM_CASES:
            alone = as_tuple(case.call(*(o[7] if each else o for o, each in zip(operands, per_point, strict=True))))
            for actual, expected in zip(alone, flat, strict=True):
                torch.testing.assert_close(actual, expected[7], rtol=2e-6, atol=2e-6)


@on_every_backend
@pytest.mark.parametrize("case", [*MIXTURE_CASES, *KDE_CASES, *DENOISER_CASES], ids=str)
def test_zero_points(case, backend):
    for shape in ((0,), (3, 0), (0, 3)):
        operands = case.leaves(case.make(Sizes(0, 5, 3)), backend)
        given = [o.view(*shape, *o.shape[1:]) if o.shape[:1] == (0,) else o for o in operands]
        with use_backend(backend):
            outputs = as_tuple(case.call(*given))
            sum(output.sum() for output in outputs).backward()
        if case.function is mixture_log_prob:
            assert [o.shape for o in outputs] == [shape, (*shape, 5)][: len(outputs)]
        assert outputs[0].numel() == 0
        assert all(operand.grad is None or not operand.grad.any() for operand in operands)
        assert operands[0].grad is not None
        assert operands[0].grad.shape == (0, 3)


@on_every_backend
def test_one_component_is_a_gaussian(backend):
    x, mean, scale = torch.randn(59, 3), torch.randn(1, 3), torch.tensor([[0.5, 1.0, 2.0]])
    expected = torch.distributions.Normal(mean, scale).log_prob(x).sum(1)
    with use_backend(backend):
        actual, r = mixture_log_prob(x, mean, scale=scale, weights=torch.ones(1), return_responsibilities=True)
        counts = mixture_em_statistics(x, mean, scale=scale)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(r, torch.ones(59, 1))
    torch.testing.assert_close(counts.first[0], (x - mean).sum(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(counts.second[0], (x - mean).square().sum(0), rtol=1e-5, atol=1e-4)


@on_every_backend
def test_one_data_point_is_what_every_noisy_point_was(backend):
    x, data = torch.randn(59, 3), torch.randn(1, 3)
    with use_backend(backend):
        assert torch.equal(empirical_denoiser(x, data, 0.7, 0.3), data.expand(59, 3))
        eps = empirical_denoiser(x, data, 0.7, 0.3, prediction="eps")
        torch.testing.assert_close(eps, (x - 0.7 * data) / 0.3, rtol=1e-5, atol=1e-5)
        log_prob = kde_log_prob(x, data, 0.5)
    torch.testing.assert_close(log_prob, torch.distributions.Normal(data, 0.5).log_prob(x).sum(1), rtol=1e-5, atol=1e-5)


@on_every_backend
@pytest.mark.parametrize("distance", [40.0, 1e4])
@pytest.mark.parametrize("kind", ["shared", "spherical", "diagonal", "scale_tril"])
def test_far_tails_are_finite_and_right(kind, distance, backend):
    """40 and 10 000 standard deviations away, where every density underflows; gradients too."""
    d, k = 16, 31
    means = torch.randn(k, d)
    shape = {"shared": (1,), "spherical": (k,), "diagonal": (k, d)}
    spread = {"scale": 0.5 + torch.rand(shape[kind])} if kind in shape else {kind: random_factor(Sizes(1, k, d))}
    direction = torch.nn.functional.normalize(torch.randn(59, d), dim=1)
    x = (distance * direction).requires_grad_()
    with use_backend(backend):
        actual, r = mixture_log_prob(x, means, **spread, return_responsibilities=True)
        (gradient,) = torch.autograd.grad(actual.sum(), x)
    wide = {name: value.double() for name, value in spread.items()}
    x64 = x.detach().double().requires_grad_()
    exact = eager_mixture(x64, means.double(), **wide, differences=True)
    (exact_gradient,) = torch.autograd.grad(exact.sum(), x64)
    torch.testing.assert_close(actual.double(), exact.detach(), rtol=2e-6, atol=0)
    assert r.isfinite().all()
    torch.testing.assert_close(r.sum(1), torch.ones(59), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-2, atol=1e-3 * distance)


@on_every_backend
def test_far_queries_of_a_data_set_are_finite(backend):
    """Whatever the noise level, the mean is a mean of the data and the log-density a number."""
    data, x = torch.randn(113, 16), 1e4 * torch.nn.functional.normalize(torch.randn(59, 16), dim=1)
    with use_backend(backend):
        for alpha, sigma in ((1.0, 1.0), (0.5, 1e-2), (1e-3, 1.0)):
            mean, log_prob = empirical_denoiser(x, data, alpha, sigma, return_log_prob=True)
            assert mean.isfinite().all() and log_prob.isfinite().all()
            assert bool((mean.amax(0) <= data.amax(0) + 1e-5).all() and (mean.amin(0) >= data.amin(0) - 1e-5).all())
            exact = eager_denoiser(x.double(), data.double(), alpha, sigma, return_log_prob=True)[1]
            torch.testing.assert_close(log_prob.double(), exact, rtol=2e-6, atol=1e-3)
        assert kde_log_prob(x, data, 0.1).isfinite().all()


@on_every_backend
@pytest.mark.parametrize("shape", [(1,), (31,), (31, 16)], ids=str)
def test_data_far_from_zero(shape, backend):
    """Mean 1000, scale 1: exact to about 1e-3, which the squares of the numbers, 1e6 x 16, would not leave."""
    means = 1e3 + torch.randn(31, 16)
    x = 1e3 + torch.randn(113, 16)
    scale = 0.5 + torch.rand(shape)
    with use_backend(backend):
        log_prob = mixture_log_prob(x, means, scale=scale)
        denoised = empirical_denoiser(x, means, 1.0, 1.0)
        statistics = mixture_em_statistics(x, means, scale=scale)
    torch.testing.assert_close(log_prob.double(), by_differences(x, means, scale), rtol=0, atol=1e-3)
    r = torch.softmax(-0.5 * torch.cdist(x.double(), means.double()).square(), 1)
    torch.testing.assert_close(denoised.double(), r @ means.double(), rtol=0, atol=1e-3)
    with use_backend("reference"):
        exact = mixture_em_statistics(x.double(), means.double(), scale=scale.double())
    for a, e in zip(statistics, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-3, atol=1e-3 * float(e.abs().max()))


@on_every_backend
def test_narrow_bandwidths(backend):
    """The data are 10 000 bandwidths wide: as exact as eager, and finite; a point on a data point is seen there."""
    h = 1e-4
    data = torch.randn(113, 3)
    near = data[:59] + h * torch.randn(59, 3)
    x = torch.cat([near, torch.randn(54, 3)])
    exact = by_differences(x, data, torch.tensor([h]))
    products = eager_mixture(x, data, scale=torch.tensor([h]))
    with use_backend(backend):
        actual = kde_log_prob(x, data, h)
        denoised = empirical_denoiser(near, data, 1.0, h)
    assert_parity(actual, products, exact, tiny=1e-6 * float(exact.abs().max()))
    torch.testing.assert_close(denoised, data[:59], rtol=0, atol=1e-3)


@on_every_backend
def test_a_weight_of_zero_removes_a_component(backend):
    x, means, scale = torch.randn(59, 3), torch.randn(5, 3), 0.5 + torch.rand(5, 3)
    weights = torch.tensor([0.25, 0.0, 0.5, 0.0, 0.25])
    kept = weights > 0
    with use_backend(backend):
        log_prob, r = mixture_log_prob(x, means, scale=scale, weights=weights, return_responsibilities=True)
        expected = mixture_log_prob(x, means[kept], scale=scale[kept], weights=weights[kept])
        by_logits = mixture_log_prob(x, means, scale=scale, logits=weights.log())
        statistics = mixture_em_statistics(x, means, scale=scale, weights=weights)
        few = mixture_em_statistics(x, means[kept], scale=scale[kept], weights=weights[kept])
        denoised = empirical_denoiser(x, means, 0.9, 0.5, weights=weights)
        denoised_few = empirical_denoiser(x, means[kept], 0.9, 0.5, weights=weights[kept])
        kde = kde_log_prob(x, means, 0.5, weights=weights)
        kde_few = kde_log_prob(x, means[kept], 0.5, weights=weights[kept])
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(log_prob, expected, **close)
    torch.testing.assert_close(by_logits, expected, **close)
    torch.testing.assert_close((denoised, kde), (denoised_few, kde_few), **close)
    assert not r[:, ~kept].any()
    for name in ("counts", "first", "second"):
        full, part = getattr(statistics, name), getattr(few, name)
        assert not full[~kept].any()
        torch.testing.assert_close(full[kept], part, rtol=1e-5, atol=1e-4)


@on_every_backend
def test_what_is_above_the_diagonal_is_not_read(backend):
    x, means, factor = torch.randn(9, 4), torch.randn(3, 4), random_factor(Sizes(9, 3, 4))
    above = torch.ones(4, 4).triu(1) > 0
    with use_backend(backend):
        expected = mixture_log_prob(x, means, scale_tril=factor)
        for junk in (7.0, torch.nan):
            leaf = factor.masked_fill(above, junk).requires_grad_()
            actual = mixture_log_prob(x, means, scale_tril=leaf)
            assert torch.equal(actual, expected)
            (gradient,) = torch.autograd.grad(actual.sum(), leaf)
            assert gradient.isfinite().all() and not gradient[:, above].any()


@on_every_backend
def test_a_nan_stays_in_its_point(backend):
    x, means, scale = torch.randn(59, 3), torch.randn(31, 3), 0.5 + torch.rand(31, 3)
    spoiled = x.clone()
    spoiled[17, 1] = torch.nan
    others = torch.arange(59) != 17
    with use_backend(backend):
        for function in (
            lambda x: mixture_log_prob(x, means, scale=scale),
            lambda x: mixture_log_prob(x, means, scale=scale[:, 0]),
            lambda x: mixture_log_prob(x, means, scale_tril=torch.diag_embed(scale)),
            lambda x: empirical_denoiser(x, means, 0.8, 0.5),
        ):
            clean, actual = function(x), function(spoiled)
            assert torch.equal(actual[others], clean[others])
            assert actual[17].isnan().all()


@on_every_backend
def test_kinds_agree(backend):
    """A shared scale, one a component, one a dimension, a factor and a covariance that say the same."""
    x, means = torch.randn(59, 3), torch.randn(31, 3)
    scale = torch.full((1,), 0.7)
    forms = (
        {"scale": scale},
        {"scale": scale.expand(31)},
        {"scale": scale.expand(31, 3)},
        {"scale_tril": torch.diag_embed(scale.expand(31, 3))},
        {"covariance": torch.diag_embed(scale.square().expand(31, 3))},
    )
    with use_backend(backend):
        results = [mixture_log_prob(x, means, **form) for form in forms]
        results.append(kde_log_prob(x, means, 0.7))
        results.append(kde_log_prob(x, means, torch.tensor(0.7)))
        statistics = [mixture_em_statistics(x, means, **form) for form in forms]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)
    for other in statistics:
        assert isinstance(other, EMStatistics)
        torch.testing.assert_close(other[:3], statistics[0][:3], rtol=1e-4, atol=1e-4)
    diagonals = [statistics[2].second, *(s.second.diagonal(dim1=1, dim2=2) for s in statistics[3:])]
    for diagonal in diagonals:
        torch.testing.assert_close(diagonal.sum(1), statistics[1].second, rtol=1e-4, atol=1e-4)


def test_the_reference_works_in_pieces(monkeypatch):
    """Of any size, with the same values."""
    for case in CASES:
        operands = case.make(SMALL._replace(points=23), torch.float64)
        with use_backend("reference"):
            expected = as_tuple(case.call(*operands))
            with monkeypatch.context() as patch:
                patch.setattr(reference, "_PIECE", 8)
                actual = as_tuple(case.call(*operands))
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


class TestFiniteData:
    """What the exact denoiser of a finite data set must be, as the lessons on diffusion and flow matching derive it."""

    @on_every_backend
    @pytest.mark.parametrize("per_point", [False, True])
    def test_predictions_are_one_answer_in_other_terms(self, per_point, backend):
        x, data = torch.randn(59, 3), torch.randn(31, 3)
        shape = (59,) if per_point else ()
        alpha, sigma = 0.2 + torch.rand(shape), 0.2 + torch.rand(shape)
        with use_backend(backend):
            x0, eps, score, v, velocity = (
                empirical_denoiser(x, data, alpha, sigma, prediction=name) for name in PREDICTIONS
            )
        a, s = alpha[..., None], sigma[..., None]
        torch.testing.assert_close(a * x0 + s * eps, x, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(score * s, -eps, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(v, a * eps - s * x0, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(velocity, x0 - eps, rtol=1e-4, atol=1e-5)

    @on_every_backend
    def test_levels_a_point_are_those_of_a_call_a_level(self, backend):
        x, data = torch.randn(6, 3), torch.randn(31, 3)
        alpha, sigma = torch.linspace(0, 1, 6), torch.linspace(1, 0.1, 6)
        with use_backend(backend):
            results = empirical_denoiser(x, data, alpha, sigma, prediction="v", return_log_prob=True)
            for i in range(6):
                alone = empirical_denoiser(x[i], data, alpha[i], float(sigma[i]), prediction="v", return_log_prob=True)
                torch.testing.assert_close((results[0][i], results[1][i]), alone, rtol=1e-5, atol=1e-5)

    @on_every_backend
    @pytest.mark.parametrize("alpha", [0.0, 1e-20, 1e-10, 1e-5])
    def test_without_signal_the_answer_is_the_mean_of_the_data(self, alpha, backend):
        x, data = torch.randn(59, 3), torch.randn(31, 3)
        weights = torch.rand(31, dtype=torch.float64)
        weights = (weights / weights.sum()).float()
        with use_backend(backend):
            x0, log_prob = empirical_denoiser(x, data, alpha, 1.5, weights=weights, return_log_prob=True)
            score = empirical_denoiser(x, data, torch.full((59,), alpha), 1.5, weights=weights, prediction="score")
        expected = torch.distributions.Normal(0.0, 1.5).log_prob(x).sum(1)
        torch.testing.assert_close(x0, (weights @ data).expand(59, 3), rtol=0, atol=1e-4)
        torch.testing.assert_close(log_prob, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(score, -x / 1.5**2, rtol=0, atol=1e-4)

    @on_every_backend
    @pytest.mark.parametrize("weighted", [False, True])
    def test_log_prob_is_that_of_the_noisy_data(self, weighted, backend):
        """x_t has the density of a kernel estimate on alpha times the data, with sigma as bandwidth."""
        x, data = torch.randn(59, 3), torch.randn(31, 3)
        weights = torch.full((31,), 1 / 31) if weighted else None
        with use_backend(backend):
            _, log_prob = empirical_denoiser(x, data, 0.6, 0.4, weights=weights, return_log_prob=True)
            expected = kde_log_prob(x, 0.6 * data, 0.4, weights=weights)
        torch.testing.assert_close(log_prob, expected, rtol=1e-5, atol=1e-5)

    @on_every_backend
    def test_G5_the_exact_score_is_the_gradient_of_the_log_density(self, backend):
        dtype = torch.float64 if backend == "reference" else torch.float32
        x = torch.randn(59, 3, dtype=dtype, requires_grad=True)
        data = torch.randn(31, 3, dtype=dtype)
        tolerance = 1e-10 if dtype == torch.float64 else 2e-5
        with use_backend(backend):
            for alpha, sigma in ((1.0, 0.5), (0.7, 0.3), (0.1, 1.0)):
                score, log_prob = empirical_denoiser(x, data, alpha, sigma, prediction="score", return_log_prob=True)
                (own,) = torch.autograd.grad(log_prob.sum(), x)
                (of_kde,) = torch.autograd.grad(kde_log_prob(x, alpha * data, sigma).sum(), x)
                for gradient in (own, of_kde):
                    torch.testing.assert_close(score.detach(), gradient, rtol=tolerance, atol=tolerance / sigma**2)

    @on_every_backend
    def test_F8_two_points(self, backend):
        """Data {(1, 0), (0, 1)}: the marginal is a mixture of two, the best eps has a softmax over the two."""
        data = torch.eye(2)
        x = 1.5 * torch.randn(113, 2)
        abar = Schedule.linear(1000).alphas_cumprod
        with use_backend(backend):
            for t in (0, 50, 300, 600):
                alpha, sigma = math.sqrt(abar[t]), math.sqrt(1 - abar[t])
                options = {"prediction": "eps", "return_log_prob": True}
                eps, log_prob = empirical_denoiser(x, data, alpha, sigma, **options)
                wide = x.double()
                r = torch.softmax(alpha * wide / sigma**2, 1)  # (1, 0) and (0, 1) are of one length
                exact = (wide - alpha * r) / sigma
                torch.testing.assert_close(eps.double(), exact, rtol=1e-4, atol=1e-5 / sigma**2)
                normals = torch.distributions.Normal(alpha * data.double(), sigma)
                marginal = normals.log_prob(wide[:, None]).sum(2).logsumexp(1) - math.log(2)
                torch.testing.assert_close(log_prob.double(), marginal, rtol=1e-5, atol=1e-5 / sigma**2)

    @on_every_backend
    def test_F8_for_large_t_the_best_eps_is_x_itself(self, backend):
        """With the error ``alpha (1/2, 1/2)`` to first order: the mean of the data."""
        data, x = torch.eye(2), torch.randn(113, 2)
        distances = []
        with use_backend(backend):
            for alpha in (1e-1, 1e-2, 1e-3):
                sigma = math.sqrt(1 - alpha**2)
                eps = empirical_denoiser(x, data, alpha, sigma, prediction="eps")
                first_order = x - alpha * 0.5
                assert float((eps - first_order).abs().max()) <= 6 * alpha**2 + 1e-6
                distances.append(float((eps - x).abs().max()))
        for near, nearer in itertools.pairwise(distances):
            assert nearer == pytest.approx(near / 10, rel=0.3)

    @on_every_backend
    @pytest.mark.parametrize("weights", [(0.25, 0.25, 0.25, 0.25), (0.5, 0.3, 0.2, 0.0)])
    def test_H3_the_exact_velocity_ends_on_the_data(self, weights, backend):
        """Euler steps from noise along E[x0 - eps | x_t], ``x_t = t x0 + (1 - t) eps``: every point of the data gets
        the share of its weight, and a weight of 0 none."""
        data = torch.tensor([[2.0, 0.0], [0.0, 2.0], [-2.0, -1.0], [1.0, -2.0]])
        shares = torch.tensor(weights)
        steps, samples = 100, 2000
        x = torch.randn(samples, 2)
        with use_backend(backend):
            for step in range(steps):
                t = step / steps
                x = x + empirical_denoiser(x, data, t, 1 - t, weights=shares, prediction="velocity") / steps
        distances = torch.cdist(x, data)
        nearest, index = distances.min(1)
        assert float(nearest.quantile(0.99)) < 1e-3  # a point halfway between two is between them to the end
        found = torch.bincount(index, minlength=4) / samples
        slack = 5 * (shares * (1 - shares) / samples).sqrt() + 0.01
        assert bool(((found - shares).abs() <= slack).all()), found
        assert found[3] > 0 or weights[3] == 0
