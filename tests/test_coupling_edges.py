"""Edges of the coupling op: splines at extreme parameters, at and beyond their ends; refusals."""

import itertools
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dgm_kernels import (
    actnorm,
    additive_coupling,
    affine_coupling,
    logistic_log_prob,
    rational_quadratic_spline,
    standard_normal_log_prob,
    use_backend,
)
from dgm_kernels._core import backends as registry
from tests.cases import BACKENDS, DTYPES, NATIVE
from tests.coupling_cases import SPLINE_CASES, eager_spline, spline_edges, spline_operands

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
both_ways = pytest.mark.parametrize("inverse", [False, True])
BOUND = 3.0


def adversarial_parameters(bins: int = 6) -> tuple[Tensor, ...]:
    """Raw parameters [n, bins], ..., [n, bins - 1]: needle bins, flat bins, cliffs, and derivatives of 1e-3 and 30."""
    signs = torch.tensor(list(itertools.product((-30.0, 30.0), repeat=bins)))[:: 2 ** (bins - 5)]
    pairs = torch.cartesian_prod(torch.arange(len(signs)), torch.arange(len(signs)))
    widths, heights = signs[pairs[:, 0]], signs[pairs[:, 1]]
    generator = torch.Generator().manual_seed(0)
    derivatives = 60.0 * (torch.rand(len(pairs), bins - 1, generator=generator) < 0.5) - 30
    return widths, heights, derivatives


def along(parameters: tuple[Tensor, ...], points: Tensor) -> tuple[Tensor, ...]:
    """Every spline at every point: x [splines, points], parameters [splines, points, ...]."""
    x = points.expand(len(parameters[0]), -1) if points.dim() == 1 else points
    return x, *(p[:, None].expand(*x.shape, p.shape[-1]) for p in parameters)


def check_mixed_error(y: Tensor, x: Tensor, function: Any, tolerance: float) -> None:
    """y is the exact value of an increasing function at a point near x, to the tolerance in both directions."""
    x, y = x.double(), y.double()
    assert bool((function(x - tolerance) - tolerance <= y).all())
    assert bool((y <= function(x + tolerance) + tolerance).all())


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adversarial_splines_are_finite_increasing_and_inverted(dtype, backend):
    """Slopes from 1e-7 to 1e3. The error is measured along both axes: where the spline is flat, x is not determined."""
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("native backends have no float64")
    parameters = tuple(p.to(dtype) for p in adversarial_parameters())
    points = torch.cat([torch.linspace(-BOUND, BOUND, 33), torch.tensor([-BOUND - 1e-3, BOUND + 1e-3, -4.0, 4.0])])
    operands = along(parameters, points.to(dtype).sort().values)
    x, raw = operands[0], [p.double() for p in operands[1:]]
    exact = lambda x: eager_spline(x, *raw)[0]  # noqa: E731
    with use_backend(backend):
        y, logdet = rational_quadratic_spline(*operands)
        back, logdet_back = rational_quadratic_spline(x, *operands[1:], inverse=True)
        around, _ = rational_quadratic_spline(y, *operands[1:], inverse=True)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for values in (y, logdet, back, logdet_back, around):
        assert values.isfinite().all()
    assert bool((y.diff(dim=1) >= -tolerance).all())
    assert bool((back.diff(dim=1) >= -tolerance).all())
    check_mixed_error(y, x, exact, tolerance)
    check_mixed_error(x, back, exact, tolerance)
    check_mixed_error(y, around, exact, tolerance)


@on_every_backend
@both_ways
def test_adversarial_gradients_are_finite(inverse, backend):
    operands = [p.clone().requires_grad_() for p in along(adversarial_parameters(), torch.linspace(-3.2, 3.2, 17))]
    with use_backend(backend):
        y, logdet = rational_quadratic_spline(*operands, inverse=inverse)
        for gradient in torch.autograd.grad(y.sum() + logdet.sum(), operands):
            assert gradient.isfinite().all()


@on_every_backend
@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_knots_map_to_knots(dtype, inverse, backend):
    """At a knot the two bins agree, whichever is picked: values, and derivatives those that were asked for."""
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("native backends have no float64")
    _, w, h, d = (p.to(dtype) for p in spline_operands((40,), 8, "linear", BOUND))
    x_knots, y_knots = (spline_edges(raw.double(), BOUND, 1e-3) for raw in (w, h))
    start, goal = (y_knots, x_knots) if inverse else (x_knots, y_knots)
    slopes = torch.nn.functional.pad(1e-3 + torch.nn.functional.softplus(d.double()), (1, 1), value=1.0)
    operands = along((w, h, d), start.to(dtype))
    leaf = operands[0].clone().requires_grad_()
    with use_backend(backend):
        y, _ = rational_quadratic_spline(leaf, *operands[1:], inverse=inverse)
        (slope,) = torch.autograd.grad(y.sum(), leaf)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(y.double(), goal, rtol=0, atol=tolerance)
    expected = 1 / slopes if inverse else slopes
    torch.testing.assert_close(slope.double(), expected, rtol=1e3 * tolerance, atol=1e3 * tolerance)


