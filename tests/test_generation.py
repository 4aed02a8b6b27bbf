"""Cached generation: the samples of the naive loop, whatever the batch, and clear refusals."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dgm_kernels
from dgm_kernels import IncrementalSampler, NoiseKey, incremental_sampler, noise_like
from dgm_kernels.nn import HorizontalConv2d, MaskedConv2d, MaskedLinear

from .generation_networks import CASES, FVSBN, MADE, GatedPixelCNN, Operations, PixelCNN, WaveNet, lively

EXECUTORS = tuple(name for name in ("reference", "cpp") if dgm_kernels.backends()[name].startswith("available"))


@pytest.fixture(params=EXECUTORS)
def executor(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on each executor that there is."""
    with dgm_kernels.use_backend("reference" if request.param == "reference" else "auto"):
        yield request.param


def build(name: str) -> tuple[IncrementalSampler, Tensor | None]:
    """The sampler of a case, and conditions of four samples."""
    case = CASES[name]
    sampler = incremental_sampler(lively(case.make()), case.shape, **case.settings)  # type: ignore[arg-type]
    return sampler, None if case.condition is None else torch.randn(case.condition)


# ---- The samples of the naive loop.


@pytest.mark.parametrize("name", CASES)
def test_cached_is_naive(name: str, executor: str) -> None:
    sampler, condition = build(name)
    cached = sampler(4, key=NoiseKey(7), condition=condition)
    assert cached.dtype == torch.int64 and cached.shape == (4, *CASES[name].shape)
    assert cached.unique().numel() > 1
    assert torch.equal(cached, sampler.naive(4, key=NoiseKey(7), condition=condition))
    assert not torch.equal(cached, sampler(4, key=NoiseKey(8), condition=condition))


@pytest.mark.skipif("cpp" not in EXECUTORS, reason="the extension was not built")
def test_float32_runs_in_cpp_and_float64_in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in ("_run_native", "_run_reference"):
        original = getattr(IncrementalSampler, name)

        def recorded(*args: Any, name: str = name, original: Callable[..., Tensor] = original) -> Tensor:
            ran.append(name)
            return original(*args)

        monkeypatch.setattr(IncrementalSampler, name, recorded)
    sampler, _ = build("pixelcnn")
    sampler(2)
    sampler.network.double()
    sampler(2)
    with dgm_kernels.use_backend("reference"):
        sampler.network.float()
        sampler(2)
    assert ran == ["_run_native", "_run_reference", "_run_reference"]


def test_naive_loop_is_one_forward_pass_a_pixel() -> None:
    """The loop against one written here, without the library's order, noise or draws."""
    network = lively(PixelCNN(1, 3, width=6)).eval()
    sampler = incremental_sampler(network, (1, 4, 3), levels=3)
    uniform = noise_like(torch.empty(2, 12, 4), NoiseKey(3), distribution="uniform")[:, :, 0]
    x = torch.zeros(2, 1, 4, 3)
    expected = torch.zeros(2, 1, 4, 3, dtype=torch.int64)
    for pixel, (row, column) in enumerate(itertools.product(range(4), range(3))):
        with torch.no_grad():
            sums = network(x)[:, :, row, column].double().softmax(1).cumsum(1)
        level = (uniform[:, pixel, None] > sums[:, :2]).sum(1)
        expected[:, 0, row, column], x[:, 0, row, column] = level, level - 1.0
    assert torch.equal(sampler.naive(2, key=NoiseKey(3)), expected)
    assert torch.equal(sampler(2, key=NoiseKey(3)), expected)


@pytest.mark.parametrize("name", ["pixelcnn_rgb", "gated_sample_condition", "pixelcnnpp", "wavenet", "made"])
def test_samples_do_not_depend_on_the_batch(name: str, executor: str) -> None:
    sampler, condition = build(name)
    whole = sampler(4, key=NoiseKey(1, first_sample=10), condition=condition)
    for begin, end in ((0, 1), (1, 4)):
        part = None if condition is None else condition[begin:end]
        key = NoiseKey(1, first_sample=10 + begin)
        assert torch.equal(sampler(end - begin, key=key, condition=part), whole[begin:end])
    order = torch.tensor([2, 0, 3, 1])
    key = NoiseKey(1, samples=order + 10)
    permuted = sampler(4, key=key, condition=None if condition is None else condition[order])
    assert torch.equal(permuted, whole[order])


