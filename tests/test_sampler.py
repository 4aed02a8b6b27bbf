"""Values and gradients of the sampler op: every step of every table, the forward process, and the loss."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dgm_kernels import (
    NoiseKey,
    add_noise,
    denoising_loss,
    noise_like,
    sampler_step,
    tables,
    use_backend,
)
from tests.cases import BACKENDS, DTYPES, NATIVE, SHAPES, STEP_CASES, TRAINING_TABLES, VP
from tests.contract import (
    assert_parity,
)
from tests.eager_sampler import column, convert, eager_step, per_row


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", STEP_CASES, ids=str)
def test_step_parity(case, backend):
    for shape in SHAPES:
        for dtype in DTYPES:
            x, m = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
            options = case.options(x)
            wide = convert(options, torch.float64)
            expected = eager_step(x.double(), m.double(), case.table, case.step, **wide)
            eager = eager_step(x, m, case.table, case.step, **options)
            with use_backend(backend):
                actual = sampler_step(x, m, case.table, case.step, return_x0=True, **options)
            assert_parity(actual, eager, expected)


@pytest.mark.parametrize("case", STEP_CASES, ids=str)
def test_float64_reference_is_the_formula(case):
    x, m = torch.randn(3, 5, 7, dtype=torch.float64), torch.randn(3, 5, 7, dtype=torch.float64)
    options = case.options(x)
    actual = sampler_step(x, m, case.table, case.step, return_x0=True, **options)
    torch.testing.assert_close(actual, eager_step(x, m, case.table, case.step, **options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [c for c in STEP_CASES if c.noise], ids=str)
def test_drawn_noise_is_that_of_noise_like(case, backend):
    x, m = torch.randn(5, 3, 67), torch.randn(5, 3, 67)
    key = NoiseKey(9, first_sample=20, step=100, stream=2)
    options = case.options(x, key)
    given = {**options, "noise": noise_like(x, key.at(100 + case.step))}
    with use_backend(backend):
        actual = sampler_step(x, m, case.table, case.step, **options)
        expected = sampler_step(x, m, case.table, case.step, **given)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("table", TRAINING_TABLES, ids=lambda t: t.prediction)
def test_forward_process_and_loss_parity(table, backend):
    for shape in SHAPES:
        for dtype in DTYPES:
            x0, m, n = (torch.randn(shape, dtype=dtype) for _ in range(3))
            t = torch.randint(0, len(table), shape[:1])
            alpha, sigma, cx, cn, weight = (column(c, x0) for c in table.rows64[t].unbind(1)[:5])

            def forward(x: Tensor, noise: Tensor, a: Tensor = alpha, s: Tensor = sigma) -> Tensor:
                return a.to(x.dtype) * x + s.to(x.dtype) * noise

            def loss(m: Tensor, x: Tensor, noise: Tensor, cx=cx, cn=cn, w=weight) -> Tensor:
                residual = m - (cx.to(x.dtype) * x + cn.to(x.dtype) * noise)
                return w.flatten() * per_row(residual.square()).double().mean(1)

            with use_backend(backend):
                noised = add_noise(x0, table, t, n)
                per_sample = denoising_loss(m, x0, table, t, n, reduction="none")
            assert_parity(noised, forward(x0, n), forward(x0.double(), n.double()))
            expected = loss(m.double(), x0.double(), n.double())
            assert per_sample.dtype == torch.float32
            assert_parity(
                per_sample,
                loss(m, x0, n).float(),
                expected,
                tiny=1e-6 * max(1.0, float(expected.abs().nan_to_num().max()) if expected.numel() else 1.0),
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_draws_the_noise_of_add_noise(backend):
    table, x0 = tables.training(VP), torch.randn(6, 3, 41)
    t, key = torch.randint(0, 100, (6,)), NoiseKey(1, first_sample=7, step=3)
    with use_backend(backend):
        x_t = add_noise(x0, table, t, key)
        alpha, sigma = (column(table.rows[t, i], x0) for i in (0, 1))
        eps = (x_t - alpha * x0) / sigma
        torch.testing.assert_close(eps, noise_like(x0, key), rtol=1e-3, atol=1e-4)
        assert float(denoising_loss(noise_like(x0, key), x0, table, t, key)) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_reductions_and_weights(backend):
    table, x0, m = tables.training(VP), torch.randn(4, 30), torch.randn(4, 30)
    t, key, w = torch.tensor([0, 5, 50, 99]), NoiseKey(1), torch.rand(4)
    with use_backend(backend):
        each = denoising_loss(m, x0, table, t, key, reduction="none")
        torch.testing.assert_close(each, (m - noise_like(x0, key)).square().mean(1))
        torch.testing.assert_close(denoising_loss(m, x0, table, t, key), each.mean())
        torch.testing.assert_close(denoising_loss(m, x0, table, t, key, weight=w, reduction="sum"), (each * w).sum())


def leaf(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("case", STEP_CASES, ids=str)
def test_step_gradcheck_float64(case):
    x, m = leaf((2, 5)), leaf((2, 5))
    options = case.options(x.detach())

    def step(x: Tensor, m: Tensor) -> Any:
        return sampler_step(x, m, case.table, case.step, return_x0=True, **options)

    assert torch.autograd.gradcheck(step, (x, m), check_forward_ad=True, check_batched_grad=False)
    assert torch.autograd.gradgradcheck(step, (x, m))


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("case", STEP_CASES, ids=str)
def test_step_gradients_equal_the_reference(case, backend):
    """Every differentiable operand, both outputs, and the second derivative."""
    x, m = leaf((3, 4, 11), torch.float32), leaf((3, 4, 11), torch.float32)
    options = case.options(x.detach())
    if "guidance" in options:
        options["guidance"] = (options["guidance"][0].requires_grad_(), 3.5)
    for name in ("noise", "history", "known"):
        if name in options:
            options[name].requires_grad_()
    leaves = [x, m, *(options[n] for n in ("noise", "history", "known") if n in options)]
    leaves += [options["guidance"][0]] if "guidance" in options else []
    weights = torch.randn(2, 3, 4, 11)

    def grads() -> list[Tensor]:
        new, x0 = sampler_step(x, m, case.table, case.step, return_x0=True, **options)
        total = (weights[0] * new.square()).sum() + (weights[1] * x0).sum()
        first = torch.autograd.grad(total, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, allow_unused=True)
        return [*first, *(s if s is not None else torch.zeros_like(x) for s in second)]

    with use_backend("reference"):
        expected = grads()
    with use_backend(backend):
        torch.testing.assert_close(grads(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [c for c in STEP_CASES if not c.known], ids=str)
def test_sixteen_bit_gradients(case, dtype, backend):
    """As exact as the reference's, against float64: the bounds are found in float32."""
    x, m = torch.randn(4, 300).to(dtype), torch.randn(4, 300).to(dtype)
    options = case.options(x)
    weight = torch.randn(4, 300)

    def grads(kind: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(kind).requires_grad_() for t in (x, m)]
        new = sampler_step(*leaves, case.table, case.step, **convert(options, kind))
        return torch.autograd.grad((weight * new).sum(), leaves)

    with use_backend("reference"):
        exact, eager = grads(torch.float64), grads(dtype)
    with use_backend(backend):
        assert_parity(grads(dtype), eager, exact, tiny=1e-5)


