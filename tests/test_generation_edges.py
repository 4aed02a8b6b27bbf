"""Cached generation where networks write to tensors, change between calls, return parts or what is not a number."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import dgm_kernels
from dgm_kernels import IncrementalSampler, NoiseKey, incremental_sampler
from dgm_kernels._core import backends
from dgm_kernels.masked_conv import generate
from dgm_kernels.masked_conv.trace import evaluating
from dgm_kernels.nn import MaskedConv2d

from .generation_networks import Operations, PixelCNN, lively

EXECUTORS = tuple(name for name in ("reference", "cpp") if dgm_kernels.backends()[name].startswith("available"))
on_every_executor = pytest.mark.parametrize("executor", EXECUTORS)


class Function(nn.Module):
    """A masked layer and a function of its result; a condition where one is given."""

    def __init__(self, outputs: int, function: Callable[..., Tensor], channels: int = 1) -> None:
        super().__init__()
        self.first = MaskedConv2d(channels, outputs, 3, mask_type="A")
        self.function = function

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        return self.function(self.first(x), *condition)


def assert_naive(sampler: IncrementalSampler, executor: str = "auto", batch: int = 4, **arguments: Any) -> None:
    """The sampler draws what the naive loop draws."""
    with dgm_kernels.use_backend("reference" if executor == "reference" else "auto"):
        drawn = sampler(batch, key=NoiseKey(3), **arguments)
    assert torch.equal(drawn, sampler.naive(batch, key=NoiseKey(3), **arguments))


# ---- What the network returns.


@on_every_executor
@pytest.mark.parametrize(
    ("outputs", "part", "settings"),
    [
        (12, slice(6, 12), {"output": "logistic_mixture"}),
        (12, slice(0, 6), {"output": "logistic_mixture"}),
        (2, slice(0, 1), {"output": "bernoulli"}),
        (5, slice(0, 3), {"levels": 3}),
        (7, slice(2, 5), {"levels": 3}),
    ],
)
def test_part_of_a_feature_map(outputs: int, part: slice, settings: dict[str, Any], executor: str) -> None:
    network = lively(Function(outputs, lambda h: h[:, part]))
    assert_naive(incremental_sampler(network, (1, 5, 5), **settings), executor)


@on_every_executor
@pytest.mark.parametrize(("logit", "level"), [(torch.inf, 1), (-torch.inf, 0), (torch.nan, 0)])
def test_logits_that_are_not_finite(logit: float, level: int, executor: str) -> None:
    network = Function(1, lambda h: h)
    nn.init.constant_(network.first.bias, logit)
    sampler = incremental_sampler(network, (1, 3, 3), output="bernoulli")
    assert_naive(sampler, executor)
    assert bool((sampler.naive(4, key=NoiseKey(3)) == level).all())


@on_every_executor
@pytest.mark.parametrize("channels", [1, 3])
def test_mixture_of_what_is_not_a_number_gives_level_0(channels: int, executor: str) -> None:
    network = Function(10 if channels == 3 else 3, lambda h: h, channels)
    nn.init.constant_(network.first.bias, torch.nan)
    sampler = incremental_sampler(network, (channels, 2, 2), output="logistic_mixture")
    assert_naive(sampler, executor)
    assert not sampler.naive(4, key=NoiseKey(3)).any()


# ---- Writing to tensors.


def _alias(h: Tensor, layers: nn.ModuleDict) -> Tensor:
    kept = h
    h += layers["masked"](h)
    return kept * 0.5


def _all_kinds(h: Tensor, layers: nn.ModuleDict) -> Tensor:
    kept = h
    h -= 0.5
    h *= layers["conv"](h)
    h /= 2.0
    return F.relu(kept, True) + h


def _constant(h: Tensor, layers: nn.ModuleDict) -> Tensor:
    total = torch.ones_like(h)
    kept = total
    total += h
    return kept * total


def _half(h: Tensor, layers: nn.ModuleDict) -> Tensor:
    first, second = h.chunk(2, dim=1)
    first += second
    return torch.cat([first, second], dim=1)


def _number(h: Tensor, layers: nn.ModuleDict) -> Tensor:
    channels = h.shape[1]
    before = channels
    channels *= 2
    return h * before + h[:, : channels // 2]


@pytest.mark.parametrize("function", [_alias, _all_kinds, _constant, _half, _number])
def test_writes_are_seen_under_all_names(function: Callable[[Tensor, nn.ModuleDict], Tensor]) -> None:
    """Also where the last layer is 0 when the network is traced, so that nothing of them is to be seen."""
    network = lively(Operations(function))
    weight = network.last.weight.detach().clone()
    nn.init.zeros_(network.last.weight)
    sampler = incremental_sampler(network, (1, 4, 5), output="bernoulli")
    sampler(1)
    with torch.no_grad():
        network.last.weight.copy_(4.0 * weight)
    assert_naive(sampler)


def test_network_that_writes_to_its_input() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = MaskedConv2d(1, 1, 3, mask_type="A")

        def forward(self, x: Tensor) -> Tensor:
            x *= 3.0
            return self.first(x)

    assert_naive(incremental_sampler(lively(Network()), (1, 4, 4), output="bernoulli"))


def test_result_is_compared_once_it_depends_on_the_image() -> None:
    """As long as the last layer is 0 any program would do."""
    network = lively(Operations(lambda h, layers: h + torch.randn(6, 1, 1)))
    weight = network.last.weight.detach().clone()
    nn.init.zeros_(network.last.weight)
    sampler = incremental_sampler(network, (1, 4, 5), output="bernoulli")
    for _ in range(2):
        sampler(1)
    with torch.no_grad():
        network.last.weight.copy_(weight)
    with pytest.raises(ValueError, match="computes something else"):
        sampler(1)


def test_tracing_leaves_no_proxies_behind() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = MaskedConv2d(1, 1, 3, mask_type="A")
            self.last: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.first(x)
            self.first.seen = self.last
            return self.last

    network = Network()
    incremental_sampler(network, (1, 4, 4), output="bernoulli")(1)
    assert not isinstance(network.last, fx.Proxy) and not isinstance(getattr(network.first, "seen", None), fx.Proxy)


# ---- What changes between calls.


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_changed_parametrized_weights_are_seen(norm: Callable[[nn.Module], nn.Module]) -> None:
    network = nn.Sequential(norm(MaskedConv2d(1, 8, 3, mask_type="A")), nn.ReLU(), norm(nn.Conv2d(8, 1, 1)))
    sampler = incremental_sampler(lively(network), (1, 5, 5), output="bernoulli")
    assert_naive(sampler)
    before = sampler(4, key=NoiseKey(0))
    with torch.no_grad():
        for layer in (network[0], network[2]):
            layer.weight = torch.randn(layer.weight.shape)
            layer.bias.normal_()
    assert_naive(sampler)
    assert not torch.equal(sampler(4, key=NoiseKey(0)), before)


def test_programs_of_several_forms_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[object] = []

    class Counted(generate.Trace):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            traced.append(self)

    monkeypatch.setattr(generate, "Trace", Counted)
    network = lively(Function(1, lambda h, *condition: sum((c.sum(1).view(-1, 1, 1, 1) for c in condition), start=h)))
    sampler = incremental_sampler(network, (1, 4, 5), output="bernoulli")
    for _ in range(2):
        assert_naive(sampler, batch=2)
        for size in (1, 2):
            assert_naive(sampler, batch=2, condition=torch.randn(2, size))
    assert len(traced) == 3
    for size in (3, 4, 5):
        sampler(2, condition=torch.randn(2, size))
        sampler(2)
    assert len(traced) == 6  # the one without a condition was always among those used last
    assert len(sampler._compiled) == 4


# ---- Threads.


def test_modes_survive_two_threads() -> None:
    network = nn.Sequential(nn.Dropout(0.5)).train()
    inside, second, done = (threading.Event() for _ in range(3))

    def first_thread() -> None:
        with evaluating(network, torch.device("cpu")):
            inside.set()
            second.wait(0.2)
        done.set()

    def second_thread() -> None:
        inside.wait(10.0)
        with evaluating(network, torch.device("cpu")):
            second.set()
            done.wait(10.0)

    threads = [threading.Thread(target=target) for target in (first_thread, second_thread)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(module.training for module in network.modules())


def test_samples_are_drawn_in_the_networks_own_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that another thread may train meanwhile."""
    network = PixelCNN(1, 1).train()
    original, modes = IncrementalSampler._run_reference, []

    def recorded(*args: Any) -> Tensor:
        modes.append(network.training)
        return original(*args)

    monkeypatch.setattr(IncrementalSampler, "_run_reference", recorded)
    with dgm_kernels.use_backend("reference"):
        assert not incremental_sampler(network, (1, 3, 3), output="bernoulli")(1).requires_grad
    assert modes == [True]


