"""What cached generation refuses: networks that are not causal, unknown operations, bad arguments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_kernels import NoiseKey, incremental_sampler
from dgm_kernels.nn import MaskedConv2d, MaskedLinear, VerticalConv2d

from .generation_networks import GatedPixelCNN, Operations, PixelCNN

# ---- Networks that are not causal.


class _Rgb(nn.Module):
    """Colours that see each other in a circle: the last layer turns them around."""

    def __init__(self) -> None:
        super().__init__()
        self.first = MaskedConv2d(3, 3, 1, mask_type="A", channel_groups=3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return torch.cat([x[:, 1:], x[:, :1]], dim=1)


NOT_CAUSAL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "type_b_first": (
        lambda: nn.Sequential(MaskedConv2d(1, 4, 3, mask_type="B"), nn.ReLU(), MaskedConv2d(4, 1, 3, mask_type="B")),
        (1, 3, 3),
        r"channel 0 of a pixel would depend on itself\. masked_conv2d in module '0' sees the pixel itself",
    ),
    "skip_from_the_image": (
        lambda: _Skip(),
        (1, 3, 3),
        r"depend on itself\. add in the network sees the pixel itself",
    ),
    "pointwise_first": (
        lambda: nn.Sequential(nn.Conv2d(1, 1, 1)),
        (1, 3, 3),
        r"Conv2d in module '0' sees the pixel itself",
    ),
    "vertical_b_first": (
        lambda: nn.Sequential(VerticalConv2d(1, 1, 3)),
        (1, 3, 3),
        r"vertical_conv2d in module '0' sees 1 columns to the right",
    ),
    "colours_in_a_circle": (_Rgb, (3, 2, 2), r"channel 0 of a pixel would depend on itself"),
    "not_strict": (
        lambda: MaskedLinear(torch.arange(4), torch.arange(4)),
        (4,),
        r"masked_linear in the network sees the pixel itself",
    ),
}


class _Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = MaskedConv2d(1, 1, 3, mask_type="A")

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + x


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_networks_that_are_not_causal(name: str) -> None:
    make, shape, message = NOT_CAUSAL[name]
    with pytest.raises(ValueError, match=f"network is not causal: .*{message}"):
        incremental_sampler(make(), shape, output="bernoulli")(1)


def test_mixture_of_dependent_colours_is_refused() -> None:
    network = MaskedConv2d(3, 30, 3, mask_type="A", channel_groups=3)
    with pytest.raises(ValueError, match="network is not causal: the parameters of a pixel would depend on itself"):
        incremental_sampler(network, (3, 3, 3), output="logistic_mixture")(1)


# ---- Operations that are not known.


def _write_to_a_part(h: Tensor, layers: nn.ModuleDict) -> Tensor:
    first, second = h.chunk(2, dim=1)
    first += second
    return h


def _write_to_the_whole(h: Tensor, layers: nn.ModuleDict) -> Tensor:
    first = h[:, :3]
    h.mul_(2.0)
    return layers["three"](first)


def _write_behind_dropout(h: Tensor, layers: nn.ModuleDict) -> Tensor:
    same = F.dropout(h, 0.5, training=False)
    same -= 1.0
    return h + same


UNSUPPORTED: dict[str, tuple[Callable[[Tensor, nn.ModuleDict], Tensor], str]] = {
    "function": (lambda h, layers: h.softmax(1), r"softmax in the network: an operation that is not known"),
    "flip": (lambda h, layers: torch.flip(h, (3,)), r"flip in the network: an operation that is not known"),
    "alpha": (lambda h, layers: F.elu(h, alpha=2.0), r"elu in the network: alpha=2\.0, only 1"),
    "dimension": (lambda h, layers: torch.cat([h, h], dim=2)[:, :, :4], r"cat in the network: dimension 2"),
    "index": (lambda h, layers: h[:, :, :1] + h, r"getitem in the network: the index"),
    "quotient": (
        lambda h, layers: h / (h * h + 1.0),
        r"truediv in the network: division by a tensor that depends on the image",
    ),
    "kernel": (
        lambda h, layers: F.conv2d(h, torch.ones(6, 6, 3, 3), padding=1),
        r"conv2d in the network: padding of a kernel that is not masked",
    ),
    "groups": (
        lambda h, layers: F.conv2d(h, torch.ones(6, 1, 1, 1), groups=6),
        r"conv2d in the network: strides and groups",
    ),
    "weight": (lambda h, layers: F.linear(h, torch.ones(5, 5)), r"linear in the network: a dense layer over pixels"),
    "branch": (
        lambda h, layers: h if h.sum() > 0 else -h,
        r"network cannot be traced by torch\.fx: .* inputs to control flow",
    ),
    "part": (_write_to_a_part, r"iadd in the network: it writes to memory that is read later as .* masked_conv2d in "),
    "whole": (_write_to_the_whole, r"mul_ in the network: it writes to memory that is read later as .* getitem in "),
    "dropout": (_write_behind_dropout, r"isub in the network: it writes to memory that is read later"),
    "noise": (
        lambda h, layers: h + torch.randn(6, 1, 1),
        r"computes something else, up to [0-9.]* away; does it write to tensors or draw random numbers",
    ),
    "keyword": (lambda h, layers: torch.mul(h, other=2.0), r"mul in the network: .* keyword argument 'other'"),
    "parameter": (
        lambda h, layers: h * layers["conv"].bias.sum().item(),
        r"mul in the network: item in the network is a number computed from the condition or from parameters",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_operations(name: str) -> None:
    function, message = UNSUPPORTED[name]
    sampler = incremental_sampler(Operations(function), (1, 4, 5), output="bernoulli")
    for _ in range(2):  # the second call, too, does not find a program
        with pytest.raises(ValueError, match=message):
            sampler(1)


class _Conditioned(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = MaskedConv2d(1, 1, 3, mask_type="A")
        self.function = function

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.function(self.first(x), condition)


def test_numbers_computed_from_the_condition() -> None:
    network = _Conditioned(lambda h, condition: h * condition.mean().item())
    sampler = incremental_sampler(network, (1, 3, 3), output="bernoulli")
    for batch in (1, 2):
        with pytest.raises(ValueError, match="item in the network is a number computed from the condition"):
            sampler(batch, condition=torch.ones(batch, 2))


def test_numbers_that_depend_on_the_batch() -> None:
    network = _Conditioned(lambda h, condition: h * condition.shape[1] / h.shape[0])
    sampler = incremental_sampler(network, (1, 3, 3), output="bernoulli")
    for _ in range(2):
        assert sampler(1, condition=torch.ones(1, 2)).shape == (1, 1, 3, 3)
        with pytest.raises(ValueError, match="depends on how many samples there are, 1 with one, 3 with 3"):
            sampler(3, condition=torch.ones(3, 2))


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_hooks(norm: Callable[[nn.Module], nn.Module], place: int) -> None:
    network = nn.Sequential(MaskedConv2d(1, 4, 3, mask_type="A"), nn.ReLU(), nn.Conv2d(4, 1, 1))
    norm(network[place])
    message = rf"Conv2d in module '{place}' has forward hooks.*spectral_norm .* torch\.nn\.utils\.parametrizations"
    sampler = incremental_sampler(network, (1, 3, 3), output="bernoulli")
    for method in (sampler, sampler.naive):
        with pytest.raises(ValueError, match=message):
            method(1)
    assert isinstance(network[place].weight, Tensor)


def test_hooks_of_later() -> None:
    network = nn.Sequential(MaskedConv2d(1, 4, 3, mask_type="A"), nn.ReLU(), nn.Conv2d(4, 1, 1))
    sampler = incremental_sampler(network, (1, 3, 3), output="bernoulli")
    sampler(1)
    hook = network[1].register_forward_hook(lambda module, inputs, result: 3.0 * result)
    with pytest.raises(ValueError, match="ReLU in module '1' has forward hooks"):
        sampler(1)
    hook.remove()
    network.register_forward_pre_hook(lambda module, inputs: None)
    with pytest.raises(ValueError, match="Sequential in the network has forward hooks"):
        sampler(1)


def test_unsupported_module_is_named() -> None:
    inner = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4))
    network = nn.Sequential(MaskedConv2d(1, 4, 3, mask_type="A"), inner, nn.Conv2d(4, 1, 1))
    with pytest.raises(ValueError, match=r"BatchNorm2d in module '1\.1': a module of this type"):
        incremental_sampler(network, (1, 3, 3), output="bernoulli")(1)


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((1, 4, 4), {"output": "normal"}, r"output must be one of 'bernoulli', 'categorical', 'logistic_mixture'"),
        ((1, 4, 4), {"output": "bernoulli", "levels": 3}, "levels must be 2 with output 'bernoulli', got 3"),
        ((1, 4, 4), {"levels": 1}, "levels must be at least 2, got 1"),
        ((2, 4, 4), {"output": "logistic_mixture"}, r"image_shape must have 1 or 3 channels .*\(2, 4, 4\)"),
        ((1, 4, 4, 4), {}, r"image_shape must be \(C, H, W\), \(C, T\) or \(D,\), got \(1, 4, 4, 4\)"),
        ((1, 0, 4), {}, r"image_shape\[1\] must be at least 1, got 0"),
    ],
)
def test_bad_settings(shape: tuple[int, ...], settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        incremental_sampler(PixelCNN(1, 1), shape, **settings)  # type: ignore[arg-type]


def test_mixtures_know_whole_pixels() -> None:
    network = MaskedConv2d(3, 10, 3, mask_type="A")
    sampler = incremental_sampler(network, (3, 4, 4), output="logistic_mixture")
    given, red = torch.zeros(3, 4, 4, dtype=torch.int64), torch.tensor([True, False, False])
    message = "known must be the same for all channels of a pixel with output 'logistic_mixture'"
    for method in (sampler, sampler.naive):
        with pytest.raises(ValueError, match=message):
            method(2, given=given, known=red[:, None, None])
        assert method(2, given=given, known=torch.eye(4, dtype=torch.bool)).shape == (2, 3, 4, 4)


def test_outputs_that_do_not_fit() -> None:
    with pytest.raises(TypeError, match="output must be a str, got list"):
        incremental_sampler(PixelCNN(1, 1), (1, 4, 4), output=["bernoulli"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="scale must be a number, got str"):
        incremental_sampler(PixelCNN(1, 1), (1, 4, 4), scale="1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"network must be an nn\.Module, got function"):
        incremental_sampler(lambda x: x, (1, 4, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"network must return 256 outputs a pixel for 1 channels and 256 levels"):
        incremental_sampler(PixelCNN(1, 1), (1, 4, 4))(1)
    with pytest.raises(ValueError, match=r"parameters must have shape \[batch, 3 K, \.\.\.\]"):
        incremental_sampler(PixelCNN(1, 4), (1, 4, 4), output="logistic_mixture")(1)
    with pytest.raises(TypeError, match="network must return a tensor, got tuple"):
        incremental_sampler(_Pair(), (1, 4, 4))(1)
    with pytest.raises(
        ValueError, match=r"network must return \[1, outputs, 4, 5\] for x \(1, 1, 4, 5\), got \(1, 20\)"
    ):
        incremental_sampler(nn.Flatten(), (1, 4, 5))(1)


class _Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


_LEVELS = torch.zeros(2, 1, 5, 5, dtype=torch.int64)
_TRUE = torch.tensor(True)


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (TypeError, {"batch": 2.0}, "batch must be an int, got 2.0"),
        (ValueError, {"batch": -1}, "batch must be at least 0, got -1"),
        (TypeError, {"key": 3}, "key must be a NoiseKey, got int"),
        (ValueError, {"key": NoiseKey(0), "generator": torch.Generator()}, "generator draws a key"),
        (TypeError, {"generator": 3}, r"generator must be a torch\.Generator or None, got int"),
        (
            ValueError,
            {"key": NoiseKey(0, samples=torch.arange(3))},
            r"key\.samples must have 2 entries, got shape \(3,\)",
        ),
        (ValueError, {"key": NoiseKey(0, step=torch.arange(3))}, r"key\.step must have 2 entries, got shape \(3,\)"),
        (TypeError, {"condition": 3}, "condition must be a tensor or None, got int"),
        (ValueError, {"condition": torch.zeros(3, 4)}, r"condition must have shape \[2, \.\.\.\], got \(3, 4\)"),
        (ValueError, {"given": _LEVELS}, "given and known go together, got only one of them"),
        (ValueError, {"known": _TRUE}, "given and known go together, got only one of them"),
        (
            TypeError,
            {"given": _LEVELS.float(), "known": _TRUE},
            r"given must be a tensor of torch\.int64, got torch\.float32",
        ),
        (
            TypeError,
            {"given": _LEVELS, "known": _TRUE.long()},
            r"known must be a tensor of torch\.bool, got torch\.int64",
        ),
        (
            ValueError,
            {"given": _LEVELS[:, :, :4], "known": _TRUE},
            r"given must have shape \(2, 1, 5, 5\) or \(1, 5, 5\)",
        ),
        (
            ValueError,
            {"given": _LEVELS, "known": _TRUE.expand(4)},
            r"known must broadcast to \(2, 1, 5, 5\), got shape \(4,\)",
        ),
        (ValueError, {"given": _LEVELS + 2, "known": _TRUE}, r"given must be in \[0, 2\) where known, got 2"),
        (
            ValueError,
            {"condition": torch.zeros(2, 4, device="meta")},
            "condition must be on the device of network, cpu",
        ),
    ],
)
def test_bad_arguments(error: type[Exception], arguments: dict[str, object], message: str) -> None:
    sampler = incremental_sampler(GatedPixelCNN(1, 1, 4), (1, 5, 5), output="bernoulli")
    defaults: dict[str, object] = {"batch": 2, "condition": torch.zeros(2, 4)}
    for method in (sampler, sampler.naive):
        with pytest.raises(error, match=message):
            method(**(defaults | arguments))  # type: ignore[arg-type, operator]