@pytest.mark.parametrize(
    "name", ["pixelcnn_rgb", "gated_pixel_condition", "pixelcnnpp_grey", "wavenet", "made_categorical"]
)
def test_completion(name: str, executor: str) -> None:
    sampler, condition = build(name)
    shape = CASES[name].shape
    given = torch.randint(0, 5, (4, *shape))
    known = torch.rand(shape) < 0.5
    cached = sampler(4, key=NoiseKey(2), condition=condition, given=given, known=known)
    assert torch.equal(cached[:, known], given[:, known])
    arguments = {"key": NoiseKey(2), "condition": condition}
    assert torch.equal(cached, sampler.naive(4, given=given, known=known, **arguments))
    free = sampler(4, **arguments)
    assert not torch.equal(cached[:, ~known], free[:, ~known])  # what is given has an effect on the others
    everything = sampler(4, given=given[0], known=torch.tensor(True), **arguments)
    assert torch.equal(everything, given[:1].expand_as(everything))
    nothing = sampler(4, given=given[0], known=torch.tensor(False), **arguments)
    assert torch.equal(nothing, free)


def test_layout_of_the_uniform_numbers(executor: str) -> None:
    """With all logits 0 a level is 1 where the uniform number of its element is above one half."""
    for shape, groups in (((5, 2, 3), 8), ((6,), 8), ((1, 7), 4)):
        pixels = torch.Size(shape[1:]).numel()
        uniform = noise_like(torch.empty(3, pixels, groups), NoiseKey(9), distribution="uniform")
        expected = (uniform[:, :, : shape[0]] > 0.5).transpose(1, 2).reshape(3, *shape).long()
        sampler = incremental_sampler(_Zeros(), shape, output="bernoulli")
        assert torch.equal(sampler(3, key=NoiseKey(9)), expected)


