"""Values of the norm op: parity with eager, robust statistics, published values, what is refused."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dgm_kernels
from dgm_kernels import group_norm_silu, layer_norm, modulated_layer_norm, rms_norm, use_backend
from tests.cases import BACKENDS, DTYPES
from tests.contract import assert_parity, max_error
from tests.norm_cases import CASES, GROUP_CASES, MODULATED_CASES, NormCase, over_tokens

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def eager_rounded_once(case: NormCase, operands: list[Tensor]) -> tuple[Tensor, ...]:
    """Eager in float32, and only its result rounded to 16 bits: stricter than eager that works in 16 bits."""
    return tuple(out.to(operands[0].dtype) for out in _tuple(case.call_eager(*(t.float() for t in operands))))


@on_every_backend
@every_case
def test_parity(case, backend):
    for shape, dtype in itertools.product(case.shapes, DTYPES):
        operands = case.make(shape, dtype)
        exact = _tuple(case.call_eager(*(operand.double() for operand in operands)))
        with use_backend(backend):
            actual = _tuple(case.call(*operands))
        eager = eager_rounded_once(case, operands)
        if len(exact) == 2 and dtype != torch.float32:  # y is made of h as it is returned
            wide = [operand.double() for operand in operands]
            x, scale, shift, *more = wide
            affine = more[-2:] if case in MODULATED_CASES[4:] else (None, None)
            y = F.layer_norm(actual[1].double(), x.shape[-1:], *affine, 1e-6)
            exact = (y * (1 + over_tokens(scale, x.dim())) + over_tokens(shift, x.dim()), exact[1])
        size = max((float(e.abs().max()) for e in exact if e.numel()), default=1.0)
        assert_parity(actual, eager, exact, tiny=2e-6 * max(1.0, size))


@every_case
def test_float64_is_the_formula(case):
    for shape in filter(lambda s: 0 not in s, case.shapes):
        operands = case.make(shape, torch.float64)
        actual, expected = _tuple(case.call(*operands)), _tuple(case.call_eager(*operands))
        assert all(output.dtype == torch.float64 for output in actual)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@on_every_backend
def test_I1_layer_norm_of_two_numbers(backend):
    """The larger of two numbers comes out as 1, the other as -1."""
    with use_backend(backend):
        y = layer_norm(torch.tensor([[2.0, 1.0]]), (2,), eps=0.0)
    torch.testing.assert_close(y, torch.tensor([[1.0, -1.0]]))


@on_every_backend
def test_published_formulas_in_numpy(backend):
    x, w, b = np.float32([[1.0, -2.0, 3.0, 0.5]]), np.float32([1.0, 2.0, 0.5, -1.0]), np.float32([0.0, 1.0, 0.0, 2.0])
    with use_backend(backend):
        layer = layer_norm(torch.tensor(x), 4, torch.tensor(w), torch.tensor(b)).numpy()
        rms = rms_norm(torch.tensor(x), 4, torch.tensor(w), 1e-5).numpy()
        group = group_norm_silu(torch.tensor(x[:, :, None]), 1, torch.tensor(w), torch.tensor(b)).numpy()[:, :, 0]
    expected = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * w + b
    np.testing.assert_allclose(layer, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rms, x / np.sqrt((x**2).mean() + 1e-5) * w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(group, expected / (1 + np.exp(-expected)), rtol=1e-5, atol=1e-6)


@on_every_backend
@pytest.mark.parametrize("size", [16, 100, 4096, 5003])
def test_a_mean_far_from_zero_costs_no_digits(size, backend):
    """Numbers with mean 1e4 and deviation 1: the difference of the mean square and the squared mean has no digits."""
    x = torch.randn(6, size) + 1e4
    weight = torch.randn(size)
    exact = F.layer_norm(x.double(), (size,), weight.double())
    group = F.silu(F.group_norm(x.double().view(2, 3, size), 1))
    with use_backend(backend):
        error = max_error(layer_norm(x, (size,), weight), exact)
        assert error <= 2e-6 * float(exact.abs().max()), error
        assert max_error(group_norm_silu(x.view(2, 3, size), 1), group) <= 1e-5


@on_every_backend
def test_a_pivot_far_from_the_mean(backend):
    """Rows that begin with numbers unlike all others, and rows whose parts have means of their own."""
    rows = [torch.randn(1000), torch.randn(1000), torch.randn(1000), torch.randn(12000), torch.randn(12000)]
    rows[0][:16] += 1e4
    rows[1][:16] = 0.0
    rows[1] += 300.0
    rows[2] = torch.cat([torch.zeros(16), 1e3 + torch.randn(984)])
    rows[3][4096:] += 50.0
    rows[4][:8192] -= 1e3
    with use_backend(backend):
        for row in rows:
            exact = F.layer_norm(row[None].double(), row.shape)
            eager = F.layer_norm(row[None], row.shape)
            assert max_error(layer_norm(row[None], row.shape), exact) <= 2 * max_error(eager, exact) + 4e-6


@on_every_backend
@pytest.mark.parametrize("value", [0.0, -3.7, 1e30])
def test_no_variance(value, backend):
    """Constant rows, one element a row or group: the bias, with the gradient 0 for x."""
    with use_backend(backend):
        for shape in ((3, 1), (3, 50)):
            x = torch.full(shape, value, requires_grad=True)
            bias = torch.randn(shape[-1])
            y = layer_norm(x, shape[-1:], torch.ones(shape[-1]), bias)
            torch.testing.assert_close(y, bias.expand(shape), rtol=1e-5, atol=1e-5)
            (gradient,) = torch.autograd.grad(y.sum(), x)
            torch.testing.assert_close(gradient, torch.zeros(shape), rtol=0, atol=1e-3)
        x = torch.full((2, 3, 1), value)
        torch.testing.assert_close(group_norm_silu(x, 3), torch.zeros(2, 3, 1), rtol=0, atol=1e-6)


@on_every_backend
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_stay_in_their_row(bad, backend):
    x = torch.randn(4, 40)
    x[1, 17] = bad
    images = torch.randn(2, 4, 5, 5)
    images[1, 2, 3, 3] = bad
    with use_backend(backend):
        y, image = layer_norm(x, (40,)), group_norm_silu(images, 2)
    assert y[1].isnan().all()
    assert y[[0, 2, 3]].isfinite().all()
    assert image[1, 2:].isnan().all()
    assert image[0].isfinite().all()
    assert image[1, :2].isfinite().all()


@on_every_backend
def test_silu_far_from_zero(backend):
    """The shift moves SiLU's argument anywhere: no overflow, and the sizes of values and gradients are right."""
    for shift in (-1e4, -200.0, -90.0, -30.0, 30.0, 90.0, 200.0, 1e4):
        x = torch.randn(2, 4, 33, requires_grad=True)
        t = torch.full((2, 4), shift, requires_grad=True)
        wide = [v.detach().double().requires_grad_() for v in (x, t)]
        with use_backend(backend):
            y = group_norm_silu(x, 2, shift=t)
            grads = torch.autograd.grad(y.sum(), (x, t))
        exact = F.silu(F.group_norm(wide[0], 2) + wide[1][:, :, None])
        exact_grads = torch.autograd.grad(exact.sum(), wide)
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-9)
        for actual, expected in zip(grads, exact_grads, strict=True):
            size = max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=2e-5 * size)


