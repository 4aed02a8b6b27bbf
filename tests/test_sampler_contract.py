"""The rest of the contract of the sampler op: layouts, compilation, transforms, dtypes, instruction sets, bad input."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import dgm_kernels
from dgm_kernels import (
    NoiseKey,
    TrainingTable,
    add_noise,
    backends,
    denoising_loss,
    sampler_step,
    tables,
    use_backend,
)
from dgm_kernels.sampler import op
from tests.cases import BACKENDS, FLOW, NATIVE, STEP_CASES, VP
from tests.contract import (
    assert_autocast_like,
    assert_bitwise_repeatable,
    assert_compiles,
    assert_inputs_unchanged,
    assert_vmap,
    results_of_instruction_sets,
    strided_variants,
)
from tests.eager_sampler import eager_step


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
@pytest.mark.parametrize("case", STEP_CASES, ids=str)
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
@pytest.mark.parametrize("case", STEP_CASES, ids=str)
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
        assert call(return_x0=True, out=out) is out
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        strided = torch.empty(3, 40, 7).transpose(1, 2)
        call(out=strided)
        assert torch.equal(strided, expected[0])
        state = x.clone()
        sampler_step(state, m, case.table, case.step, **options, out=state)
        assert torch.equal(state, expected[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", STEP_CASES, ids=str)
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
@pytest.mark.parametrize("case", STEP_CASES, ids=str)
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


@pytest.mark.parametrize("case", [c for c in STEP_CASES if not c.noise], ids=str)
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


ISA_SCRIPT = """
import dgm_kernels as d
x = torch.arange(2500.).reshape(2, 1250) / 999
table, key = d.tables.ddpm(d.Schedule.linear(100), clip=1.0), d.NoiseKey(3)
wide = d.sampler_step(x, -x, table, 50, noise=key)
narrow = d.sampler_step(x.half(), -x.bfloat16(), table, 50, noise=key)
outputs = wide, narrow, d.noise_like(x, key, distribution="bits")
"""


@pytest.mark.parametrize("backend", NATIVE)
def test_instruction_sets_agree(backend, tmp_path):
    """The default and the AVX2 builds give the numbers of the widest one: the same integers, normals to a few ulp."""
    results = results_of_instruction_sets(ISA_SCRIPT, tmp_path)
    for wide, narrow, bits in results.values():
        torch.testing.assert_close(wide, results["default"][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(narrow, results["default"][1], rtol=1e-3, atol=1e-3)
        assert torch.equal(bits, results["default"][2])


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
        "t range": (loss(m, x, train, torch.tensor([0, 100]), key), ValueError, r"t must be in \[0, 100\)"),
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
