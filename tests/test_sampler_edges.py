"""Edges of the sampler op: odd layouts of every argument, aliasing, unread operands, NumPy numbers, refusals."""

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dgm_kernels import (
    NoiseKey,
    Schedule,
    add_noise,
    denoising_loss,
    noise_like,
    sample,
    sampler_step,
    tables,
    use_backend,
)
from dgm_kernels._core import backends as registry
from tests.cases import BACKENDS, NATIVE, STEP_CASES, VP
from tests.contract import strided_variants

EVERYTHING = next(c for c in STEP_CASES if c.name == "ddpm everything")
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


@on_every_backend
@pytest.mark.parametrize("name", ["noise", "history", "guidance", "known", "mask"])
def test_options_may_have_any_strides(backend, name):
    case = next(c for c in STEP_CASES if c.history) if name == "history" else EVERYTHING
    x, m = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    options: dict[str, Any] = case.options(x)
    with use_backend(backend):
        expected = sampler_step(x, m, case.table, case.step, **options)
        value = options[name]
        for variant in strided_variants(value[0] if name == "guidance" else value):
            options[name] = (variant, value[1]) if name == "guidance" else variant
            actual = sampler_step(x, m, case.table, case.step, **options)
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@on_every_backend
def test_training_operands_may_have_any_strides(backend):
    table = tables.training(VP, prediction="v")
    x0, m, n = (torch.randn(4, 3, 5) for _ in range(3))
    t = torch.tensor([7, 7, 7, 7])
    with use_backend(backend):
        for noise in (NoiseKey(1), n):
            noised, loss = add_noise(x0, table, t, noise), denoising_loss(m, x0, table, t, noise, reduction="none")
            for x0_, m_ in zip(strided_variants(x0), strided_variants(m), strict=True):
                torch.testing.assert_close(add_noise(x0_, table, t, noise), noised, rtol=0, atol=0)
                again = denoising_loss(m_, x0_, table, t, noise, reduction="none")
                torch.testing.assert_close(again, loss, rtol=0, atol=0)


@on_every_backend
def test_index_tensors_may_have_any_strides(backend):
    table, train, x = tables.ddpm(VP), tables.training(VP), torch.randn(4, 9)
    with use_backend(backend):
        for index in (torch.tensor([5, 5, 5, 5]), torch.tensor([1, 3, 5, 60])):
            steps = sampler_step(x, x, table, index, noise=NoiseKey(1, step=index, samples=index))
            noised = add_noise(x, train, index, NoiseKey(1))
            for other in strided_variants(index):
                again = sampler_step(x, x, table, other, noise=NoiseKey(1, step=other, samples=other))
                assert torch.equal(again, steps)
                assert torch.equal(add_noise(x, train, other, NoiseKey(1)), noised)


@on_every_backend
def test_out_may_be_an_input_or_overlap_it(backend):
    table, key, buffer = tables.ddpm(VP), NoiseKey(0), torch.randn(401)
    m = torch.randn(4, 100)
    with use_backend(backend):
        for start in (0, 1):
            x, out = buffer[:400].view(4, 100).clone(), None
            expected = sampler_step(x, m, table, 50, noise=key)
            shared = torch.cat([x.flatten(), torch.zeros(1)])
            out = shared[start : start + 400].view(4, 100)
            assert sampler_step(shared[:400].view(4, 100), m, table, 50, noise=key, out=out) is out
            assert torch.equal(out, expected)
        pair = (torch.empty(4, 100), torch.empty(4, 100))
        assert sampler_step(m, m, table, 50, noise=key, out=pair, return_x0=True) is pair
        with pytest.raises(ValueError, match="out must be two tensors that do not overlap"):
            sampler_step(m, m, table, 50, noise=key, out=(pair[0], pair[0]), return_x0=True)
        with pytest.raises(ValueError, match="out itself requires"):
            sampler_step(m, m, table, 50, noise=key, out=torch.empty(4, 100, requires_grad=True))