@pytest.mark.parametrize("table", TRAINING_TABLES, ids=lambda t: t.prediction)
def test_training_gradcheck_float64(table):
    m, x0, t = leaf((3, 5)), leaf((3, 5)), torch.tensor([3, 20, 40])
    for noise in (NoiseKey(1), torch.randn(3, 5, dtype=torch.float64, requires_grad=True)):
        loss = lambda m, x0, noise=noise: denoising_loss(m, x0, table, t, noise)  # noqa: E731
        assert torch.autograd.gradcheck(loss, (m, x0), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(loss, (m, x0))
        assert torch.autograd.gradcheck(lambda x0, noise=noise: add_noise(x0, table, t, noise), (x0,))


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("table", TRAINING_TABLES, ids=lambda t: t.prediction)
def test_training_gradients_equal_the_reference(table, backend):
    m, x0, given = (leaf((4, 3, 17), torch.float32) for _ in range(3))
    t, weight = torch.tensor([1, 9, 30, 45]), torch.rand(4, requires_grad=True)

    def grads(noise: Any) -> tuple[Tensor, ...]:
        leaves = [m, x0, weight, *([noise] if isinstance(noise, Tensor) else [])]
        loss = denoising_loss(m, x0, table, t, noise, weight=weight) + add_noise(x0, table, t, noise).square().mean()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        return (*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

    for noise in (NoiseKey(3), given):
        with use_backend("reference"):
            expected = grads(noise)
        with use_backend(backend):
            torch.testing.assert_close(grads(noise), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", NATIVE)
def test_the_loss_saves_no_noise(backend):
    """Autograd keeps one tensor of the size of the sample: the residual."""
    table, x0, m = tables.training(VP), torch.randn(4, 3, 16, 16), leaf((4, 3, 16, 16), torch.float32)
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with use_backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        denoising_loss(m, x0, table, torch.arange(4), NoiseKey(0))
    assert sum(size == x0.numel() for size in sizes) == 1