@on_every_backend
@both_ways
def test_linear_tails_are_the_identity(inverse, backend):
    """Bit by bit, with slope 1 and no gradient for the parameters; infinity too."""
    above = torch.nextafter(torch.tensor(BOUND), torch.tensor(torch.inf))
    row = torch.tensor([above, -above, 3.5, -1e30, torch.inf, -torch.inf])
    x = row.repeat(2, 1).requires_grad_()
    parameters = [p.requires_grad_() for p in spline_operands((2, 6), 5, "linear", BOUND)[1:]]
    with use_backend(backend):
        y, logdet = rational_quadratic_spline(x, *parameters, inverse=inverse)
        gradients = torch.autograd.grad(y.sum() + logdet.sum(), (x, *parameters))
    assert torch.equal(y, x)
    assert torch.equal(logdet, torch.zeros(2))
    assert torch.equal(gradients[0], torch.ones(2, 6))
    for gradient in gradients[1:]:
        assert not gradient.any()


@on_every_backend
@both_ways
@pytest.mark.parametrize("tails", ["linear", None])
def test_a_nan_stays_where_it_is(tails, inverse, backend):
    x, *parameters = spline_operands((3, 5), 4, tails, BOUND)
    with use_backend(backend):
        clean, clean_logdet = rational_quadratic_spline(x, *parameters, tails=tails, inverse=inverse)
        x[1, 2] = math.nan
        y, logdet = rational_quadratic_spline(x, *parameters, tails=tails, inverse=inverse)
    assert y.isnan().nonzero().tolist() == [[1, 2]]
    assert logdet.isnan().tolist() == [False, True, False]
    assert torch.equal(y[x == x], clean[x == x])
    assert torch.equal(logdet[[0, 2]], clean_logdet[[0, 2]])


@on_every_backend
@both_ways
def test_a_nan_in_the_parameters_is_not_hidden(inverse, backend):
    x, *parameters = spline_operands((4, 3), 5, "linear", BOUND)
    x = x.clamp(-2.9, 2.9)
    for index in range(3):
        spoiled = [p.clone() for p in parameters]
        spoiled[index][1, 1] = math.nan
        with use_backend(backend):
            y, logdet = rational_quadratic_spline(x, *spoiled, inverse=inverse)
        assert y.isnan().nonzero().tolist() == [[1, 1]]
        assert logdet.isnan().tolist() == [False, True, False, False]


@on_every_backend
@both_ways
def test_outside_of_a_domain_without_tails(inverse, backend):
    _, *parameters = spline_operands((1, 3), 5, None, 2.0)
    for dtype in DTYPES:
        for value in (2.25, -2.25, torch.inf):
            x = torch.tensor([[0.0, value, 1.0]], dtype=dtype)
            with use_backend(backend), pytest.raises(ValueError, match=r"^x must be in \[-2, 2\]"):
                rational_quadratic_spline(x, *parameters, bound=2.0, tails=None, inverse=inverse)
        ends = torch.tensor([[-2.0, 2.0, 0.0]], dtype=dtype)
        with use_backend(backend):
            y, logdet = rational_quadratic_spline(ends, *parameters, bound=2.0, tails=None, inverse=inverse)
        torch.testing.assert_close(y[0, :2], torch.tensor([-2.0, 2.0]), rtol=0, atol=1e-6)
        assert logdet.isfinite().all()


@on_every_backend
@both_ways
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_domain_without_tails_is_never_left(dtype, inverse, backend):
    """A result one unit beyond the bound would be refused by the next layer, or by the inverse of this one."""
    for bound in (1.0, 3.0, 4.7):
        _, *parameters = (p.to(dtype) for p in spline_operands((500, 4), 7, None, bound))
        end = torch.tensor(bound).to(dtype)
        end = end if float(end) <= bound else torch.nextafter(end, torch.zeros_like(end))
        near = torch.nextafter(end, torch.zeros_like(end))
        x = torch.stack([-end, -near, near, end]).repeat(500, 1)
        with use_backend(backend):
            y, _ = rational_quadratic_spline(x, *parameters, bound=bound, tails=None, inverse=inverse)
            back, _ = rational_quadratic_spline(y, *parameters, bound=bound, tails=None, inverse=not inverse)
        assert y.abs().max() <= end and back.abs().max() <= end


