"""The contract of the sampler op: every step of every table, the forward process, and the loss."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import dgm_kernels
from dgm_kernels import (
    NoiseKey,
    SamplerTable,
    Schedule,
    TrainingTable,
    add_noise,
    backends,
    denoising_loss,
    noise_like,
    sample,
    sampler_step,
    tables,
    use_backend,
)
from dgm_kernels.sampler import op
from tests.cases import FLOW, SHAPES, STEP_CASES, TRAINING_TABLES, VP, StepCase
from tests.contract import (
    assert_autocast_like,
    assert_bitwise_repeatable,
    assert_compiles,
    assert_inputs_unchanged,
    assert_parity,
    assert_vmap,
    strided_variants,
)

NATIVE = [name for name in ("cpp",) if backends()[name].startswith("available")]
BACKENDS = ["reference", *NATIVE]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IDS = {"ids": lambda value: value.name if isinstance(value, StepCase) else None}


def column(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (x.dim() - 1))


def per_row(x: Tensor) -> Tensor:
    return x.flatten(1) if x.dim() > 1 else x[:, None]


def eager_step(x: Tensor, m: Tensor, table: SamplerTable, step: int, **options: Any) -> tuple[Tensor, Tensor]:
    """The step as a user writes it, in the dtype of ``x``, with the coefficients as Python floats."""
    px, pm, lo, hi, ax, a0, am, ah, an, ak, sk, _ = table.rows64[step].tolist()
    if "guidance" in options:
        unconditional, scale = options["guidance"]
        m = unconditional + scale * (m - unconditional)
    x0 = px * x + pm * m
    if table.dynamic_threshold is None:
        x0 = x0.clamp(lo, hi)
    else:
        quantile, largest = table.dynamic_threshold
        wide = x0.float() if x0.dtype in (torch.bfloat16, torch.float16) else x0
        s = torch.quantile(per_row(wide).abs(), quantile, dim=1).clamp(1.0, largest).to(x0.dtype)
        x0 = x0.clamp(-column(s, x), column(s, x)) / column(s, x)
    new = ax * x + a0 * x0 + am * m
    if "history" in options:
        new = new + ah * options["history"]
    if "noise" in options:
        new = new + an * options["noise"]
    if "known" in options:
        known = ak * options["known"] + sk * options["noise"]
        new = torch.where(options["mask"], known, new)
    return new, x0


def convert(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Tensors of the options in another dtype; masks stay bool."""

    def one(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(one(v) for v in value)
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: one(value) for name, value in options.items()}


# ---- parity


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", STEP_CASES, **IDS)
def test_step_parity(case, backend):
    for shape in SHAPES:
        if case.table.dynamic_threshold and math.prod(shape[1:]) * shape[0] == 0:
            continue  # the quantile of nothing
        for dtype in DTYPES:
            x, m = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
            options = case.options(x)
            wide = convert(options, torch.float64)
            expected = eager_step(x.double(), m.double(), case.table, case.step, **wide)
            eager = eager_step(x, m, case.table, case.step, **options)
            with use_backend(backend):
                actual = sampler_step(x, m, case.table, case.step, return_x0=True, **options)
            assert_parity(actual, eager, expected)