@on_every_backend
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_default_eps_of_rms_norm_is_pytorchs(dtype, backend):
    """Tiny rows, of which eps is most; 16 bits take that of float32."""
    x = torch.full((2, 8), 2e-4, dtype=dtype)
    if backend != "reference" and dtype == torch.float64:
        return
    with use_backend(backend):
        torch.testing.assert_close(rms_norm(x, (8,)), F.rms_norm(x, (8,)))


@on_every_backend
def test_modulation_in_every_form(backend):
    """[batch, D], with ones between, of one sample for all, of one number a sample, or one row for all."""
    x = torch.randn(3, 4, 5, 6)
    forms = [torch.randn(s) for s in ((3, 6), (3, 1, 1, 6), (1, 6), (1, 1, 1, 6), (6,), (3, 1), (3, 1, 1, 1))]
    images = torch.randn(3, 6, 4, 5)
    channels = [torch.randn(s) for s in ((3, 6), (3, 6, 1, 1), (1, 6), (1, 6, 1, 1), (6,), (3, 1))]
    with use_backend(backend):
        for scale, shift in itertools.product(forms, forms):
            wide = [t.expand(3, 6) if t.dim() < 3 else t.reshape(t.shape[0], -1).expand(3, 6) for t in (scale, shift)]
            expected = modulated_layer_norm(x, *(t.contiguous() for t in wide))
            torch.testing.assert_close(modulated_layer_norm(x, scale, shift), expected, rtol=0, atol=0)
        for scale in channels:
            wide = (
                scale.expand(3, 6) if scale.dim() < 3 else scale.reshape(scale.shape[0], 6).expand(3, 6)
            ).contiguous()
            expected = group_norm_silu(images, 2, scale=wide, shift=wide)
            torch.testing.assert_close(group_norm_silu(images, 2, scale=scale, shift=scale), expected, rtol=0, atol=0)