class _Zeros(nn.Module):
    """Logits 0, which do not depend on the image."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


# ---- Distributions.


@pytest.mark.parametrize("make", [lambda: PixelCNN(1, 1), lambda: GatedPixelCNN(1, 1)])
def test_probabilities_and_frequencies(make: Callable[[], nn.Module], executor: str) -> None:
    """Of the 512 binary 3 x 3 images: the probabilities sum to 1, and samples come as often as they say."""
    network = lively(make()).eval()
    images = torch.tensor(list(itertools.product((0.0, 1.0), repeat=9))).view(512, 1, 3, 3)
    with torch.no_grad():
        log_prob = -F.binary_cross_entropy_with_logits(network(images), images, reduction="none").sum((1, 2, 3))
    probabilities = log_prob.double().exp()
    torch.testing.assert_close(probabilities.sum(), torch.tensor(1.0, dtype=torch.float64), rtol=0.0, atol=1e-5)
    count = 20_000
    samples = incremental_sampler(network, (1, 3, 3), output="bernoulli")(count, key=NoiseKey(0)).flatten(1)
    codes = (samples * 2 ** torch.arange(8, -1, -1)).sum(1)
    frequencies = torch.bincount(codes, minlength=512).double() / count
    deviation = (frequencies - probabilities).abs() / (probabilities * (1 - probabilities) / count).sqrt()
    assert float(deviation.max()) < 5.0  # of 512 standard normal numbers, about


# ---- Networks.


def _in_place(h: Tensor, layers: nn.ModuleDict) -> Tensor:
    kept = layers["relu"](h)
    h.add_(1.0)
    return kept + h.mul_(0.5)


OPERATIONS: dict[str, Callable[[Tensor, nn.ModuleDict], Tensor]] = {
    "activations": lambda h, layers: layers["many"](F.elu(F.silu(h)) + h.sigmoid() - torch.tanh(h)),
    "arithmetic": lambda h, layers: (1.0 - h) / 2 - 3 * -h * (h + 0.25) + h.sub(1.0, alpha=0.5),
    "chunk": lambda h, layers: layers["three"](h.chunk(2, dim=1)[1]) + layers["three"](h.split([1, 3, 2], dim=1)[1]),
    "slices": lambda h, layers: layers["three"](h[:, :3] * h[:, 3:, ...]) * layers["three"](h.narrow(-3, 2, 3)),
    "cat": lambda h, layers: layers["twice"](torch.cat([h[:, 4:], F.relu(h), -h[:, :4]], dim=1)),
    "cat_of_products": lambda h, layers: layers["twice"](torch.cat([layers["masked"](h), h], 1)) * h,
    "parts_of_sums": lambda h, layers: torch.cat([h[:, :2], h[:, 2:] * 2.0], 1) + torch.cat([h[:, 3:], h[:, :3]], 1),
    "gate": lambda h, layers: dgm_kernels.gated_activation(torch.cat([h, h], dim=1), torch.cat([h, -h], dim=1)),
    "in_place": _in_place,
    "products": lambda h, layers: h.tanh() * h * h.sigmoid() * (2.0 * F.relu(h)) * -layers["conv"](h),
    "scaled_layer": lambda h, layers: h - 0.5 * layers["masked"](h) + layers["conv"](h) / 4,
    "shared_layer": lambda h, layers: layers["masked"](F.relu(layers["masked"](h))) + layers["masked"](h),
    "unused": lambda h, layers: (layers["masked"](h), layers["conv"](h))[1],
    "constant_map": lambda h, layers: h * torch.linspace(-1.0, 1.0, 5) + torch.arange(4.0)[:, None] / 4,
    "shape": lambda h, layers: h + torch.full((h.shape[0], 1, h.size(2), 1), 0.5) + h.new_ones(6, 1, 1),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str, executor: str) -> None:
    network = lively(Operations(OPERATIONS[name]))
    sampler = incremental_sampler(network, (1, 4, 5), output="bernoulli")
    assert torch.equal(sampler(5, key=NoiseKey(4)), sampler.naive(5, key=NoiseKey(4)))


def test_functions_that_depend_on_the_condition_only() -> None:
    """The condition passes through operations that a generator does not know."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(3, 8)
            self.norm = nn.LayerNorm(8)
            self.scale = nn.Linear(8, 4)
            self.first = MaskedConv2d(1, 8, 3, mask_type="A", gated=True)
            self.last = nn.Conv2d(4, 1, 1)

        def forward(self, x: Tensor, condition: Tensor) -> Tensor:
            features = self.norm(self.embedding(condition)).softmax(-1)
            h = self.first(x, features) * self.scale(features)[:, :, None, None]
            bias = features.mean(1).view(-1, 1, 1, 1).expand(x.shape[0], 1, x.shape[2], x.shape[3])
            return self.last(h) + bias

    sampler = incremental_sampler(lively(Network()), (1, 4, 4), output="bernoulli")
    condition = torch.tensor([0, 2, 1, 2])
    cached = sampler(4, key=NoiseKey(1), condition=condition)
    assert torch.equal(cached, sampler.naive(4, key=NoiseKey(1), condition=condition))
    assert torch.equal(cached[3:], sampler(1, key=NoiseKey(1, first_sample=3), condition=condition[3:]))
    other = sampler(4, key=NoiseKey(1), condition=torch.tensor([1, 0, 0, 1]))
    assert not torch.equal(cached, other)


def test_parametrized_and_compiled_networks() -> None:
    network = lively(PixelCNN(1, 1))
    nn.utils.parametrizations.weight_norm(network.last)
    nn.utils.parametrizations.weight_norm(network.first)
    expected = incremental_sampler(network, (1, 4, 4), output="bernoulli").naive(3, key=NoiseKey(1))
    compiled = torch.compile(network, backend="eager")
    assert torch.equal(incremental_sampler(compiled, (1, 4, 4), output="bernoulli")(3, key=NoiseKey(1)), expected)