@on_every_backend
@both_ways
def test_the_gradient_at_the_ends(inverse, backend):
    """The end of the domain belongs to it: slope and parameters' gradients are those of the last bin, not 0."""
    _, *parameters = spline_operands((100, 2), 8, None, BOUND)
    ends = torch.tensor([-BOUND, BOUND]).repeat(100, 1)

    def grads(function: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [p.to(dtype).requires_grad_() for p in (ends, *parameters)]
        y, logdet = function(*leaves, tails=None, inverse=inverse)
        return torch.autograd.grad(y.sum() + logdet.sum(), leaves)

    with use_backend(backend):
        actual = grads(rational_quadratic_spline, torch.float32)
    for a, e in zip(actual, grads(eager_spline, torch.float64), strict=True):
        size = max(1.0, float(e.abs().max()))
        torch.testing.assert_close(a.double(), e, rtol=5e-3, atol=1e-3 * size)


@on_every_backend
@both_ways
def test_raw_parameters_of_any_size(inverse, backend):
    """softmax and softplus neither overflow nor lose a shift common to all bins."""
    x, w, h, d = spline_operands((20, 6), 8, "linear", BOUND)
    with use_backend(backend):
        expected = rational_quadratic_spline(x, w, h, d, inverse=inverse)
        shifted = rational_quadratic_spline(x, w + 64, h - 64, d, inverse=inverse)
        torch.testing.assert_close(shifted, expected, rtol=1e-3, atol=1e-3)
        for size in (1e4, 1e30):
            for output in rational_quadratic_spline(x, size * w, -size * h, d, inverse=inverse):
                assert output.isfinite().all()
        y, _ = rational_quadratic_spline(x, w, h, torch.full_like(d, -1e4), inverse=inverse)
        again, _ = rational_quadratic_spline(x, w, h, torch.full_like(d, -50.0), inverse=inverse)
        torch.testing.assert_close(y, again, rtol=1e-5, atol=1e-5)
        big = torch.full_like(d, 90.0)
        exact, _ = eager_spline(*(p.double() for p in (x, w, h, big)))
        y, _ = rational_quadratic_spline(x, w, h, big)
        torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)


@on_every_backend
@pytest.mark.parametrize("bins", [2, 3, 7, 16, 33, 64])
def test_any_number_of_bins(bins, backend):
    operands = spline_operands((30, 3), bins, "linear", BOUND)
    with use_backend(backend):
        for inverse in (False, True):
            actual = rational_quadratic_spline(*operands, inverse=inverse)
            exact = eager_spline(*(p.double() for p in operands), inverse=inverse)
            torch.testing.assert_close([a.double() for a in actual], list(exact), rtol=1e-3, atol=1e-3)