@on_every_backend
def test_autograd_sees_that_out_was_written(backend):
    """A backward pass that needs the old values of an overwritten tensor is an error, not a wrong gradient."""
    y, w = torch.randn(2, 50), torch.randn(2, 50, requires_grad=True)
    total = (w * y).sum()
    with use_backend(backend), torch.no_grad():
        sampler_step(y, torch.randn(2, 50), tables.ddim(VP, 10), 3, out=y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@on_every_backend
def test_operands_with_coefficient_0_are_not_read(backend):
    """A trajectory driven by a device-side step may pass an uninitialised history to the step that does not use it."""
    x, nothing = torch.randn(2, 40), torch.full((2, 40), math.nan)
    table, ddpm, first = tables.dpmpp_2m(VP, 10), tables.ddpm(VP), torch.tensor(0)
    with use_backend(backend):
        assert torch.equal(sampler_step(x, x, table, first, history=nothing), sampler_step(x, x, table, 0))
        assert sampler_step(x, x, table, torch.tensor(1), history=nothing).isnan().all()
        last = len(ddpm) - 1
        assert sampler_step(x, x, ddpm, last, noise=nothing).isfinite().all()
        assert sampler_step(x, x, ddpm, last, noise=nothing, known=x, mask=x > 0).isfinite().all()


@on_every_backend
@pytest.mark.parametrize("index", [-1, 100])
def test_index_values_are_checked_on_the_cpu(backend, index):
    x, bad = torch.randn(2, 5), torch.tensor([3, index])
    table, train = tables.ddpm(VP), tables.training(VP)
    with use_backend(backend):
        for call in (
            lambda: sampler_step(x, x, table, bad, noise=NoiseKey(0)),
            lambda: sampler_step(x, x, table, torch.tensor(index), noise=NoiseKey(0)),
            lambda: add_noise(x, train, bad, NoiseKey(0)),
            lambda: denoising_loss(x, x, train, bad, NoiseKey(0)),
        ):
            with pytest.raises(ValueError, match=rf"must be in \[0, 100\).*got {index}"):
                call()


@pytest.mark.parametrize("backend", ["auto"])
def test_float64_operands_go_to_the_reference(backend):
    """A float64 mask or noise with a float32 state works, in float64 arithmetic, and returns float32."""
    x, options = torch.randn(2, 30), EVERYTHING.options(torch.randn(2, 30))
    expected = sampler_step(x, x, EVERYTHING.table, EVERYTHING.step, **options)
    for name in ("noise", "known", "mask"):
        wide = {**options, name: options[name].double()}
        actual = sampler_step(x, x, EVERYTHING.table, EVERYTHING.step, **wide)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        sampler_step(x, x.double(), EVERYTHING.table, EVERYTHING.step, **options), expected, rtol=1e-5, atol=1e-5
    )


def test_one_seed_a_trajectory(monkeypatch):
    """Without a key a run draws one seed, for known pixels of a deterministic sampler too."""
    drawn, draw = [], NoiseKey.draw
    monkeypatch.setattr(NoiseKey, "draw", lambda *a, **k: drawn.append(1) or draw(*a, **k))
    x = torch.randn(2, 8)
    denoiser = lambda x, time: x  # noqa: E731
    sample(denoiser, x, tables.ddim(VP, 10), known=x, mask=x > 0)
    assert len(drawn) == 1
    sample(denoiser, x, tables.ddpm(VP, 10))
    assert len(drawn) == 2
    sample(denoiser, x, tables.ddim(VP, 10))
    assert len(drawn) == 2


@pytest.mark.parametrize("backend", NATIVE)
def test_a_mask_with_a_gradient_takes_the_reference_and_says_so(backend, caplog):
    x, mask = torch.randn(2, 30), torch.rand(2, 30, requires_grad=True)
    table = tables.ddim(VP, 10)
    registry._log_once.cache_clear()  # another test may have had it logged
    with caplog.at_level(logging.INFO, logger="dgm_kernels"):
        new = sampler_step(x, x, table, 3, noise=NoiseKey(0), known=x, mask=mask)
    assert torch.autograd.grad(new.sum(), mask)[0].abs().sum() > 0
    assert "gradient of a mask" in caplog.text
    with use_backend(backend), pytest.raises(ValueError, match="gradient of a mask"):
        sampler_step(x, x, table, 3, noise=NoiseKey(0), known=x, mask=mask)
    with use_backend(backend), torch.no_grad():
        torch.testing.assert_close(sampler_step(x, x, table, 3, noise=NoiseKey(0), known=x, mask=mask), new)