def test_masked_weights_are_not_read(executor: str) -> None:
    for name in ("pixelcnn_rgb", "gated", "made"):
        sampler, _ = build(name)
        clean = sampler(3, key=NoiseKey(0))
        for module in sampler.network.modules():
            if isinstance(module, MaskedConv2d) and module.mask_type == "A":
                module.weight.data[:, :, module.kernel_size[0] // 2 + 1 :] = torch.nan
            if isinstance(module, MaskedLinear):
                mask = module.out_degrees[:, None] >= module.in_degrees + int(module.strict)
                module.weight.data.masked_fill_(~mask, torch.nan)
        assert torch.equal(sampler(3, key=NoiseKey(0)), clean)


def test_scale_and_offset(executor: str) -> None:
    network = lively(GatedPixelCNN(1, 4))
    usual = incremental_sampler(network, (1, 4, 4), levels=4)
    other = incremental_sampler(network, (1, 4, 4), levels=4, scale=-1.5, offset=2.0)
    cached = other(6, key=NoiseKey(0))
    assert torch.equal(cached, other.naive(6, key=NoiseKey(0)))
    assert not torch.equal(cached, usual(6, key=NoiseKey(0)))


# ---- Precision, state, seeds.


def test_other_dtypes() -> None:
    network = lively(GatedPixelCNN(1, 1))
    single = incremental_sampler(network, (1, 5, 5), output="bernoulli")
    cached = single(8, key=NoiseKey(3))
    wide = incremental_sampler(lively(GatedPixelCNN(1, 7)).double(), (1, 5, 5), levels=7)
    assert torch.equal(wide(8, key=NoiseKey(3)), wide.naive(8, key=NoiseKey(3)))
    network.bfloat16()
    rounded = single(8, key=NoiseKey(3))
    network.float()
    assert torch.equal(rounded, single(8, key=NoiseKey(3)))  # 16-bit weights are computed with in float32
    assert cached.shape == rounded.shape


def test_network_keeps_its_mode() -> None:
    network = lively(PixelCNN(1, 1)).train()
    network.wide.eval()
    modes = [module.training for module in network.modules()]
    sampler = incremental_sampler(network, (1, 4, 4), output="bernoulli")
    first = sampler(4, key=NoiseKey(0))
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(first, sampler(4, key=NoiseKey(0)))  # dropout is off
    assert torch.equal(first, sampler.naive(4, key=NoiseKey(0)))


def _write(network: nn.Module) -> None:
    with torch.no_grad():
        network.last.weight.neg_()


def _write_data(network: nn.Module) -> None:
    network.last.weight.data.copy_(-network.last.weight.data)


def _replace(network: nn.Module) -> None:
    network.last.weight = nn.Parameter(-network.last.weight.detach())


def _load(network: nn.Module) -> None:
    network.load_state_dict({name: -value for name, value in network.state_dict().items()})


@pytest.mark.parametrize("change", [_write, _write_data, _replace, _load])
def test_changed_weights_are_seen(change: Callable[[nn.Module], None], executor: str) -> None:
    network = lively(PixelCNN(1, 1))
    sampler = incremental_sampler(network, (1, 5, 5), output="bernoulli")
    before = sampler(6, key=NoiseKey(0))
    change(network)
    after = sampler(6, key=NoiseKey(0))
    assert not torch.equal(after, before)
    assert torch.equal(after, incremental_sampler(network, (1, 5, 5), output="bernoulli").naive(6, key=NoiseKey(0)))


def test_changed_degrees_are_seen() -> None:
    network = lively(FVSBN(6))
    sampler = incremental_sampler(network, (6,), output="bernoulli")
    sampler(4, key=NoiseKey(0))
    for degrees in (network.layer.in_degrees, network.layer.out_degrees):
        degrees.copy_(degrees.flip(0))
    assert torch.equal(sampler(4, key=NoiseKey(0)), sampler.naive(4, key=NoiseKey(0)))
    assert [compiled.program.order for compiled in sampler._compiled.values()] == [(5, 4, 3, 2, 1, 0)]


def test_copies_have_a_network_of_their_own() -> None:
    sampler, _ = build("gated")
    first = sampler(4, key=NoiseKey(0))
    for copied in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert torch.equal(copied(4, key=NoiseKey(0)), first)
        _write_all(copied.network)
        assert not torch.equal(copied(4, key=NoiseKey(0)), first)
    assert torch.equal(sampler(4, key=NoiseKey(0)), first)


def _write_all(network: nn.Module) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.neg_()


def test_autocast_does_not_reach_the_network(executor: str) -> None:
    sampler, _ = build("gated")
    expected = sampler(6, key=NoiseKey(0))
    fresh = incremental_sampler(sampler.network, CASES["gated"].shape, output="bernoulli")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fresh(6, key=NoiseKey(0)), expected)
        assert torch.equal(fresh.naive(6, key=NoiseKey(0)), expected)


