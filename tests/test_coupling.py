"""Values of the coupling op: parity, log-determinants against the full Jacobian, inverses, deep stacks, dtypes."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dgm_kernels import (
    additive_coupling,
    affine_coupling,
    logistic_log_prob,
    rational_quadratic_spline,
    standard_normal_log_prob,
    use_backend,
)
from tests.cases import BACKENDS, DTYPES
from tests.contract import assert_parity
from tests.coupling_cases import (
    CASES,
    LOG_PROB_CASES,
    MAP_CASES,
    MASKS,
    SCALE_MAPS,
    SHAPES,
    SPLINE_CASES,
    CouplingCase,
    mask_of,
    moved_shape,
)

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def eager_rounded_once(case: CouplingCase, operands: list[Tensor]) -> Any:
    """Eager in float32, and only its result rounded to 16 bits: stricter than eager that works in 16 bits."""
    dtype = operands[0].dtype
    outputs = case.call_eager(*(operand.float() for operand in operands))
    return (outputs[0].to(dtype), outputs[1]) if isinstance(outputs, tuple) else outputs


@on_every_backend
@every_case
def test_parity(case, backend):
    for shape, dtype in itertools.product(filter(case.takes, SHAPES), DTYPES):
        operands = case.make(shape, dtype)
        exact = case.call_eager(*(operand.double() for operand in operands))
        with use_backend(backend):
            actual = case.call(*operands)
        size = max((float(e.abs().max()) for e in _tuple(exact) if e.numel()), default=1.0)
        steep = 5.0 if case in SPLINE_CASES else 1.0  # a spline's slopes multiply the rounding of its knots
        assert_parity(actual, eager_rounded_once(case, operands), exact, tiny=1e-6 * steep * max(1.0, size))


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


@every_case
def test_float64_reference_is_the_formula(case):
    for shape in filter(case.takes, ((3, 10), (2, 4, 3, 5))):
        operands = case.make(shape, torch.float64)
        actual = case.call(*operands)
        assert all(output.dtype == torch.float64 for output in _tuple(actual))
        torch.testing.assert_close(actual, case.call_eager(*operands), rtol=1e-10, atol=1e-10)


@on_every_backend
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_logdet_of_an_affine_layer_is_that_of_its_jacobian(mask, inverse, backend):
    for shape, scale_map in itertools.product(((3, 4), (2, 2, 3, 2)), SCALE_MAPS):
        x, shift, log_scale = (torch.randn(s) for s in (shape, moved_shape(mask, shape), moved_shape(mask, shape)))
        options = {"mask": mask_of(mask, shape), "scale_map": scale_map, "inverse": inverse}
        with use_backend(backend):
            check_logdet(lambda x, t, a, o=options: affine_coupling(x, t, a, **o), (x, shift, log_scale), backend)


@on_every_backend
@pytest.mark.parametrize("case", MAP_CASES, ids=str)
def test_logdet_is_that_of_the_jacobian(case, backend):
    with use_backend(backend):
        for shape in ((3, 4), (2, 2, 3, 2)):
            check_logdet(case.call, case.make(shape), backend)


def check_logdet(call: Any, operands: Any, backend: str) -> None:
    """In float64; a native backend in float32."""
    exact = backend == "reference"
    x, *parameters = (operand.to(torch.float64 if exact else torch.float32) for operand in operands)
    _, logdet = call(x, *parameters)
    jacobian = torch.autograd.functional.jacobian(lambda x: call(x, *parameters)[0], x)
    batch, elements = x.shape[0], x[0].numel()
    blocks = jacobian.reshape(batch, elements, batch, elements).transpose(1, 2)
    own = torch.stack([blocks[i, i] for i in range(batch)])
    others = blocks[~torch.eye(batch, dtype=torch.bool)]
    assert not others.any(), "a sample depends on another one"
    expected = torch.linalg.slogdet(own.double())[1]
    tolerance = 1e-9 if exact else 1e-5
    torch.testing.assert_close(logdet.double(), expected, rtol=tolerance, atol=tolerance)


@on_every_backend
@pytest.mark.parametrize("case", MAP_CASES, ids=str)
def test_inverse_undoes_forward(case, backend):
    dtype = torch.float64 if backend == "reference" else torch.float32
    tolerance = 1e-9 if dtype == torch.float64 else 2e-3 if case in SPLINE_CASES else 2e-4
    inverse = not case.options["inverse"]
    with use_backend(backend):
        for shape in filter(case.takes, SHAPES):
            x, *parameters = case.make(shape, dtype)
            y, logdet = case.call(x, *parameters)
            back, logdet_back = case.call(y, *parameters, inverse=inverse)
            torch.testing.assert_close(back, x, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(logdet_back, -logdet, rtol=tolerance, atol=tolerance)


LAYERS = 64


def network(layer: int, inputs: int, outputs: int) -> Callable[[Tensor], Tensor]:
    """A fixed random function with values in (-1, 1), another one for every layer."""
    generator = torch.Generator().manual_seed(layer)
    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    return lambda x: torch.tanh(x @ weight.to(x).T)


def check_stack(layer: Callable[[int, Tensor, bool], tuple[Tensor, Tensor]], x: Tensor) -> None:
    """64 layers forward and back give x to 1e-5, and log-determinants that cancel."""
    y, logdet, back, logdet_back = x, 0.0, x, 0.0
    for index in range(LAYERS):
        y, each = layer(index, y, False)
        logdet = logdet + each
    back = y
    for index in reversed(range(LAYERS)):
        back, each = layer(index, back, True)
        logdet_back = logdet_back + each
    assert float((y - x).abs().max()) > 0.3
    torch.testing.assert_close(back, x, rtol=0, atol=1e-5)
    torch.testing.assert_close(logdet_back, -logdet, rtol=0, atol=1e-4)


@on_every_backend
@pytest.mark.parametrize("scale_map", SCALE_MAPS)
def test_64_affine_layers_are_inverted_to_1e_5(scale_map, backend):
    centre = 3.0 if scale_map == "sigmoid" else 0.0  # where the scale is near 1

    def layer(index: int, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        mask = "channels_flipped" if index % 2 else "channels"
        shift, log_scale = network(index, 5, 10)(x[:, 5:] if index % 2 else x[:, :5]).chunk(2, 1)
        return affine_coupling(
            x, 0.2 * shift, centre + 0.2 * log_scale, mask=mask, scale_map=scale_map, inverse=inverse
        )

    with use_backend(backend):
        check_stack(layer, torch.randn(16, 10))


@on_every_backend
def test_64_spline_layers_are_inverted_to_1e_5(backend):
    bins = 8
    straight = math.log(math.expm1(1 - 1e-3))  # of slope 1

    def layer(index: int, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        first, second = x.chunk(2, 1)
        moved, fixed = (first, second) if index % 2 else (second, first)
        raw = 0.2 * network(index, 3, 3 * (3 * bins - 1))(fixed).unflatten(1, (3, -1))
        w, h, d = raw.split((bins, bins, bins - 1), -1)
        y, logdet = rational_quadratic_spline(moved, w, h, d + straight, bound=1.0, inverse=inverse)
        return torch.cat([y, second] if index % 2 else [first, y], 1), logdet

    with use_backend(backend):
        check_stack(layer, 0.5 * torch.randn(16, 6))


@on_every_backend
def test_an_additive_layer_keeps_the_volume(backend):
    x, shift = torch.randn(3, 8), torch.randn(3, 8)
    with use_backend(backend):
        y, logdet = additive_coupling(x, shift)
    assert torch.equal(y, x + shift)
    assert torch.equal(logdet, torch.zeros(3))


@on_every_backend
def test_what_passes_unchanged_keeps_its_bits(backend):
    """Not y = m x + ...: -0.0, infinity and subnormals come out as they went in."""
    special = torch.tensor([-0.0, torch.inf, -torch.inf, -1.0, 1e-42, 3.4e38])
    x = special.repeat(2, 1)
    keep = torch.ones(6, dtype=torch.bool)
    for dtype in DTYPES:
        with use_backend(backend):
            y, logdet = affine_coupling(x.to(dtype), *(torch.randn(2, 6, dtype=dtype) for _ in range(2)), mask=keep)
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(y.view(bits), x.to(dtype).view(bits))
        assert torch.equal(logdet, torch.zeros(2))


PROMOTIONS = [
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float16, torch.bfloat16, torch.float32),
    (torch.float64, torch.float32, torch.float64),
    (torch.float16, torch.float64, torch.float64),
]


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize(("x_dtype", "parameter_dtype", "expected"), PROMOTIONS)
@pytest.mark.parametrize("case", [c for c in MAP_CASES if c.options["inverse"]], ids=str)
def test_dtypes_are_promoted(case, x_dtype, parameter_dtype, expected, backend):
    if expected == torch.float64 and backend not in ("reference", "auto"):
        pytest.skip("native backends have no float64")
    x, *parameters = case.make((3, 12))
    operands = [x.to(x_dtype), *(p.to(parameter_dtype) for p in parameters)]
    exact = case.call_eager(*(operand.double() for operand in operands))
    with use_backend(backend):
        y, logdet = case.call(*operands)
    assert (y.dtype, logdet.dtype) == (expected, expected)
    torch.testing.assert_close((y.double(), logdet.double()), exact, rtol=1e-4, atol=1e-4)


def distribution(case: CouplingCase) -> torch.distributions.Distribution:
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    if case.name.startswith("normal"):
        return torch.distributions.Normal(zero, one)
    logit = torch.distributions.SigmoidTransform().inv
    return torch.distributions.TransformedDistribution(torch.distributions.Uniform(zero, one), [logit])


@on_every_backend
@pytest.mark.parametrize("case", LOG_PROB_CASES, ids=str)
def test_log_prob_is_that_of_torch_distributions(case, backend):
    dtype = torch.float64 if backend == "reference" else torch.float32
    z, *logdet = case.make((3, 4, 5), dtype)
    expected = distribution(case).log_prob(z.double()).sum((1, 2)) + (logdet[0].double() if logdet else 0)
    with use_backend(backend):
        actual = case.call(z, *logdet)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@on_every_backend
def test_log_prob_far_out(backend):
    """Where exp(z) overflows and exp(-z) underflows."""
    z = torch.tensor([[0.0, 200.0], [-200.0, 1e-30], [0.0, torch.inf], [torch.nan, 0.0]])
    with use_backend(backend):
        logistic, normal = logistic_log_prob(z), standard_normal_log_prob(z)
    at_0 = math.log(1 / 4)
    expected = torch.tensor([at_0 - 200, at_0 - 200, -torch.inf, torch.nan])
    torch.testing.assert_close(logistic, expected, equal_nan=True)
    expected = torch.tensor([-20000.0, -20000.0, -torch.inf, torch.nan]) - math.log(2 * math.pi)
    torch.testing.assert_close(normal, expected, equal_nan=True)


@on_every_backend
def test_log_prob_reads_only_what_it_is_given(backend):
    """A dtype of 16 bits gives a float32 sum; a mixed logdet is taken as it is."""
    z, logdet = torch.randn(4, 300).to(torch.bfloat16), torch.randn(4)
    with use_backend(backend):
        total = standard_normal_log_prob(z, logdet)
    assert total.dtype == torch.float32
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z.double()).sum(1) + logdet.double()
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-4)


@on_every_backend
@every_case
def test_no_elements(case, backend):
    for shape in ((0, 4), (3, 0), (2, 4, 0, 3)):
        operands = case.make(shape, grad=True)
        with use_backend(backend):
            outputs = _tuple(case.call(*operands))
        expected = _tuple(case.call_eager(*operands))
        tree_map(lambda a, e: torch.testing.assert_close(a, e), outputs, expected)
        sum(output.sum() for output in outputs).backward()
        for operand in operands:
            assert operand.grad is not None
            assert operand.grad.shape == operand.shape
