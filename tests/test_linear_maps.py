"""triangular_linear, invertible_conv1x1, householder and permute_channels: values, inverses, log-determinants."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from dgm_kernels import householder, invertible_conv1x1, permute_channels, triangular_linear
from tests.contract import (
    assert_autocast_like,
    assert_bitwise_repeatable,
    assert_compiles,
    assert_inputs_unchanged,
    assert_vmap,
    strided_variants,
)

FLAT = ((3, 5), (1, 1), (4, 13))
SHAPES = (*FLAT, (2, 5, 7), (2, 6, 3, 4), (2, 3, 2, 2, 3))
EMPTY = ((0, 4), (2, 4, 0, 3), (0, 4, 3, 3))


@dataclasses.dataclass(frozen=True)
class Map:
    """A map with random parameters: ``call(x, *parameters, inverse=...)``, and its matrix for every pixel."""

    name: str
    call: Callable[..., tuple[Tensor, Tensor]]
    parameters: Callable[[int], list[Tensor]]  # of the channels, in float64
    matrix: Callable[..., Tensor]
    slope: float = 1.0
    flat: bool = False  # takes [B, D] only

    def __str__(self) -> str:
        return self.name

    def operands(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, grad: bool = False) -> list[Tensor]:
        """x and the parameters."""
        made = [torch.randn(shape, dtype=torch.float64), *self.parameters(shape[1])]
        return [t.to(dtype).requires_grad_(grad) if t.is_floating_point() else t for t in made]

    def dense(self, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """The map as the product with its matrix, and its log-determinant by slogdet."""
        matrix = self.matrix(*parameters)
        y = torch.einsum("ij,bj...->bi...", matrix, x)
        if self.name.startswith("triangular"):
            y = y if len(parameters) == 1 else y + parameters[1]
        logdet = torch.linalg.slogdet(matrix).logabsdet * math.prod(x.shape[2:])
        return F.leaky_relu(y, self.slope), logdet + (y < 0).flatten(1).sum(1) * torch.tensor(self.slope).double().log()


def _triangle(lower: bool, bias: bool) -> Callable[[int], list[Tensor]]:
    def parameters(channels: int) -> list[Tensor]:
        diagonal = (torch.rand(channels).double() + 0.5) * (1 - 2 * (torch.arange(channels) % 2))
        weight = 0.3 * torch.randn(channels, channels).double()
        weight = (weight.tril(-1) if lower else weight.triu(1)) + torch.diag(diagonal)
        return [weight, torch.randn(channels).double()] if bias else [weight]

    return parameters


def _lu(channels: int) -> list[Tensor]:
    matrices = [0.3 * torch.randn(channels, channels).double() for _ in range(2)]
    sign = 1.0 - 2 * (torch.arange(channels) % 2)
    return [*matrices, 0.3 * torch.randn(channels).double(), sign.double(), torch.randperm(channels)]


def _lu_matrix(lower: Tensor, upper: Tensor, log_abs_diagonal: Tensor, sign: Tensor, permutation: Tensor) -> Tensor:
    eye = torch.eye(len(sign), dtype=lower.dtype)
    p = F.one_hot(permutation, len(sign)).to(lower.dtype)
    return p @ (lower.tril(-1) + eye) @ (upper.triu(1) + torch.diag(sign * log_abs_diagonal.exp()))


def _reflections(vectors: Tensor) -> Tensor:
    matrix = torch.eye(vectors.shape[1], dtype=vectors.dtype)
    for v in vectors:
        matrix = (torch.eye(len(v), dtype=v.dtype) - 2 * torch.outer(v, v) / (v @ v)) @ matrix
    return matrix


def _triangular(name: str, lower: bool, slope: float, bias: bool = True) -> Map:
    def call(x: Tensor, *parameters: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        return triangular_linear(x, *parameters, lower=lower, negative_slope=slope, inverse=inverse)

    def matrix(weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return weight.tril() if lower else weight.triu()

    return Map(f"triangular {name}", call, _triangle(lower, bias), matrix, slope, flat=True)


MAPS = (
    _triangular("lower", True, 1.0),
    _triangular("upper leaky", False, 0.2),
    _triangular("lower steep", True, 3.0, bias=False),
    Map("conv1x1", invertible_conv1x1, _lu, _lu_matrix),
    Map("householder", householder, lambda c: [torch.randn(3, c).double()], _reflections),
    Map("permutation", permute_channels, lambda c: [torch.randperm(c)], lambda p: F.one_hot(p, len(p)).double()),
)
every_map = pytest.mark.parametrize("linear", MAPS, ids=str)
both_directions = pytest.mark.parametrize("inverse", [False, True])


@every_map
def test_values_of_the_dense_matrix(linear):
    for shape in FLAT if linear.flat else SHAPES:
        operands = linear.operands(shape)
        torch.testing.assert_close(linear.call(*operands), linear.dense(*operands))


@both_directions
@every_map
def test_logdet_is_that_of_the_jacobian(linear, inverse):
    for shape in [(3, 5)] if linear.flat else [(3, 5), (2, 3, 4), (2, 4, 2, 3)]:
        x, *parameters = linear.operands(shape)

        def one(x: Tensor, parameters: Any = parameters, shape: Any = shape) -> Tensor:
            return linear.call(x.view(1, *shape[1:]), *parameters, inverse=inverse)[0].flatten()

        jacobians = torch.stack([torch.autograd.functional.jacobian(one, sample.flatten()) for sample in x])
        _, logdet = linear.call(x, *parameters, inverse=inverse)
        torch.testing.assert_close(logdet, torch.linalg.slogdet(jacobians).logabsdet, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@every_map
def test_inverse_undoes_forward(linear, dtype, tolerance):
    for shape in FLAT if linear.flat else SHAPES:
        x, *parameters = linear.operands(shape, dtype)
        y, logdet = linear.call(x, *parameters)
        back, minus_logdet = linear.call(y, *parameters, inverse=True)
        torch.testing.assert_close(back, x, rtol=0, atol=tolerance * max(1.0, float(x.abs().max())))
        torch.testing.assert_close(minus_logdet, -logdet)
        again, _ = linear.call(back, *parameters)
        torch.testing.assert_close(again, y, rtol=0, atol=2 * tolerance * max(1.0, float(y.abs().max())))


@both_directions
@every_map
def test_gradients(linear, inverse):
    operands = linear.operands((2, 3) if linear.flat else (2, 3, 2), grad=True)

    if linear.name == "conv1x1":
        operands[4].requires_grad_(False)  # the signs

    def call(*operands: Tensor) -> tuple[Tensor, ...]:
        outputs = linear.call(*operands, inverse=inverse)
        return outputs[:1] if linear in MAPS[-2:] else outputs  # their logdet is 0

    assert gradcheck(call, operands, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(call, operands, check_fwd_over_rev=True)


@both_directions
@every_map
def test_sixteen_bits_and_float32(linear, inverse):
    """y in the dtype of x and within a few roundings of float64; logdet in float32 and as good as that."""
    for shape in [(4, 13)] if linear.flat else [(4, 13), (2, 6, 3, 4)]:
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.04), (torch.float16, 0.005)):
            operands = linear.operands(shape, dtype)
            y, logdet = linear.call(*operands, inverse=inverse)
            wide = [t.double() if t.is_floating_point() else t for t in operands]
            exact, exact_logdet = linear.call(*wide, inverse=inverse)
            assert y.dtype == dtype and logdet.dtype == torch.float32
            torch.testing.assert_close(y.double(), exact, rtol=0, atol=tolerance * float(exact.abs().max()))
            if linear.slope == 1:
                torch.testing.assert_close(logdet.double(), exact_logdet, rtol=1e-5, atol=1e-5)


@both_directions
@pytest.mark.parametrize("linear", MAPS[:-1], ids=str)
def test_dtypes_are_promoted(linear, inverse):
    for x_dtype, dtype in (
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float32),
        (torch.float16, torch.float64),
    ):
        x, *parameters = linear.operands((3, 4))
        given = [x.to(x_dtype), *(t.to(dtype) if t.is_floating_point() else t for t in parameters)]
        y, logdet = linear.call(*given, inverse=inverse)
        wide = [t.double() if t.is_floating_point() else t for t in given]
        exact = linear.call(*wide, inverse=inverse)
        assert y.dtype == logdet.dtype == torch.promote_types(x_dtype, dtype)
        tolerance = 1e-12 if y.dtype == torch.float64 else 1e-5
        torch.testing.assert_close((y.double(), logdet.double()), exact, rtol=tolerance, atol=tolerance)


@both_directions
@every_map
def test_empty(linear, inverse):
    for shape in EMPTY[:1] if linear.flat else EMPTY:
        operands = linear.operands(shape, grad=True)
        y, logdet = linear.call(*operands, inverse=inverse)
        assert y.shape == shape and logdet.shape == shape[:1]
        if y.requires_grad:
            (y.sum() + logdet.sum()).backward()
            assert operands[0].grad.shape == shape


@both_directions
@every_map
def test_layouts_repeatability_and_untouched_inputs(linear, inverse):
    for shape in [(3, 5)] if linear.flat else [(3, 5), (2, 4, 3, 5)]:
        operands = linear.operands(shape)
        expected = linear.call(*operands, inverse=inverse)
        for place, operand in enumerate(operands):
            for variant in strided_variants(operand):
                given = [*operands[:place], variant, *operands[place + 1 :]]
                with assert_inputs_unchanged(*given):
                    torch.testing.assert_close(linear.call(*given, inverse=inverse), expected)
        assert_bitwise_repeatable(lambda operands=operands: linear.call(*operands, inverse=inverse))


@pytest.mark.parametrize(
    ("linear", "inverse"),
    [(MAPS[1], False), (MAPS[1], True), (MAPS[3], True), (MAPS[4], False), (MAPS[5], True)],
    ids=str,
)
def test_compile(linear, inverse):
    x, *parameters = linear.operands((4, 6) if linear.flat else (4, 6, 3, 5), torch.float32, grad=True)
    larger = torch.randn(7, *x.shape[1:], requires_grad=True)

    def call(*operands: Tensor) -> tuple[Tensor, Tensor]:
        return linear.call(*operands, inverse=inverse)

    assert_compiles(call, (x, *parameters), (larger, *parameters), backend="aot_eager")


@both_directions
@every_map
def test_vmap(linear, inverse):
    stacks = [torch.stack(ts) for ts in zip(*(linear.operands((4, 6)) for _ in range(3)), strict=True)]

    def call(*operands: Tensor) -> tuple[Tensor, Tensor]:
        return linear.call(*operands, inverse=inverse)

    assert_vmap(call, stacks)
    assert_vmap(call, [stacks[0], *(stack[0] for stack in stacks[1:])], (0, *[None] * (len(stacks) - 1)))


@every_map
def test_autocast(linear):
    def eager(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        y, logdet = linear.call(x, *parameters)
        if linear.name == "permutation":
            return y, logdet
        matrix = linear.matrix(*(t.double() if t.is_floating_point() else t for t in parameters)).float()
        bias = parameters[1] if linear.name.startswith("triangular") and len(parameters) > 1 else None
        return F.leaky_relu(F.linear(x, matrix, bias), linear.slope), logdet

    operands = linear.operands((8, 6), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        _, expected = linear.call(*operands)
    assert_autocast_like(eager, linear.call, operands)
    if linear.slope == 1:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(linear.call(*operands)[1], expected)


def test_what_is_not_read_does_not_count():
    x, weight, bias = MAPS[0].operands((4, 5), grad=True)
    poison = torch.full((5, 5), math.nan, dtype=torch.float64)
    for lower, read in ((True, torch.ones(5, 5).tril().bool()), (False, torch.ones(5, 5).triu().bool())):
        poisoned = torch.where(read, weight.detach(), poison).requires_grad_()
        for inverse in (False, True):
            clean = torch.where(read, weight.detach(), 0.0)
            y, logdet = triangular_linear(x, poisoned, bias, lower=lower, inverse=inverse)
            torch.testing.assert_close((y, logdet), triangular_linear(x, clean, bias, lower=lower, inverse=inverse))
            (grad,) = torch.autograd.grad(y.sum() + logdet.sum(), poisoned)
            assert not grad[~read].any() and grad[read].isfinite().all()

    _, lower, upper, *others = MAPS[3].operands((4, 5))
    others[0].requires_grad_()
    strict = torch.ones(5, 5).tril(-1).bool()
    leaves = [
        torch.where(strict, lower, poison).requires_grad_(),
        torch.where(strict.T, upper, poison).requires_grad_(),
    ]
    for inverse in (False, True):
        outputs = invertible_conv1x1(x.detach(), *leaves, *others, inverse=inverse)
        torch.testing.assert_close(outputs, invertible_conv1x1(x.detach(), lower, upper, *others, inverse=inverse))
        grads = torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), leaves)
        assert not grads[0][~strict].any() and not grads[1][~strict.T].any()
        assert all(grad.isfinite().all() for grad in grads)


def test_values_of_nflows():
    nflows = pytest.importorskip("nflows.transforms")
    x = torch.randn(4, 6, dtype=torch.float64)

    peer = nflows.LULinear(6, using_cache=False, identity_init=False).double()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_()
    lower, upper = peer._create_lower_upper()
    sign = torch.ones(6, dtype=torch.float64)
    parameters = lower, upper, upper.diagonal().log(), sign, torch.arange(6)
    y, logdet = invertible_conv1x1(x, *parameters)
    torch.testing.assert_close((y + peer.bias, logdet), peer(x))
    torch.testing.assert_close(invertible_conv1x1(x - peer.bias, *parameters, inverse=True), peer.inverse(x))
    h, first = triangular_linear(x, upper, lower=False)
    y, second = triangular_linear(h, lower, peer.bias)
    torch.testing.assert_close((y, first + second), peer(x))

    peer = nflows.HouseholderSequence(6, 4).double()
    with torch.no_grad():
        peer.q_vectors.normal_()
    torch.testing.assert_close(householder(x, peer.q_vectors), peer(x))
    torch.testing.assert_close(householder(x, peer.q_vectors, inverse=True), peer.inverse(x))

    order = torch.randperm(6)
    peer = nflows.Permutation(order)
    torch.testing.assert_close(permute_channels(x, order), peer(x), check_dtype=False)
    torch.testing.assert_close(permute_channels(x, order, inverse=True), peer.inverse(x), check_dtype=False)


def test_values_of_normflows():
    normflows = pytest.importorskip("normflows")
    peer = normflows.flows.Invertible1x1Conv(6, use_lu=True).double()
    parameters = peer.L, peer.U, peer.log_S, peer.sign_S, peer.P.argmax(1)
    assert not torch.equal(parameters[-1], parameters[-1].argsort()), "an involution would hide a wrong inverse"
    x = torch.randn(4, 6, 3, 5, dtype=torch.float64)
    for inverse, method in ((False, peer.inverse), (True, peer.forward)):  # its forward leads to the data
        y, logdet = invertible_conv1x1(x, *parameters, inverse=inverse)
        torch.testing.assert_close(y, method(x)[0])
        torch.testing.assert_close(logdet, method(x)[1].expand(4))


def test_no_reflections():
    x = torch.randn(3, 4)
    y, logdet = householder(x, torch.empty(0, 4))
    assert torch.equal(y, x) and not logdet.any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.randn(2, 4, 3)}, ValueError, r"x must have shape \[batch, features\], got \(2, 4, 3\)"),
        ({"x": torch.zeros(2, 4).int()}, TypeError, "x must be a floating-point tensor"),
        ({"weight": torch.eye(5)}, ValueError, r"weight must have shape \(4, 4\), .*got \(5, 5\)"),
        ({"weight": torch.eye(4).long()}, TypeError, "weight must be a floating-point tensor"),
        ({"weight": torch.eye(4, device="meta")}, ValueError, "weight must be on the device of x, cpu, got meta"),
        ({"weight": torch.diag(torch.tensor([1.0, 2, 0, 3]))}, ValueError, "non-zero diagonal, got 0.0 at 2"),
        ({"weight": torch.diag(torch.tensor([1.0, math.nan, 0, 3]))}, ValueError, "finite.* diagonal, got nan at 1"),
        ({"weight": torch.diag(torch.tensor([1.0, 2, 3, math.inf]))}, ValueError, "finite.* diagonal, got inf at 3"),
        ({"bias": torch.zeros(4, 1)}, ValueError, r"bias must have shape \(4,\), .*got \(4, 1\)"),
        ({"bias": 0.0}, TypeError, "bias must be a tensor, got float"),
        ({"negative_slope": 0.0}, ValueError, "negative_slope must be positive .*not injective.*got 0.0"),
        ({"negative_slope": -0.1}, ValueError, "negative_slope must be positive"),
        ({"negative_slope": math.nan}, ValueError, "negative_slope must be positive.*got nan"),
        ({"negative_slope": math.inf}, ValueError, "negative_slope must be positive.*got inf"),
        ({"negative_slope": "0.1"}, TypeError, "negative_slope must be a number, got str"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
@both_directions
def test_bad_triangular_linear(change, error, message, inverse):
    arguments = {"x": torch.randn(2, 4), "weight": torch.eye(4), "bias": torch.zeros(4)} | change
    with pytest.raises(error, match=message):
        triangular_linear(**arguments, inverse=inverse)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(4)}, ValueError, r"x must have shape \[batch, channels, ...\], got \(4,\)"),
        ({"lower": torch.eye(3)}, ValueError, r"lower must have shape \(4, 4\), .*got \(3, 3\)"),
        ({"upper": None}, TypeError, "upper must be a tensor, got NoneType"),
        ({"log_abs_diagonal": torch.zeros(3)}, ValueError, r"log_abs_diagonal must have the shape of .*got \(3,\)"),
        ({"log_abs_diagonal": torch.tensor([0, 0, -math.inf, 0])}, ValueError, "log_abs_diagonal must be finite"),
        ({"sign": torch.tensor([1.0, -1, 0, 1])}, ValueError, "sign must hold 1 and -1 only"),
        ({"permutation": torch.tensor([0, 1, 1, 3])}, ValueError, "permutation must hold each of 0 .. 3 once"),
        ({"permutation": torch.tensor([0, 1, 2, 4])}, ValueError, "permutation must hold each of 0 .. 3 once"),
        ({"permutation": torch.arange(3)}, ValueError, "permutation must have the shape of the channels of x"),
        ({"permutation": torch.arange(4).int()}, TypeError, "permutation must be an int64 tensor, got torch.int32"),
        ({"permutation": [0, 1, 2, 3]}, TypeError, "permutation must be an int64 tensor, got list"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
@both_directions
def test_bad_invertible_conv1x1(change, error, message, inverse):
    names = ("lower", "upper", "log_abs_diagonal", "sign", "permutation")
    values = (torch.eye(4), torch.eye(4), torch.zeros(4), torch.ones(4), torch.arange(4))
    arguments = {"x": torch.randn(2, 4, 3, 3)} | dict(zip(names, values, strict=True)) | change
    with pytest.raises(error, match=message):
        invertible_conv1x1(**arguments, inverse=inverse)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: householder(x, torch.randn(2, 3)), ValueError, r"vectors must have shape \(2, 4\), .*got \(2, 3\)"),
        (lambda x: householder(x, torch.randn(4)), ValueError, r"vectors must have shape \(4, 4\), .*got \(4,\)"),
        (lambda x: householder(x, [1.0]), TypeError, r"vectors must be a tensor, got list"),
        (lambda x: householder(x, torch.zeros(1, 4)), ValueError, "vectors must .*not have length 0"),
        (lambda x: householder(x, torch.full((1, 4), math.inf)), ValueError, "vectors must be finite"),
        (lambda x: householder(x[0, :, 0], torch.randn(2, 4)), ValueError, r"x must have shape \[batch, channels"),
        (lambda x: permute_channels(x, torch.tensor([3, 2, 1, 1])), ValueError, "permutation must hold each of 0 .. 3"),
        (lambda x: permute_channels(x, torch.arange(4.0)), TypeError, "permutation must be an int64 tensor"),
        (lambda x: permute_channels(x[0, :, 0], torch.arange(4)), ValueError, r"x must have shape \[batch, channels"),
        (lambda x: permute_channels(x.long(), torch.arange(4)), TypeError, "x must be a floating-point tensor"),
    ],
)
def test_bad_mixes(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(2, 4, 3))