def test_tables_made_in_inference_mode_serve_training():
    with torch.inference_mode():
        table, train = tables.ddim(VP, 10, clip=1.0), tables.training(VP)
    x, m = torch.randn(2, 5), torch.randn(2, 5, requires_grad=True)
    loss = denoising_loss(m, x, train, torch.tensor([1, 2]), NoiseKey(0)) + sampler_step(x, m, table, 3).sum()
    loss.backward()
    assert m.grad is not None


def test_numpy_numbers():
    x, table = torch.randn(2, 5), tables.ddpm(VP, np.int64(10))
    key = NoiseKey(np.uint64(3), first_sample=np.int32(1), step=np.int64(2))
    assert torch.equal(noise_like(x, key), noise_like(x, NoiseKey(3, 1, 2)))
    new = sampler_step(x, x, table, np.int64(3), noise=key, guidance=(x, np.float32(2.0)))
    assert torch.equal(new, sampler_step(x, x, table, 3, noise=NoiseKey(3, 1, 2), guidance=(x, 2.0)))
    for steps in (True, 2.0, "3"):
        with pytest.raises(ValueError, match="steps must be an int"):
            tables.ddpm(VP, steps)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: sampler_step(x, x, tables.ddim(VP), 0, noise="abc"), TypeError, "noise must be a NoiseKey"),
        (lambda x: sampler_step(x, x, tables.ddim(VP), 0, noise=x[0]), ValueError, "noise must have the shape"),
        (lambda x: sampler_step(x, x, tables.ddim(VP), True), TypeError, "step must be an int"),
        (lambda x: sampler_step(x.to(torch.float8_e4m3fn), x, tables.ddim(VP), 0), TypeError, "16, 32 or 64 bits"),
        (lambda x: NoiseKey(0, stream=torch.tensor(3)), TypeError, "stream must be an int, got"),
        (lambda x: NoiseKey(0, first_sample=torch.tensor(3)), TypeError, "first_sample must be an int, got"),
        (lambda x: tables.ddim(VP, clip=1.0, dynamic_threshold=0.9), ValueError, "dynamic_threshold and clip both"),
        (lambda x: tables.ddim(VP, clip="1"), ValueError, "clip must be"),
        (lambda x: Schedule.from_betas([0.999] * 200), ValueError, "no signal is left"),
        (lambda x: Schedule.from_betas([1e-17, 1e-3]), ValueError, r"betas\[0\] = 1e-17 is too small"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(2, 5))


def test_dynamic_threshold_is_dynamic():
    """A sample beyond 1 is divided by its own quantile; a cap of 1 would make it a plain clip."""
    x, m = torch.zeros(2, 1000), torch.stack([torch.linspace(-3, 3, 1000), torch.linspace(-0.5, 0.5, 1000)])
    _, x0 = sampler_step(x, m, tables.ddim(VP, 10, prediction="x0", dynamic_threshold=0.9), 3, return_x0=True)
    s = torch.quantile(m[0].abs(), 0.9)
    torch.testing.assert_close(x0[0], m[0].clamp(-s, s) / s)
    torch.testing.assert_close(x0[1], m[1])


def test_tables_stay_finite():
    """Rounding on a repeated last node must not make a variance negative; one step starts from the noisiest level."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        schedule = Schedule.from_betas(torch.rand(3, generator=generator, dtype=torch.float64) * 0.5 + 1e-3)
        assert tables.ddim(schedule, eta=1.0, final="first").rows64[:, 4:].isfinite().all()
    ladder = Schedule.karras(100)
    assert tables.euler(ladder, 1).initial_sigma == pytest.approx(80.0)
    assert tables.euler(Schedule.geometric(5, 1e-5, 1e-3)).initial_sigma == pytest.approx(1e-3)


def test_noise_keys_compare_by_identity():
    key: NoiseKey = NoiseKey(0, samples=torch.arange(3))
    assert key in [key]
    assert len({key, NoiseKey(0, samples=torch.arange(3))}) == 2


def test_no_elements() -> None:
    table = tables.ddim(VP, 10, dynamic_threshold=0.9)
    for shape in ((2, 0), (0, 3), (2, 0, 3)):
        x: Tensor = torch.empty(shape)
        assert sampler_step(x, x, table, 3).shape == shape