# ---- Arguments.


@on_every_executor
def test_strided_keys(executor: str) -> None:
    network = lively(PixelCNN(1, 1))
    sampler = incremental_sampler(network, (1, 4, 4), output="bernoulli")
    numbers = torch.arange(8)[::2]
    for name in ("samples", "step"):
        with dgm_kernels.use_backend("reference" if executor == "reference" else "auto"):
            strided = sampler(4, key=NoiseKey(0, **{name: numbers}))  # type: ignore[arg-type]
        key = NoiseKey(0, **{name: numbers.contiguous()})  # type: ignore[arg-type]
        assert torch.equal(strided, sampler(4, key=key))


@on_every_executor
def test_division_by_constants(executor: str) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = MaskedConv2d(1, 1, 3, mask_type="A")
            self.register_buffer("temperature", torch.tensor(0.25))

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return torch.div(self.first(x) / self.temperature, scale[:, None, None, None])

    network = lively(Network())
    sampler = incremental_sampler(network, (1, 5, 5), output="bernoulli")
    for temperature in (0.25, 4.0):
        network.temperature.fill_(temperature)
        assert_naive(sampler, executor, condition=torch.tensor([1.0, 0.5, 4.0, 2.0]))


def test_parts_without_channels_and_from_the_end() -> None:
    network = lively(Function(4, lambda h: torch.cat([F.relu(h[:, :0]) * 2.0, h.narrow(1, -2, 1)], dim=1)))
    assert_naive(incremental_sampler(network, (1, 4, 4), output="bernoulli"))


def test_default_device_is_another() -> None:
    for channels, network in ((3, PixelCNN(3, 3, groups=3)), (1, Function(1, lambda h: 0.5 * h + 0.5))):
        arguments: dict[str, Any] = {"image_shape": (channels, 4, 4), "output": "bernoulli"}
        expected = incremental_sampler(lively(network), **arguments)(2, key=NoiseKey(0))
        with torch.device("meta"):
            assert torch.equal(incremental_sampler(network, **arguments)(2, key=NoiseKey(0)), expected)


def test_forced_backend_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels compute the network; generation has none, and runs in PyTorch."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    network = Function(1, lambda h: h)
    network.first = nn.Identity()  # type: ignore[assignment]
    network.function = torch.zeros_like
    sampler = incremental_sampler(network, (1, 3, 3), output="bernoulli")
    expected = sampler(2, key=NoiseKey(0))
    monkeypatch.setattr(backends, "_forced", "triton")
    assert torch.equal(sampler(2, key=NoiseKey(0)), expected)
