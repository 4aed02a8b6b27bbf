"""Edges of the gate, the mixture and the categorical distribution: sums of probabilities, extremes, refusals."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dgm_kernels import categorical_log_prob, discretized_logistic_mixture, gated_activation, use_backend
from dgm_kernels.masked_conv import op
from tests.contract import max_error
from tests.pixel_cases import BACKENDS, NATIVE, draw_levels, eager_gate

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
Call = tuple[Any, type[Exception], str]


def grid(levels: int) -> Tensor:
    """Every level of one channel, ``[levels, 1]``."""
    return (torch.arange(levels) * (2.0 / (levels - 1)) - 1)[:, None]


# ---- Mixture


@on_every_backend
@pytest.mark.parametrize("levels", [2, 3, 16, 256])
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_probabilities_of_all_levels_sum_to_one(levels, scale, backend):
    """At means inside and outside of the range, at narrow and wide scales."""
    parameters = scale * torch.randn(50, 12)
    parameters[:, 8:] -= 2
    x = grid(levels).repeat(50, 1)
    with use_backend(backend):
        log_prob = discretized_logistic_mixture(x, parameters.repeat_interleave(levels, 0), levels=levels)
    sums = log_prob.double().exp().view(50, levels).sum(1)
    torch.testing.assert_close(sums, torch.ones(50).double(), rtol=0, atol=2e-6)


@on_every_backend
def test_probabilities_of_all_colours_sum_to_one(backend):
    """4 levels in each of three channels: the means of the second and third move with what is before."""
    x = torch.tensor(list(itertools.product(grid(4).flatten().tolist(), repeat=3)))
    parameters = torch.randn(20, 30)
    with use_backend(backend):
        log_prob = discretized_logistic_mixture(x.repeat(20, 1), parameters.repeat_interleave(64, 0), levels=4)
    sums = log_prob.double().exp().view(20, 64).sum(1)
    torch.testing.assert_close(sums, torch.ones(20).double(), rtol=0, atol=2e-6)


def published_log_prob(x: Tensor, parameters: Tensor) -> Tensor:
    """``discretized_mix_logistic_loss`` of PixelCNN++ (three channels, 256 levels) without its sum over the pixels."""
    mixtures = parameters.shape[1] // 10
    logits = parameters[:, :mixtures]
    means, log_scales, coefficients = parameters[:, mixtures:].unflatten(1, (3, 3, mixtures)).unbind(2)
    log_scales, coefficients = log_scales.clamp(min=-7.0), torch.tanh(coefficients)
    green = means[:, 1] + coefficients[:, 0] * x[:, 0:1]
    blue = means[:, 2] + coefficients[:, 1] * x[:, 0:1] + coefficients[:, 2] * x[:, 1:2]
    centred = x[:, :, None] - torch.stack((means[:, 0], green, blue), 1)
    inverse = torch.exp(-log_scales)
    plus, minus, middle = inverse * (centred + 1 / 255), inverse * (centred - 1 / 255), inverse * centred
    delta = torch.sigmoid(plus) - torch.sigmoid(minus)
    density = middle - log_scales - 2 * F.softplus(middle)
    inner = torch.where(delta > 1e-5, torch.log(delta.clamp(min=1e-12)), density - torch.log(torch.tensor(127.5)))
    each = torch.where(
        (x < -0.999)[:, :, None],
        plus - F.softplus(plus),
        torch.where((x > 0.99)[:, :, None], -F.softplus(minus), inner),
    )
    return torch.logsumexp(each.sum(1) + torch.log_softmax(logits, 1), 1)


@on_every_backend
def test_the_published_formula(backend):
    """In float64, where it is accurate: at scales for which no difference is below its threshold of 1e-5.

    Level 254 is left out: the bound 0.99 takes it for the last one.
    """
    x = draw_levels((2, 3, 40, 5), 256)
    x[x > 0.99] = 1.0
    parameters = 0.3 * torch.randn(2, 100, 40, 5)
    with use_backend(backend):
        actual = discretized_logistic_mixture(x, parameters)
    expected = published_log_prob(x.double(), parameters.double())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def extremes() -> Tensor:
    """Parameters ``[n, 3]`` of one logistic: log-scales from far below the bound to where all levels are equal."""
    means = [0.0, 0.3, -1.0, 1.0, 1.5, -40.0, 1e4]
    scales = [-100.0, -20.0, -7.0001, -7.0, -6.9999, -3.0, 0.0, 5.0, 20.0, 40.0, 80.0]
    return torch.tensor([[0.0, mean, scale] for mean, scale in itertools.product(means, scales)])


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("levels", [2, 5, 256])
def test_extreme_parameters(levels, backend):
    """Values and gradients to the precision of float32 at every scale, near, far from and at the ends of the range."""
    parameters = extremes()
    x = torch.cat((grid(levels)[:: max(1, levels // 16)], grid(levels)[-1:]))
    wide, x = parameters.repeat_interleave(len(x), 0), x.repeat(len(parameters), 1)

    def results(parameters: Tensor) -> list[Tensor]:
        leaf = parameters.clone().requires_grad_()
        y = discretized_logistic_mixture(x.to(leaf), leaf, levels=levels)
        return [y.detach(), *torch.autograd.grad(y.sum(), leaf)]

    with use_backend(backend):
        actual = results(wide)
    for index, (a, e) in enumerate(zip(actual, results(wide.double()), strict=True)):
        assert bool(e.isfinite().all())
        error = (a.double() - e).abs() / e.abs().clamp(min=1)
        assert float(error.max()) < 1e-5, f"output {index}: {float(error.max())}"


@on_every_backend
def test_extreme_numbers_of_a_mixture(backend):
    """One component far better than others, logits that differ by hundreds, and coefficients at their bounds."""
    x = draw_levels((40, 3, 7), 256)
    parameters = torch.randn(40, 40, 7)
    parameters[:, :4] *= torch.logspace(0, 2.5, 40)[:, None, None]
    parameters[:10, 4:] *= 4
    parameters[10:20, 13:16] = 50.0
    parameters[20:30, 4:] *= 0.01
    parameters[30:, 0] = -torch.inf
    with use_backend(backend):
        actual = discretized_logistic_mixture(x, parameters)
    exact = discretized_logistic_mixture(x.double(), parameters.double())
    assert bool(actual.isfinite().all())
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)


@on_every_backend
def test_a_log_scale_below_its_bound_has_no_gradient(backend):
    x, parameters = draw_levels((3, 1, 9), 256), torch.randn(3, 6, 9)
    parameters[:, 4] = -9.0
    with use_backend(backend):
        leaf = parameters.clone().requires_grad_()
        discretized_logistic_mixture(x, leaf).sum().backward()
        moved = parameters.clone()
        moved[:, 4] = -7.0
        at_bound = discretized_logistic_mixture(x, moved)
        torch.testing.assert_close(discretized_logistic_mixture(x, parameters), at_bound, rtol=0, atol=0)
    assert bool((leaf.grad[:, 4] == 0).all()) and bool((leaf.grad[:, 5] != 0).all())


@on_every_backend
def test_nan_reaches_its_own_pixel_only(backend):
    x, parameters = draw_levels((2, 3, 20), 256), torch.randn(2, 20, 20)
    for row in range(20):
        broken = parameters.clone()
        broken[1, row, 3] = torch.nan
        with use_backend(backend):
            isnan = discretized_logistic_mixture(x, broken).isnan()
        if row < 2 or row < 14:  # the coefficients of red count for green
            assert bool(isnan[1, 3])
        isnan[1, 3] = False
        assert not bool(isnan.any())


# ---- Categorical


@on_every_backend
@pytest.mark.parametrize(("levels", "pixels"), [(3, 5), (256, 40), (31, 1), (300, 1)])
def test_logits_of_any_size(levels, pixels, backend):
    """Masked levels (-infinity), huge and tiny logits, and large offsets."""
    logits = torch.randn(6, levels, pixels)
    logits[1] *= 1e4
    logits[2] += 100.0
    logits[3] = -1e30
    logits[4, : levels - 1] = -torch.inf
    logits[5, 1:] = -torch.inf
    x = torch.randint(0, levels, (6, pixels))
    x[4], x[5] = levels - 1, 0
    gradient = torch.randn(6, pixels)

    def results(logits: Tensor) -> list[Tensor]:
        leaf = logits.clone().requires_grad_()
        y = categorical_log_prob(x, leaf)
        return [y.detach(), torch.autograd.grad(y, leaf, gradient.to(y))[0]]

    with use_backend(backend):
        actual = results(logits)
    for a, e in zip(actual, results(logits.double()), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=2e-6, atol=2e-5)


@on_every_backend
@pytest.mark.parametrize("pixels", [1, 40])
def test_logits_that_have_no_softmax_give_nan(pixels, backend):
    x = torch.zeros(3, pixels, dtype=torch.int64)
    for bad in (torch.nan, torch.inf, -torch.inf):
        logits = torch.randn(3, 20, pixels)
        logits[1] = bad
        with use_backend(backend):
            isnan = categorical_log_prob(x, logits).isnan()
        assert bool(isnan[1].all()) and not bool(isnan[::2].any())


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("shape", [(2, 7, 1), (2, 40, 1), (2, 7, 50), (2, 7, 64)])
def test_a_direct_call_with_levels_out_of_range(shape, backend):
    """NaN, in the value and in the gradient, for these pixels alone; nothing is read out of bounds."""
    outer, levels, inner = shape
    logits = torch.randn(shape)
    for bad in (-1, levels, 2**40, -(2**62)):
        x = torch.randint(0, levels, (outer, inner))
        x[1, inner // 2] = bad
        log_prob, normaliser = op.categorical[backend](x, logits)
        gradient = op.categorical_backward[backend](torch.ones(outer, inner), x, logits, normaliser)
        expected = torch.zeros(outer, inner, dtype=torch.bool)
        expected[1, inner // 2] = True
        assert torch.equal(log_prob.isnan(), expected)
        assert torch.equal(gradient.isnan(), expected[:, None].expand(shape))


# ---- Gate


@on_every_backend
def test_the_gate_at_its_ends(backend):
    values = torch.tensor([0.0, -0.0, 1e-30, -1e-8, 1e-3, 8.0, -20.0, 88.0, -88.0, 104.0, -104.0, 3e38, -3e38])
    ends = torch.tensor([torch.inf, -torch.inf])
    pairs = torch.cartesian_prod(torch.cat((values, ends)), torch.cat((values, ends)))[:, :, None]
    with use_backend(backend):
        leaf = pairs.clone().requires_grad_()
        y = gated_activation(leaf)
        (gradient,) = torch.autograd.grad(y.sum(), leaf)
    exact = pairs.double().requires_grad_()
    expected = eager_gate(exact)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    assert max_error(y, expected) < 3e-7
    assert max_error(gradient, expected_gradient) < 5e-7
    small = pairs.abs().amax(1).flatten() < 1e-2
    torch.testing.assert_close(y[small].double(), expected[small], rtol=1e-6, atol=0)  # tanh keeps its digits


@on_every_backend
def test_the_gate_keeps_nan(backend):
    x = torch.randn(2, 4, 50)
    x[0, 1, 7] = x[1, 2, 9] = torch.nan  # a feature; a gate
    leaf = x.clone().requires_grad_()
    with use_backend(backend):
        y = gated_activation(leaf)
        (gradient,) = torch.autograd.grad(y.sum(), leaf)
    assert y.isnan().nonzero().tolist() == [[0, 1, 7], [1, 0, 9]]
    nan = gradient.isnan().nonzero().tolist()
    assert nan == [[0, 1, 7], [0, 3, 7], [1, 0, 9], [1, 2, 9]]


# ---- Refusals


def bad_calls() -> dict[str, Call]:
    x, c = torch.randn(2, 4, 5), torch.randn(2, 4)
    levels, p = draw_levels((2, 3, 5), 256), torch.randn(2, 20, 5)
    index, logits = torch.zeros(2, 5, dtype=torch.int64), torch.randn(2, 7, 5)
    gate, mix, cat = gated_activation, discretized_logistic_mixture, categorical_log_prob
    return {
        "gate, x no tensor": (lambda: gate([1.0]), TypeError, "^x must be a tensor, got list"),
        "gate, x int": (lambda: gate(x.long()), TypeError, "^x must be a floating-point"),
        "gate, odd channels": (lambda: gate(x[:, :3]), ValueError, r"^x must .* even .* got \(2, 3, 5\)"),
        "gate, one dimension": (lambda: gate(x[0, 0]), ValueError, r"^x must have shape .* got \(5,\)"),
        "gate, condition no tensor": (
            lambda: gate(x, 1.0),
            TypeError,
            "^condition must be a tensor or None, got float",
        ),
        "gate, condition of half": (lambda: gate(x, c[:, :2]), ValueError, r"^condition must .* got \(2, 2\)"),
        "gate, condition int": (lambda: gate(x, c.long()), TypeError, "^condition must be a floating-point"),
        "gate, condition elsewhere": (lambda: gate(x, c.to("meta")), ValueError, "^condition must be on"),
        "gate, groups": (lambda: gate(x, channel_groups=3), ValueError, "^channel_groups must divide .* got 3"),
        "gate, groups 0": (lambda: gate(x, channel_groups=0), ValueError, "^channel_groups must be at least 1, got 0"),
        "gate, groups float": (lambda: gate(x, channel_groups=1.5), TypeError, "^channel_groups must be an int"),
        "mixture, x no tensor": (lambda: mix(None, p), TypeError, "^x must be a tensor, got NoneType"),
        "mixture, x int": (lambda: mix(levels.long(), p), TypeError, "^x must be a floating-point"),
        "mixture, x of bytes": (
            lambda: mix(levels * 100, p),
            ValueError,
            r"^x must be in \[-1, 1\], got values from -",
        ),
        "mixture, two channels": (lambda: mix(levels[:, :2], p), ValueError, "^x must have 1 or 3 channels, got 2"),
        "mixture, x without channels": (lambda: mix(levels[0, 0], p), ValueError, "^x must have shape"),
        "mixture, parameters no tensor": (lambda: mix(levels, 3), TypeError, "^parameters must be a tensor, got int"),
        "mixture, parameters int": (lambda: mix(levels, p.long()), TypeError, "^parameters must be a floating-point"),
        "mixture, 15 parameters": (lambda: mix(levels, p[:, :15]), ValueError, r"^parameters .* 10 K, .*\(2, 15, 5\)"),
        "mixture, no parameters": (lambda: mix(levels, p[:, :0]), ValueError, "^parameters must have shape"),
        "mixture, pixels": (
            lambda: mix(levels, p[:, :, :4]),
            ValueError,
            "^parameters must have the batch and the pixels",
        ),
        "mixture, levels 1": (lambda: mix(levels, p, levels=1), ValueError, "^levels must be at least 2, got 1"),
        "mixture, levels float": (lambda: mix(levels, p, levels=2.5), TypeError, "^levels must be an int, got 2.5"),
        "categorical, logits no tensor": (lambda: cat(index, [1]), TypeError, "^logits must be a tensor, got list"),
        "categorical, logits int": (lambda: cat(index, index), TypeError, "^logits must be a floating-point"),
        "categorical, x float": (
            lambda: cat(index.float(), logits),
            TypeError,
            "^x must be an int64 tensor, got torch.flo",
        ),
        "categorical, x list": (lambda: cat([0], logits), TypeError, "^x must be an int64 tensor, got list"),
        "categorical, shape of x": (
            lambda: cat(index[:, :4], logits),
            ValueError,
            r"^x must .* \(2, 5\), got \(2, 4\)",
        ),
        "categorical, dim": (lambda: cat(index, logits, dim=3), ValueError, "^dim must be one of the 3 .* got 3"),
        "categorical, dim float": (lambda: cat(index, logits, dim=0.5), ValueError, "^dim must be one of the 3"),
        "categorical, x too large": (lambda: cat(index + 7, logits), ValueError, r"^x must be in \[0, 7\), .* got 7"),
        "categorical, x negative": (lambda: cat(index - 1, logits), ValueError, r"^x must be in \[0, 7\), .* got -1"),
        "categorical, no levels": (
            lambda: cat(index, logits[:, :0]),
            ValueError,
            "^logits must have at least one level",
        ),
        "categorical, x elsewhere": (lambda: cat(index.to("meta"), logits), ValueError, "^x must be on"),
    }


BAD = bad_calls()


@on_every_backend
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, backend):
    call, error, message = BAD[name]
    with use_backend(backend), pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("backend", NATIVE)
def test_direct_calls_are_held_to_their_layout(backend):
    """The ops themselves refuse what the public functions bring into form."""
    x, p = torch.randn(2, 4, 6), torch.randn(2, 6, 6)
    levels, index, logits = draw_levels((2, 1, 6), 256), torch.zeros(2, 5, dtype=torch.int64), torch.randn(2, 7, 5)
    wrong: list[tuple[Any, tuple[Any, ...], str]] = [
        (op.gate, (x.mT.contiguous().mT, None), "^x must be contiguous"),
        (op.gate, (x, torch.randn(4, 2).T), "^condition must be contiguous"),
        (op.gate, (x.double(), None), "^x must be float32"),
        (op.gate, (x, torch.randn(2, 3)), "^condition must be"),
        (op.gate_backward, (torch.randn(2, 4, 6), x, None), "^grad must have half"),
        (op.mixture, (levels, p[:, :5].contiguous(), 256), "^parameters must have 3 numbers"),
        (op.mixture, (levels, p, 1), "^levels must be at least 2"),
        (op.mixture_backward, (torch.randn(2, 5), levels, p, 256), "^grad must be contiguous"),
        (op.categorical, (index.int(), logits), "^x must be int64"),
        (op.categorical, (index[:1], logits), "^x must be contiguous"),
        (op.categorical, (index, logits[:, :0]), "^logits must have shape"),
        (op.categorical_backward, (torch.ones(2, 5).half(), index, logits, torch.ones(2, 5)), "^grad must be float32"),
    ]
    for overloads, args, message in wrong:
        with pytest.raises((ValueError, TypeError), match=message):
            overloads[backend](*args)