@pytest.mark.parametrize("case", STEP_CASES, **IDS)
def test_float64_reference_is_the_formula(case):
    x, m = torch.randn(3, 5, 7, dtype=torch.float64), torch.randn(3, 5, 7, dtype=torch.float64)
    options = case.options(x)
    actual = sampler_step(x, m, case.table, case.step, return_x0=True, **options)
    torch.testing.assert_close(actual, eager_step(x, m, case.table, case.step, **options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [c for c in STEP_CASES if c.noise], **IDS)
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


# ---- gradients


def leaf(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("case", STEP_CASES, **IDS)
def test_step_gradcheck_float64(case):
    x, m = leaf((2, 5)), leaf((2, 5))
    options = case.options(x.detach())

    def step(x: Tensor, m: Tensor) -> Any:
        return sampler_step(x, m, case.table, case.step, return_x0=True, **options)

    assert torch.autograd.gradcheck(step, (x, m), check_forward_ad=True, check_batched_grad=False)
    assert torch.autograd.gradgradcheck(step, (x, m))


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("case", STEP_CASES, **IDS)
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


# ---- the rest of the contract


def opcheck_cases() -> list[Any]:
    x, m, t = torch.randn(3, 5, 7), torch.randn(3, 5, 7), torch.tensor([1, 50, 99])
    key = (None, None, 5, None, 0, None, 0, 0)
    given = (torch.randn(3, 5, 7), *key[1:-1], -1)
    rows, training = tables.ddpm(VP, clip=1.0).rows, tables.training(VP).rows
    tail = (None, None, 1.0, None, None, None, True)
    grad = lambda: x.clone().requires_grad_()  # noqa: E731
    return [
        (op.noise_like, (x, *key, 0)),
        (op.noise_like, (x, *key, 2)),
        (op.sampler_step, (x, m, rows, None, 60, *key, *tail, True)),
        (op.sampler_step, (grad(), grad(), rows, t, 0, *given, x, m, 2.0, x, m > 0, None, True, False)),
        (op.sampler_step_out, (x, m, rows, None, 60, *key, *tail, torch.empty_like(x), torch.empty_like(x))),
        (op.add_noise, (grad(), training, t, *key)),
        (op.denoising_loss, (grad(), x, training, t, *key, True)),
        (op.denoising_loss, (grad(), grad(), training, t, *given, True)),
    ]


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("index", range(8))
def test_opcheck(backend, index):
    overloads, args = opcheck_cases()[index]
    torch.library.opcheck(overloads[backend], args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", STEP_CASES, **IDS)
def test_strides_and_offsets(case, backend):
    x, m = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    options = case.options(x)
    with use_backend(backend):
        expected = sampler_step(x, m, case.table, case.step, return_x0=True, **options)
        pairs = list(zip(strided_variants(x), strided_variants(m), strict=True))
        for x_, m_ in [*pairs, *((x, m_) for _, m_ in pairs), *((x_, m) for x_, _ in pairs)]:
            actual = sampler_step(x_, m_, case.table, case.step, return_x0=True, **options)
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
            assert actual[0].stride() == (x_ + 0).stride()


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_operands_and_broadcast_masks(backend):
    table, key = tables.ddpm(VP, clip=1.0), NoiseKey(0)
    x, m = torch.randn(1, 3, 4, 5).expand(6, 3, 4, 5), torch.randn(6, 3, 1, 1).expand(6, 3, 4, 5)
    known, mask = torch.randn(3, 1, 5), torch.rand(1, 1, 4, 5) > 0.5
    with use_backend(backend):
        actual = sampler_step(x, m, table, 50, noise=key, known=known, mask=mask)
        dense = [t.expand(6, 3, 4, 5).clone() for t in (known, mask)]
        expected = sampler_step(x.clone(), m.clone(), table, 50, noise=key, known=dense[0], mask=dense[1])
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", STEP_CASES, **IDS)
def test_inputs_unchanged_repeatable_and_out(case, backend):
    x, m = torch.randn(3, 7, 40), torch.randn(3, 7, 40)
    options = case.options(x, NoiseKey(1))
    held = [v for o in options.values() for v in (o if isinstance(o, tuple) else (o,)) if isinstance(v, Tensor)]
    call = lambda **more: sampler_step(x, m, case.table, case.step, **options, **more)  # noqa: E731
    with use_backend(backend):
        with assert_inputs_unchanged(x, m, *held):
            expected = call(return_x0=True)
        assert_bitwise_repeatable(lambda: call(return_x0=True))
        assert torch.equal(call(), expected[0])
        out = (torch.empty_like(x), torch.empty_like(x))
        assert call(return_x0=True, out=out) is out or backend == "reference"
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        strided = torch.empty(3, 40, 7).transpose(1, 2)
        call(out=strided)
        assert torch.equal(strided, expected[0])
        state = x.clone()
        sampler_step(state, m, case.table, case.step, **options, out=state)
        assert torch.equal(state, expected[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", STEP_CASES, **IDS)
def test_step_tensors(case, backend):
    """A step read on the device, one for all or one a sample, equals an int; noise follows the sample's own step."""
    x, m = torch.randn(4, 50), torch.randn(4, 50)
    options = case.options(x, NoiseKey(1))
    if case.table.history and "history" not in options:
        options["history"] = torch.randn(4, 50)
    steps = [case.step, max(case.step - 2, 0), case.step, max(case.step - 1, 0)]
    with use_backend(backend):
        expected = [sampler_step(x, m, case.table, step, **options) for step in steps]
        assert torch.equal(sampler_step(x, m, case.table, torch.tensor(case.step), **options), expected[0])
        each = sampler_step(x, m, case.table, torch.tensor(steps), **options)
    torch.testing.assert_close(each, torch.stack([e[i] for i, e in enumerate(expected)]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", STEP_CASES, **IDS)
def test_compiles_once_for_two_sizes(case, backend):
    keys = NoiseKey(torch.tensor([5]))

    def step(x: Tensor, m: Tensor, step: int) -> Any:
        options: dict[str, Any] = {"noise": keys} if case.noise else {}
        if case.history:
            options["history"] = x * 0.5
        if case.guidance:
            options["guidance"] = (x + m, 3.5)
        if case.known:
            options |= {"known": m.detach(), "mask": (x > 0).detach()}
        return sampler_step(x, m, case.table, step, **options)

    args = lambda *shape: (torch.randn(shape, requires_grad=True), torch.randn(shape), case.step)  # noqa: E731
    with use_backend(backend):
        assert_compiles(step, args(3, 4, 11), args(5, 4, 13), backend="aot_eager")


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_compiles_with_inductor(backend):
    table = tables.training(VP)

    def loss(m: Tensor, x0: Tensor, t: Tensor, seed: Tensor) -> Tensor:
        key = NoiseKey(seed)
        return denoising_loss(m * add_noise(x0, table, t, key), x0, table, t, key)

    args = lambda n: (  # noqa: E731
        torch.randn(n, 3, 20, requires_grad=True),
        torch.randn(n, 3, 20),
        torch.arange(n),
        torch.tensor([3]),
    )
    with use_backend(backend):
        assert_compiles(loss, args(4), args(9))


def test_new_int_seeds_do_not_recompile():
    x, m, table = torch.randn(2, 30), torch.randn(2, 30), tables.ddpm(VP)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def step(x: Tensor, m: Tensor, i: int, seed: int) -> Tensor:
        return sampler_step(x, m, table, i, noise=NoiseKey(seed))

    for i, seed in ((40, 11), (30, 12), (20, 2**40)):
        torch.testing.assert_close(step(x, m, i, seed), sampler_step(x, m, table, i, noise=NoiseKey(seed)))
    assert counter.frame_count == 1


def test_autocast_keeps_dtypes():
    x, m, table, train = torch.randn(3, 40), torch.randn(3, 40), tables.ddim(VP, 20), tables.training(VP)
    assert_autocast_like(lambda x, m: sampler_step(x, m, table, 3), lambda x, m: eager_step(x, m, table, 3)[0], (x, m))
    t, n = torch.arange(3), torch.randn(3, 40)
    assert_autocast_like(
        lambda m: denoising_loss(m, x, train, t, n),
        lambda m: torch.nn.functional.mse_loss(m, n),
        (m.to(torch.bfloat16),),
    )


@pytest.mark.parametrize("case", [c for c in STEP_CASES if not c.noise], **IDS)
def test_vmap(case):
    x, m = torch.randn(3, 2, 5, 6), torch.randn(3, 2, 5, 6)
    options = case.options(x[0])
    assert_vmap(lambda x, m: sampler_step(x, m, case.table, case.step, **options), (x, m))


def test_functional_transforms_give_the_gradient():
    table, x, m = tables.ddim(VP, 20), torch.randn(2, 5), torch.randn(2, 5)
    f = lambda m: sampler_step(x, m, table, 3).square().sum()  # noqa: E731
    leafed = m.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(f)(m), torch.autograd.grad(f(leafed), leafed)[0])
    _, tangent = torch.func.jvp(f, (m,), (torch.ones_like(m),))
    torch.testing.assert_close(tangent, torch.func.grad(f)(m).sum())


@pytest.mark.parametrize("backend", NATIVE)
def test_mixed_dtypes(backend):
    """Operands may differ in dtype; the result has that of x, the arithmetic is float32."""
    case = next(c for c in STEP_CASES if c.name == "ddpm everything")
    x, m = torch.randn(3, 200, dtype=torch.float16), torch.randn(3, 200, dtype=torch.bfloat16)
    options = case.options(torch.randn(3, 200))
    options["mask"] = options["mask"].to(torch.bfloat16)
    with use_backend("reference"):
        expected = sampler_step(x, m, case.table, case.step, **options)
    with use_backend(backend):
        actual = sampler_step(x, m, case.table, case.step, **options)
    assert actual.dtype == torch.float16
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_rounding_and_special_values(backend, dtype):
    """Rounds as PyTorch does, to nearest even, subnormals too; overflows to infinity; NaN stays NaN."""
    values = torch.tensor([0.0, -0.0, 1.0, 1 + 2**-9, 1 + 3 * 2**-9, 2047.0, 2049.0, 40000.0, 3e-8, 1e-7, math.nan])
    x = torch.cat([values, torch.randn(100)]).reshape(1, -1).to(dtype)
    table = tables.ddim(VP, 20)
    rows = torch.zeros_like(table.rows64)
    rows[:, 2:5] = torch.tensor([-math.inf, math.inf, 1.9])  # lo, hi, ax
    with use_backend(backend):
        actual = sampler_step(x, torch.zeros_like(x), dataclasses.replace(table, rows64=rows), 0)
    expected = (x.float() * torch.tensor(1.9)).to(dtype)
    assert dtype == torch.bfloat16 or expected.isinf().any()
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=0, atol=0)


def test_nan_and_clip():
    """A NaN in the state is not hidden by the bounds."""
    x = torch.tensor([[math.nan, 5.0, -5.0, math.inf]])
    table = tables.ddim(VP, 20, clip=1.0)
    for backend in BACKENDS:
        with use_backend(backend):
            _, x0 = sampler_step(x, torch.zeros_like(x), table, 19, return_x0=True)
        assert math.isnan(float(x0[0, 0]))
        assert x0[0, 1:].tolist() == [1.0, -1.0, 1.0]


@pytest.mark.parametrize("backend", NATIVE)
def test_other_instruction_sets_agree(backend):
    """The default and the AVX2 builds give the numbers of the widest one (same integers; a few ulp of the normals)."""
    import os
    import subprocess
    import sys

    code = (
        "import torch, dgm_kernels as d; x = torch.arange(2500.).reshape(2, 1250) / 999; "
        "t = d.tables.ddpm(d.Schedule.linear(100), clip=1.0); k = d.NoiseKey(3); "
        "print(d.backends()['cpp']); "
        "torch.save([d.sampler_step(x, -x, t, 50, noise=k), d.noise_like(x, k, distribution='bits'), "
        "d.sampler_step(x.half(), -x.bfloat16(), t, 50, noise=k)], '{}')"
    )
    import tempfile

    results = {}
    for isa in ("default", "avx2", "avx512"):
        with tempfile.NamedTemporaryFile(suffix=".pt") as file:
            environment = {**os.environ, "ATEN_CPU_CAPABILITY": isa}
            done = subprocess.run(
                [sys.executable, "-c", code.replace("{}", file.name)],
                env=environment,
                check=True,
                capture_output=True,
                text=True,
            )
            if isa in done.stdout:
                results[isa] = torch.load(file.name)
    assert "default" in results
    for other in results.values():
        assert torch.equal(other[1], results["default"][1])
        torch.testing.assert_close(other[0], results["default"][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other[2], results["default"][2], rtol=1e-3, atol=1e-3)


# ---- trajectories


def gaussian_denoiser(schedule: Schedule, prediction: str, mean: float = 0.5, std: float = 0.3) -> Any:
    """The best prediction for data from N(mean, std^2)."""

    def denoiser(x: Tensor, time: Tensor) -> Tensor:
        index = int((schedule.times - float(time[0])).abs().argmin())
        alpha, sigma = float(schedule.alpha_t[index]), float(schedule.sigma_t[index])
        x0 = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)
        eps = (x - alpha * x0) / sigma
        outputs = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "score": -eps / sigma, "velocity": x0 - eps}
        return outputs[prediction]

    return denoiser


LONG = Schedule.linear(1000)
TRAJECTORIES = {
    "ddpm": (LONG, tables.ddpm(LONG)),
    "ddpm v": (LONG, tables.ddpm(LONG, prediction="v", variance="fixed_large")),
    "ddim": (LONG, tables.ddim(LONG, 200, prediction="score")),
    "ddim eta": (LONG, tables.ddim(LONG, 500, eta=1.0, prediction="x0", spacing="trailing")),
    "euler": (LONG, tables.euler(LONG, 200)),
    "euler ancestral": (LONG, tables.euler_ancestral(LONG, 500, prediction="v")),
    "heun": (LONG, tables.heun(LONG, 50)),
    "dpmpp_2m": (LONG, tables.dpmpp_2m(LONG, 100, spacing="trailing")),
    "reverse sde": (LONG, tables.reverse_sde(LONG)),
    "probability flow": (LONG, tables.probability_flow(LONG)),
    "predictor corrector": (LONG, tables.predictor_corrector(LONG, 200)),
    "flow euler": (Schedule.flow(200), tables.flow_euler(Schedule.flow(200))),
    "flow midpoint": (Schedule.flow(400), tables.flow_midpoint(Schedule.flow(400), 100)),
    "langevin": (Schedule.geometric(30, 0.01, 5.0), tables.annealed_langevin(Schedule.geometric(30, 0.01, 5.0), 100)),
}


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_every_sampler_reaches_the_data_distribution(name):
    """With the exact denoiser of N(0.5, 0.3^2), 4096 samples have its mean and standard deviation to 5 %."""
    schedule, table = TRAJECTORIES[name]
    x = noise_like(torch.empty(4096, 1), NoiseKey(1, stream=1)) * table.initial_sigma
    x = sample(gaussian_denoiser(schedule, table.prediction), x, table, noise=NoiseKey(1))
    assert abs(float(x.mean()) - 0.5) < 0.025
    assert abs(float(x.std()) / 0.3 - 1) < 0.05


def test_heun_and_dpmpp_2m_are_second_order():
    """Halving the step divides the error by about 4 (Euler: by 2), against a fine Euler solution, in float64."""
    schedule = Schedule.karras(1 << 12, sigma_min=0.05, sigma_max=10.0)
    x = torch.linspace(-20, 20, 41, dtype=torch.float64)[:, None]
    solve = lambda build, n: sample(gaussian_denoiser(schedule, "x0"), x, build(schedule, n, prediction="x0"))  # noqa: E731
    # exact: the ODE scales the deviation from the mean; the last node is sigma_min, then one Euler step to 0
    exact = lambda sigma: 0.5 + (x - 0.5) * math.sqrt((0.09 + sigma**2) / (0.09 + 100.0))  # noqa: E731
    at_min = exact(0.05)
    final = 0.5 + 0.09 / (0.09 + 0.05**2) * (at_min - 0.5)
    for build, order in ((tables.euler, 1), (tables.heun, 2), (tables.dpmpp_2m, 2)):
        errors = [float((solve(build, n) - final).abs().max()) for n in (33, 65, 129)]
        rates = [math.log2(errors[i] / errors[i + 1]) for i in (0, 1)]
        assert order - 0.35 < rates[1] < order + 0.6, (build.__name__, errors, rates)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_seed_same_samples(backend):
    """Batch 1 against 64, a shuffled batch, one thread against two: the same trajectory, bit for bit."""
    schedule = Schedule.linear(20)
    table = tables.ddpm(schedule, clip=3.0)
    denoise = gaussian_denoiser(schedule, "eps")

    def run(key: NoiseKey, rows: int) -> Tensor:
        x = noise_like(torch.empty(rows, 3, 37), dataclasses.replace(key, stream=1))
        return sample(denoise, x, table, noise=key)

    threads = torch.get_num_threads()
    try:
        with use_backend(backend):
            torch.set_num_threads(2)
            whole = run(NoiseKey(4), 64)
            for row in (0, 17, 63):
                assert torch.equal(run(NoiseKey(4, first_sample=row), 1)[0], whole[row])
            order = torch.randperm(64)
            assert torch.equal(run(NoiseKey(4, samples=order), 64), whole[order])
            torch.set_num_threads(1)
            assert torch.equal(run(NoiseKey(4), 64), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", NATIVE)
def test_reference_and_native_trajectories_agree(backend):
    schedule = Schedule.linear(50)
    table = tables.ddpm(schedule)
    results = []
    for name in ("reference", backend):
        with use_backend(name):
            x = noise_like(torch.empty(8, 100), NoiseKey(4, stream=1))
            results.append(sample(gaussian_denoiser(schedule, "eps"), x, table, noise=NoiseKey(4)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_torch_manual_seed_and_generators_govern_unkeyed_noise():
    table, x, m = tables.ddpm(VP), torch.randn(2, 50), torch.randn(2, 50)
    torch.manual_seed(1)
    first, second = (sampler_step(x, m, table, 50) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(sampler_step(x, m, table, 50), first)
    assert not torch.equal(first, second)


def test_inpainting_keeps_known_pixels():
    """At the end the known pixels are exactly the given ones, and the others still follow the model."""
    schedule = Schedule.linear(100)
    table = tables.ddpm(schedule)
    known, mask = torch.full((1, 8), 2.0), torch.arange(8) < 4
    x = noise_like(torch.empty(2000, 8), NoiseKey(1, stream=1))
    x = sample(gaussian_denoiser(schedule, "eps"), x, table, noise=NoiseKey(1), known=known, mask=mask)
    assert torch.equal(x[:, :4], torch.full((2000, 4), 2.0))
    assert abs(float(x[:, 4:].mean()) - 0.5) < 0.03


# ---- bad input


def bad_calls() -> dict[str, tuple[Any, type[Exception], str]]:
    x, m, table, train = torch.randn(2, 3), torch.randn(2, 3), tables.ddim(VP, 10), tables.training(VP)
    t, key, heun = torch.tensor([0, 1]), NoiseKey(0), tables.heun(VP, 10)
    step = lambda *a, **k: lambda: sampler_step(*a, **k)  # noqa: E731
    loss = lambda *a, **k: lambda: denoising_loss(*a, **k)  # noqa: E731
    meta = torch.empty(2, 3, device="meta")
    return {
        "x no tensor": (step([1.0], m, table, 0), TypeError, "x must be a tensor"),
        "x int": (step(x.long(), m, table, 0), TypeError, "x must be a floating-point"),
        "x scalar": (step(torch.tensor(1.0), m, table, 0), ValueError, "x must have a batch"),
        "shape": (step(x, m[:, :2], table, 0), ValueError, r"model_output must have the shape of x, \(2, 3\), got"),
        "device": (step(x, meta, table, 0), ValueError, "model_output must be on the device of x"),
        "table": (step(x, m, train, 0), TypeError, "table must be a SamplerTable"),
        "rows": (step(x, m, table.rows, 0), TypeError, "table must be a SamplerTable"),
        "step low": (step(x, m, table, -1), ValueError, r"step must be in \[0, 10\)"),
        "step high": (step(x, m, table, 10), ValueError, r"step must be in \[0, 10\)"),
        "step float": (step(x, m, table, 1.0), TypeError, "step must be an int"),
        "step tensor dtype": (step(x, m, table, torch.tensor(1.0)), TypeError, "step must be an int64"),
        "step tensor shape": (step(x, m, table, torch.zeros(3, dtype=torch.int64)), ValueError, "step must have shape"),
        "noise": (step(x, m, tables.ddpm(VP), 3, noise=3), TypeError, "noise must be a NoiseKey"),
        "noise shape": (step(x, m, tables.ddpm(VP), 3, noise=m[:1]), ValueError, "noise must have the shape"),
        "history missing": (step(x, m, heun, 1), ValueError, "history must be given for step 1 of table 'heun'"),
        "history shape": (step(x, m, heun, 1, history=m[0]), ValueError, "history must have the shape"),
        "guidance": (step(x, m, table, 0, guidance=2.0), TypeError, "guidance must be a pair"),
        "guidance scale": (step(x, m, table, 0, guidance=(m, "2")), TypeError, "the scale, must be a number"),
        "known alone": (step(x, m, table, 0, known=m), ValueError, "known and mask go together"),
        "mask shape": (step(x, m, table, 0, known=m, mask=torch.ones(5)), ValueError, "mask must broadcast"),
        "mask dtype": (step(x, m, table, 0, known=m, mask=torch.ones(3).int()), TypeError, "mask must be a bool"),
        "out dtype": (step(x, m, table, 0, out=x.double()), TypeError, "out must have the dtype"),
        "out shape": (step(x, m, table, 0, out=x[:1]), ValueError, "out must have the shape"),
        "out pair": (step(x, m, table, 0, out=(x, x)), ValueError, "out must be a tensor"),
        "out grad": (step(x.clone().requires_grad_(), m, table, 0, out=x.clone()), ValueError, "out does not support"),
        "t range": (loss(m, x, train, torch.tensor([0, 100]), key), (ValueError, IndexError), "step must be in|out of"),
        "t dtype": (loss(m, x, train, t.float(), key), TypeError, "t must be an int64"),
        "t shape": (loss(m, x, train, t[:1], key), ValueError, "t must have shape"),
        "training table": (loss(m, x, table, t, key), TypeError, "table must be a TrainingTable"),
        "loss noise": (loss(m, x, train, t, None), TypeError, "noise must be a NoiseKey or a tensor, got None"),
        "reduction": (loss(m, x, train, t, key, reduction="max"), ValueError, "reduction must be"),
        "weight": (loss(m, x, train, t, key, weight=torch.ones(3)), ValueError, "weight must have the shape"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_input(name):
    call, error, message = bad_calls()[name]
    for backend in BACKENDS:
        with use_backend(backend), pytest.raises(error, match=message):
            call()


def test_backends_and_use_backend(caplog):
    assert set(dgm_kernels.backends()) == {"reference", "cpp", "cuda", "triton"}
    with pytest.raises(ValueError, match="name must be"), use_backend("opencl"):
        pass
    missing = [name for name, state in backends().items() if state.startswith("unavailable")]
    for name in missing:
        with pytest.raises(ValueError, match=f"backend '{name}' is not available: "), use_backend(name):
            pass
    if NATIVE:
        with use_backend("cpp"), pytest.raises(ValueError, match=r"does not take this call: torch.float64"):
            sampler_step(torch.zeros(1, 2).double(), torch.zeros(1, 2).double(), tables.ddim(VP, 5), 0)


def test_public_names():
    for name in dgm_kernels.__all__:
        assert getattr(dgm_kernels, name).__doc__, name
    assert isinstance(tables.training(FLOW, prediction="velocity"), TrainingTable)