@on_every_backend
def test_dtypes_may_differ(backend):
    """Results have the dtypes of eager's promotion; parameters have any."""
    x, scale, shift = torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 8), torch.randn(2, 8).half()
    residual, gate = torch.randn(2, 3, 8), torch.randn(2, 8).bfloat16()
    with use_backend(backend):
        y, h = modulated_layer_norm(x, scale, shift, residual=residual, gate=gate)
        half, kept = modulated_layer_norm(x, gate, gate, residual=x, gate=gate)
        plain = layer_norm(x, (8,), torch.ones(8), torch.zeros(8).half())
        image = group_norm_silu(x, 1, scale=torch.randn(2, 3))
    assert (y.dtype, h.dtype) == (torch.float32, torch.float32)
    assert (half.dtype, kept.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (plain.dtype, image.dtype) == (torch.bfloat16, torch.float32)
    exact = residual.double() + over_tokens(gate.double(), 3) * x.double()
    torch.testing.assert_close(h.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", GROUP_CASES, ids=str)
def test_groups_keep_the_memory_format(case):
    x, *parameters = case.make((2, 6, 3, 5))
    y = case.call(x.to(memory_format=torch.channels_last), *parameters)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, case.call(x, *parameters), rtol=1e-6, atol=1e-6)


X = torch.randn(2, 3, 4)
ROW = torch.randn(2, 4)
REFUSED = {
    "x must be a tensor": lambda: layer_norm([1.0], 1),
    "x must be a floating": lambda: layer_norm(torch.ones(2, dtype=torch.int64), 2),
    "normalized_shape must be the end": lambda: layer_norm(X, (3,)),
    "normalized_shape must name": lambda: layer_norm(X, ()),
    "normalized_shape must be an int": lambda: rms_norm(X, 4.0),
    "weight must have the shape": lambda: layer_norm(X, 4, torch.ones(3)),
    "weight must be a tensor": lambda: rms_norm(X, 4, 1.0),
    "weight must be a floating": lambda: layer_norm(X, 4, torch.ones(4, dtype=torch.int32)),
    "bias must have the shape": lambda: layer_norm(X, (3, 4), None, torch.ones(4)),
    "eps must be a number": lambda: layer_norm(X, 4, eps="0"),
    "eps must be finite": lambda: layer_norm(X, 4, eps=-1e-5),
    "gate must be None without": lambda: modulated_layer_norm(X, ROW, ROW, gate=ROW),
    "scale must have shape": lambda: modulated_layer_norm(X, ROW[:, :3], ROW),
    "scale must be a tensor": lambda: modulated_layer_norm(X, 1.0, ROW),
    "shift must have shape": lambda: modulated_layer_norm(X, ROW, X),
    "gate must have shape": lambda: modulated_layer_norm(X, ROW, ROW, gate=torch.ones(3, 4), residual=X),
    "residual must have the shape": lambda: modulated_layer_norm(X, ROW, ROW, residual=X[:, :1]),
    "x must have shape": lambda: modulated_layer_norm(X[0, 0], ROW, ROW),
    "num_groups must be positive and divide": lambda: group_norm_silu(X, 2),
    "num_groups must be an int": lambda: group_norm_silu(X, 1.5),
    "weight must have the shape of the channels": lambda: group_norm_silu(X, 3, torch.ones(4)),
    "scale must have shape ": lambda: group_norm_silu(X, 3, scale=ROW),
    "shift must be a tensor": lambda: group_norm_silu(X, 3, shift=2),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_refused(message):
    kind = TypeError if any(word in message for word in ("must be a", "must be an")) else ValueError
    with pytest.raises(kind, match=f"^{message}"):
        REFUSED[message]()


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="weight must be on the device"):
        layer_norm(X, 4, torch.ones(4, device="meta"))


def test_every_function_is_public():
    for name in ("layer_norm", "rms_norm", "modulated_layer_norm", "group_norm_silu"):
        assert name in dgm_kernels.__all__
        assert "Source:" in getattr(dgm_kernels, name).__doc__