@on_every_backend
@both_ways
def test_an_equal_spline_is_the_identity(inverse, backend):
    x = torch.linspace(-3, 3, 101)[None]
    ones = math.log(math.expm1(1 - 1e-3))
    with use_backend(backend):
        y, logdet = rational_quadratic_spline(
            x, torch.zeros(1, 101, 4), torch.zeros(1, 101, 4), torch.full((1, 101, 3), ones), inverse=inverse
        )
    torch.testing.assert_close(y, x, rtol=0, atol=2e-6)
    torch.testing.assert_close(logdet, torch.zeros(1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", NATIVE)
def test_float64_takes_the_reference_and_says_so(backend, caplog):
    x = torch.randn(2, 4, dtype=torch.float64)
    registry._log_once.cache_clear()  # another test may have had it logged
    with caplog.at_level(logging.INFO, logger="dgm_kernels"):
        affine_coupling(x, x, x)
    assert "float64" in caplog.text
    with use_backend(backend), pytest.raises(ValueError, match="float64"):
        affine_coupling(x, x, x)


@on_every_backend
def test_several_log_determinants_are_added(backend):
    z, parts = torch.randn(3, 4), [torch.randn(3) for _ in range(4)]
    with use_backend(backend):
        for function in (standard_normal_log_prob, logistic_log_prob):
            for given in (parts, tuple(parts)):
                torch.testing.assert_close(function(z, given), function(z) + sum(parts))
            assert torch.equal(function(z, []), function(z))


def bad_calls() -> dict[str, tuple[Any, type[Exception], str]]:
    x, w, d, meta = torch.randn(2, 4), torch.randn(2, 4, 5), torch.randn(2, 4, 4), torch.empty(2, 4, device="meta")
    image, c = torch.randn(2, 3, 4, 4), torch.randn(4)
    affine = lambda *a, **k: lambda: affine_coupling(*a, **k)  # noqa: E731
    add = lambda *a, **k: lambda: additive_coupling(*a, **k)  # noqa: E731
    spline = lambda *a, **k: lambda: rational_quadratic_spline(*a, **k)  # noqa: E731
    norm = lambda *a, **k: lambda: actnorm(*a, **k)  # noqa: E731
    return {
        "x no tensor": (affine([1.0], x, x), TypeError, "^x must be a tensor"),
        "x int": (affine(x.long(), x, x), TypeError, "^x must be a floating-point"),
        "x bool": (affine(x > 0, x, x), TypeError, "^x must be a floating-point"),
        "x complex": (affine(x.to(torch.complex64), x, x), TypeError, "^x must be a floating-point"),
        "x scalar": (affine(x[0, 0], x[0, 0], x[0, 0]), ValueError, "^x must have a batch"),
        "shift no tensor": (affine(x, 1.0, x), TypeError, "^shift must be a tensor, got float"),
        "shift None": (add(x, None), TypeError, "^shift must be a tensor, got NoneType"),
        "shift int": (affine(x, x.int(), x), TypeError, "^shift must be a floating-point .* got torch.int32"),
        "shift shape": (affine(x, x[:1], x), ValueError, r"^shift must have the shape of x, \(2, 4\), got \(1, 4\)"),
        "shift device": (affine(x, meta, x), ValueError, "^shift must be on the device of x, cpu, got meta"),
        "log_scale None": (affine(x, x, None), TypeError, "^log_scale must be a tensor, got NoneType"),
        "log_scale bool": (affine(x, x, x > 0), TypeError, "^log_scale must be a floating-point"),
        "log_scale shape": (affine(x, x, x[:, :2]), ValueError, r"^log_scale must have the shape .*got \(2, 2\)"),
        "log_scale device": (affine(x, x, meta), ValueError, "^log_scale must be on the device of x"),
        "halves whole": (affine(x, x, x, mask="channels"), ValueError, r"^shift must have the shape .*\(2, 2\), got"),
        "half log_scale": (affine(x, x[:, :2], x, mask="channels"), ValueError, "^log_scale must have the shape"),
        "odd split": (affine(image, image, image, mask="channels"), ValueError, "even, got 3"),
        "odd split flipped": (add(image, image, mask="channels_flipped"), ValueError, "even, got 3"),
        "split of a row": (add(c, c, mask="channels"), ValueError, r"x of shape \[batch, channels, ...\], got \(4,\)"),
        "board of a row": (add(c, c, mask="checkerboard"), ValueError, r"x of shape \[batch, channels, ...\]"),
        "mask name": (affine(x, x, x, mask="chequers"), ValueError, "^mask must be .*got 'chequers'"),
        "mask float": (affine(x, x, x, mask=torch.ones(4)), TypeError, "^mask must be a bool .*got torch.float32"),
        "mask uint8": (affine(x, x, x, mask=torch.ones(4).byte()), TypeError, "^mask must be a bool tensor"),
        "mask list": (affine(x, x, x, mask=[True] * 4), TypeError, "^mask must be .*got list"),
        "mask bool": (affine(x, x, x, mask=True), TypeError, "^mask must be .*got bool"),
        "mask shape": (affine(x, x, x, mask=torch.ones(3).bool()), ValueError, r"^mask must broadcast .*\(3,\)"),
        "mask larger": (add(x, x, mask=torch.ones(3, 2, 4).bool()), ValueError, "^mask must broadcast"),
        "mask device": (affine(x, x, x, mask=meta > 0), ValueError, "^mask must be on the device of x"),
        "scale_map": (affine(x, x, x, scale_map="softplus"), ValueError, "^scale_map must be one of .*'softplus'"),
        "scale_map None": (affine(x, x, x, scale_map=None), ValueError, "^scale_map must be one of .*None"),
        "actnorm row": (norm(c, c, c), ValueError, r"^x must have shape \[batch, channels, ...\]"),
        "actnorm shift": (norm(x, c[:3], c), ValueError, r"^shift must have the shape .*\(4,\), got \(3,\)"),
        "actnorm log_scale": (norm(x, c, x), ValueError, r"^log_scale must have the shape .*got \(2, 4\)"),
        "actnorm int": (norm(x, c.long(), c), TypeError, "^shift must be a floating-point"),
        "spline x": (spline(x.long(), w, w, d), TypeError, "^x must be a floating-point"),
        "widths None": (spline(x, None, w, d), TypeError, "^widths must be a tensor"),
        "widths shape": (spline(x, w[:1], w, d), ValueError, "^widths must have the shape"),
        "widths dims": (spline(x, x, x, x), ValueError, "^widths must have the shape"),
        "widths dtype": (spline(x, w.int(), w, d), TypeError, "^widths must be a floating-point"),
        "widths device": (spline(x, w.to("meta"), w, d), ValueError, "^widths must be on the device"),
        "heights shape": (spline(x, w, w[..., :4], d), ValueError, r"^heights must have the shape .*got \(2, 4, 4\)"),
        "heights None": (spline(x, w, None, d), TypeError, "^heights must be a tensor"),
        "derivatives": (spline(x, w, w, w), ValueError, r"^derivatives must have .*\(2, 4, 4\), got \(2, 4, 5\)"),
        "derivatives, no tails": (spline(x / 9, w, w, d, tails=None), ValueError, r"^derivatives must .*\(2, 4, 6\)"),
        "one bin": (spline(x, w[..., :1], w[..., :1], d[..., :0]), ValueError, "^widths must hold at least 2 bins"),
        "no bin": (spline(x, w[..., :0], w[..., :0], d), ValueError, "^widths must hold at least 2 bins"),
        "bound 0": (spline(x, w, w, d, bound=0.0), ValueError, "^bound must be a positive .*got 0.0"),
        "bound negative": (spline(x, w, w, d, bound=-3), ValueError, "^bound must be a positive .*got -3"),
        "bound inf": (spline(x, w, w, d, bound=math.inf), ValueError, "^bound must be .*got inf"),
        "bound NaN": (spline(x, w, w, d, bound=math.nan), ValueError, "^bound must be .*got nan"),
        "bound text": (spline(x, w, w, d, bound="3"), (ValueError, TypeError), "^bound must be .*got '?(3|str)"),
        "tails": (spline(x, w, w, d, tails="circular"), ValueError, "^tails must be 'linear' or None, got 'circular'"),
        "min_bin_width": (spline(x, w, w, d, min_bin_width=0.2), ValueError, "^min_bin_width must .*5 bins.*got 0.2"),
        "min_bin_height": (spline(x, w, w, d, min_bin_height=0.3), ValueError, "^min_bin_height must .*got 0.3"),
        "width negative": (spline(x, w, w, d, min_bin_width=-0.1), ValueError, "^min_bin_width must .*got -0.1"),
        "width text": (spline(x, w, w, d, min_bin_width="a"), (ValueError, TypeError), "^min_bin_width must"),
        "min_derivative": (spline(x, w, w, d, min_derivative=-1.0), ValueError, "^min_derivative must .*got -1"),
        "derivative NaN": (spline(x, w, w, d, min_derivative=math.nan), ValueError, "^min_derivative must .*got nan"),
        "derivative text": (spline(x, w, w, d, min_derivative=None), (ValueError, TypeError), "^min_derivative must"),
        "z int": (lambda: standard_normal_log_prob(x.long()), TypeError, "^z must be a floating-point"),
        "z None": (lambda: logistic_log_prob(None), TypeError, "^z must be a tensor"),
        "logdet shape": (lambda: logistic_log_prob(x, c), ValueError, r"^logdet must have .*\(2,\), got \(4,\)"),
        "logdet int": (lambda: logistic_log_prob(x, c[:2].long()), TypeError, "^logdet must be a floating-point"),
        "logdet float": (lambda: logistic_log_prob(x, [1.0]), TypeError, "^logdet must be .*got float"),
        "logdet number": (lambda: logistic_log_prob(x, 1.0), TypeError, "^logdet must be .*got float"),
        "logdet device": (lambda: logistic_log_prob(x, meta[:, 0]), ValueError, "^logdet must be on the device of z"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_input(name):
    call, error, message = bad_calls()[name]
    for backend in BACKENDS:
        with use_backend(backend), pytest.raises(error, match=message):
            call()


@both_ways
@pytest.mark.parametrize("case", [c for c in SPLINE_CASES if c.options.get("tails", "linear") is None], ids=str)
def test_compiled_and_transformed_splines_answer_nan_outside(case, inverse):
    """Where values cannot be looked at, there is no error."""
    x, *parameters = case.make((2, 3))
    x[0, 1] = 7.0
    y, _ = torch.func.vmap(lambda *a: case.call(*a, inverse=inverse))(x[:, None], *(p[:, None] for p in parameters))
    assert y[:, 0].isnan().nonzero().tolist() == [[0, 1]]