def test_seeds() -> None:
    sampler, _ = build("pixelcnn")
    torch.manual_seed(1)
    first, second = sampler(4), sampler(4)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(sampler(4), first)
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    assert torch.equal(sampler(4, generator=generators[0]), sampler(4, generator=generators[1]))
    assert torch.equal(sampler(4, key=NoiseKey(torch.tensor([3]))), sampler(4, key=NoiseKey(3)))
    assert not torch.equal(sampler(4, key=NoiseKey(3, step=1)), sampler(4, key=NoiseKey(3)))
    assert sampler(0).shape == sampler.naive(0).shape == (0, 1, 6, 5)


def test_condition_of_another_form_is_traced_anew() -> None:
    network = lively(GatedPixelCNN(1, 1, 3))
    sampler = incremental_sampler(network, (1, 4, 5), output="bernoulli")
    for shape in ((2, 3), (2, 3, 4, 5), (2, 3)):
        condition = torch.randn(shape)
        cached = sampler(2, key=NoiseKey(0), condition=condition)
        assert torch.equal(cached, sampler.naive(2, key=NoiseKey(0), condition=condition))
    assert torch.equal(sampler(2, key=NoiseKey(0)), sampler.naive(2, key=NoiseKey(0)))


def test_long_sequences(executor: str) -> None:
    """Every step of a WaveNet costs the same: 2000 of them, more than the receptive field."""
    sampler = incremental_sampler(lively(WaveNet(3)), (1, 600), levels=3)
    cached = sampler(1, key=NoiseKey(0))
    given = cached.clone()
    known = torch.arange(600) < 560
    tail = sampler.naive(1, key=NoiseKey(0), given=given, known=known)
    assert torch.equal(cached, tail)


def test_horizontal_stack_alone_does_not_see_other_rows(executor: str) -> None:
    network = lively(nn.Sequential(HorizontalConv2d(1, 4, 3, mask_type="A"), nn.Tanh(), nn.Conv2d(4, 1, 1)))
    sampler = incremental_sampler(network, (1, 3, 6), output="bernoulli")
    one = sampler(3, key=NoiseKey(0))
    first_row = torch.zeros(3, 1, dtype=torch.bool)
    first_row[0] = True
    other = sampler(3, key=NoiseKey(0), given=1 - one, known=first_row.expand(3, 6))
    assert torch.equal(one[:, :, 1:], other[:, :, 1:]) and torch.equal(one[:, :, 0], 1 - other[:, :, 0])


def test_feature_order_is_found() -> None:
    network = MADE(12, hidden=40)
    sampler = incremental_sampler(network, (12,), output="bernoulli")
    sampler(1)
    order = torch.tensor(next(iter(sampler._compiled.values())).program.order)
    depends = torch.autograd.functional.jacobian(lambda x: network(x).squeeze(0), torch.randn(12)[None])[:, 0] != 0
    place = order.argsort()
    assert not bool((depends & (place[:, None] <= place)).any())
