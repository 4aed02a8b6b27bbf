"""Edges of masked convolutions: what is refused and how, kernels that see nothing, numbers of every kind."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dgm_kernels import causal_conv1d, horizontal_conv2d, masked_conv2d, use_backend, vertical_conv2d
from dgm_kernels._core import backends as registry
from tests.masked_conv_cases import BACKENDS, NATIVE, ConvCase

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
Call = tuple[Any, type[Exception], str]


def bad_operands() -> dict[str, Call]:
    """Of every function: x, weight and bias; those of causal_conv1d with one dimension less."""
    calls: dict[str, Call] = {}
    for function, kernel in (
        (masked_conv2d, (3, 3)),
        (vertical_conv2d, (2, 3)),
        (horizontal_conv2d, (1, 2)),
        (causal_conv1d, (2,)),
    ):
        pixels = (5, 6)[: len(kernel)]
        x, weight, bias = torch.randn(2, 4, *pixels), torch.randn(6, 4, *kernel), torch.randn(6)
        shape = r"\[batch, channels, height, width\]" if len(kernel) == 2 else r"\[batch, channels, length\]"
        outputs = r"\[outputs, 4, height, width\]" if len(kernel) == 2 else r"\[outputs, 4, taps\]"

        def call(*operands: Any, function: Any = function) -> Any:
            return lambda: function(*operands, mask_type="B")

        of_x: dict[str, Call] = {
            "x no tensor": (call([1.0], weight), TypeError, "^x must be a tensor, got list"),
            "x None": (call(None, weight), TypeError, "^x must be a tensor, got NoneType"),
            "x int": (call(x.long(), weight), TypeError, "^x must be a floating-point .* got torch.int64"),
            "x bool": (call(x > 0, weight), TypeError, "^x must be a floating-point"),
            "x complex": (call(x.to(torch.complex64), weight), TypeError, "^x must be a floating-point"),
            "x float8": (call(x.to(torch.float8_e4m3fn), weight), TypeError, "^x must be a floating-point"),
            "x without batch": (call(x[0], weight), ValueError, f"^x must have shape {shape}, got"),
            "x of more dimensions": (call(x[None], weight), ValueError, f"^x must have shape {shape}, got"),
            "x scalar": (call(torch.tensor(1.0), weight), ValueError, "^x must have"),
        }
        of_weight: dict[str, Call] = {
            "weight None": (call(x, None), TypeError, "^weight must be a tensor, got NoneType"),
            "weight array": (call(x, weight.numpy()), TypeError, "^weight must be a tensor, got ndarray"),
            "weight int": (call(x, weight.long()), TypeError, "^weight must be a floating-point"),
            "weight dimensions": (call(x, weight[..., 0]), ValueError, f"^weight must have shape {outputs}"),
            "weight inputs": (call(x, weight[:, :3]), ValueError, f"^weight must have shape {outputs}, got"),
            "weight without taps": (call(x, weight[..., :0]), ValueError, f"^weight must have shape {outputs}"),
            "weight dtype": (call(x, weight.double()), TypeError, "^weight must have the dtype of x, .*float32, got"),
            "weight 16 bits": (call(x.bfloat16(), weight.half()), TypeError, "^weight must have the dtype of x"),
            "weight device": (call(x, weight.to("meta")), ValueError, "^weight must be on the device of x, cpu, got"),
        }
        of_bias: dict[str, Call] = {
            "bias number": (call(x, weight, 1.0), TypeError, "^bias must be a tensor or None, got float"),
            "bias shape": (call(x, weight, bias[:4]), ValueError, r"^bias must have shape \(6,\).*got \(4,\)"),
            "bias dimensions": (call(x, weight, bias[None]), ValueError, r"^bias must have shape .*got \(1, 6\)"),
            "bias int": (call(x, weight, bias.int()), TypeError, "^bias must be a floating-point"),
            "bias dtype": (
                call(x, weight, bias.half()),
                TypeError,
                "^bias must have the dtype of x, .*got torch.float16",
            ),
            "bias device": (call(x, weight, bias.to("meta")), ValueError, "^bias must be on the device of x"),
        }
        named = {f"{function.__name__}: {name}": bad for name, bad in (of_x | of_weight | of_bias).items()}
        calls |= named
    return calls


def bad_options() -> dict[str, Call]:
    x, line, condition = torch.randn(2, 6, 4, 5), torch.randn(2, 6, 7), torch.randn(2, 12)
    square, row = torch.randn(12, 6, 3, 3), torch.randn(12, 6, 1, 3)
    pair, steps = torch.randn(12, 6, 2, 3), torch.randn(12, 6, 2)
    masked = lambda weight=square, **options: lambda: masked_conv2d(x, weight, **{"mask_type": "B"} | options)  # noqa: E731
    vertical = lambda weight=pair, **options: lambda: vertical_conv2d(x, weight, **options)  # noqa: E731
    left = lambda weight=row, **options: lambda: horizontal_conv2d(x, weight, **options)  # noqa: E731
    causal = lambda weight=steps, **options: lambda: causal_conv1d(line, weight, **options)  # noqa: E731
    calls: dict[str, Call] = {
        "even height": (
            masked(square[:, :, :2]),
            ValueError,
            r"^weight must have a kernel of odd height, got \(2, 3\)",
        ),
        "even width": (masked(square[..., :2]), ValueError, r"^weight must have a kernel of odd width, got \(3, 2\)"),
        "even vertical": (
            vertical(pair[..., :2]),
            ValueError,
            r"^weight must have a kernel of odd width, got \(2, 2\)",
        ),
        "high row": (left(pair), ValueError, r"^weight must have a kernel of height 1, got \(2, 3\)"),
        "no mask_type": (lambda: masked_conv2d(x, square), TypeError, "mask_type"),
        "groups of inputs": (masked(channel_groups=4), ValueError, "^channel_groups must divide the inputs, 6, got 4"),
        "groups of outputs": (
            masked(square[:8], channel_groups=3),
            ValueError,
            "^channel_groups .* outputs .*8, got 3",
        ),
        "groups 0": (masked(channel_groups=0), ValueError, "^channel_groups must be at least 1, got 0"),
        "groups negative": (left(channel_groups=-1), ValueError, "^channel_groups must be at least 1, got -1"),
        "groups float": (masked(channel_groups=3.0), TypeError, "^channel_groups must be an int, got 3.0"),
        "groups bool": (masked(channel_groups=True), TypeError, "^channel_groups must be an int, got True"),
        "groups None": (left(channel_groups=None), TypeError, "^channel_groups must be an int, got None"),
        "row groups": (left(row[:8], channel_groups=3), ValueError, "^channel_groups must divide .* 8, got 3"),
        "dilation 0": (masked(dilation=0), ValueError, "^dilation must be at least 1, got 0"),
        "dilation of rows": (masked(dilation=(-1, 1)), ValueError, r"^dilation\[0\] must be at least 1, got -1"),
        "dilation of columns": (vertical(dilation=[1, 0]), ValueError, r"^dilation\[1\] must be at least 1, got 0"),
        "three dilations": (masked(dilation=(1, 1, 1)), ValueError, "^dilation must be an int or two, got"),
        "dilation float": (vertical(dilation=1.5), TypeError, "^dilation must be an int, got 1.5"),
        "dilation text": (causal(dilation="2"), TypeError, "^dilation must be an int, got '2'"),
        "row dilation 0": (left(dilation=0), ValueError, "^dilation must be at least 1, got 0"),
        "row dilations": (left(dilation=(1, 2)), TypeError, r"^dilation must be an int, got \(1, 2\)"),
        "causal dilation": (causal(dilation=-3), ValueError, "^dilation must be at least 1, got -3"),
        "causal dilations": (causal(dilation=(1, 2)), TypeError, r"^dilation must be an int, got \(1, 2\)"),
        "gated odd": (masked(square[:11], gated=True), ValueError, "^weight must .*11"),
        "gated odd causal": (causal(steps[:11], gated=True), ValueError, "^weight must .*11"),
        "gated groups": (
            masked(square[:9], gated=True, channel_groups=3),
            ValueError,
            "^(weight|channel_groups) must .*9",
        ),
        "condition number": (masked(condition=1.0), TypeError, "^condition must be a tensor or None, got float"),
        "condition batch": (masked(condition=condition[:1]), ValueError, r"^condition must have .*got \(1, 12\)"),
        "condition channels": (left(condition=condition[:, :6]), ValueError, r"^condition must have .*got \(2, 6\)"),
        "condition of the gate": (
            masked(gated=True, condition=torch.randn(2, 6, 4, 5)),
            ValueError,
            r"^condition must have shape \(2, 12\).*\(2, 12, 4, 5\), got \(2, 6, 4, 5\)",
        ),
        "condition pixels": (vertical(condition=torch.randn(2, 12, 4, 4)), ValueError, "^condition must have shape"),
        "condition int": (causal(condition=condition.long()), TypeError, "^condition must be a floating-point"),
        "condition device": (masked(condition=condition.to("meta")), ValueError, "^condition must be on the device"),
        "condition of a line": (
            causal(condition=torch.randn(2, 12, 6)),
            ValueError,
            r"^condition must have shape \(2, 12\).*\(2, 12, 7\), got \(2, 12, 6\)",
        ),
        "condition of an image": (causal(condition=torch.randn(2, 12, 1, 7)), ValueError, "^condition must have shape"),
    }
    for name, function in (("masked", masked), ("vertical", vertical), ("left", left), ("causal", causal)):
        for bad in ("a", "C", "", None, 0, True):
            message = f"^mask_type must be 'A' or 'B', got {bad!r}"
            calls[f"{name}: mask_type {bad!r}"] = (function(mask_type=bad), (ValueError, TypeError), message)
    return calls


BAD = bad_operands() | bad_options()


@on_every_backend
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, backend):
    call, error, message = BAD[name]
    with use_backend(backend), pytest.raises(error, match=message):
        call()


@on_every_backend
def test_an_error_is_the_same_under_autocast(backend):
    """The dtypes that are compared are those that autocast makes: a mix is none; integers still are."""
    x, weight = torch.randn(1, 2, 3, 3), torch.randn(2, 2, 3, 3)
    with use_backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        assert masked_conv2d(x.bfloat16(), weight, mask_type="A").dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"^weight must be a floating-point"):
            masked_conv2d(x, weight.long(), mask_type="A")
        with pytest.raises(TypeError, match=r"^weight must have the dtype of x"):
            masked_conv2d(x, weight.double(), mask_type="A")


@on_every_backend
def test_numbers_of_every_kind(backend):
    """NumPy's integers, lists and tuples."""
    x, weight = torch.randn(1, 4, 5, 6), torch.randn(6, 4, 3, 3)
    with use_backend(backend):
        expected = masked_conv2d(x, weight, mask_type="A", channel_groups=2, dilation=(2, 1))
        for two in (np.int64(2), np.int32(2), np.uint8(2)):
            for dilation in ((two, 1), [two, np.int64(1)]):
                actual = masked_conv2d(x, weight, mask_type="A", channel_groups=two, dilation=dilation)
                assert torch.equal(actual, expected)
        both = masked_conv2d(x, weight, mask_type="B", dilation=2)
        assert torch.equal(both, masked_conv2d(x, weight, mask_type="B", dilation=(2, 2)))


@on_every_backend
@pytest.mark.parametrize(
    "case",
    [
        ConvCase("raster", "A", (1, 1)),
        ConvCase("vertical", "A", (1, 5)),
        ConvCase("horizontal", "A", (1, 1)),
        ConvCase("causal", "A", (1, 1)),
    ],
    ids=str,
)
def test_a_kernel_that_sees_nothing_gives_the_bias(case, backend):
    """No sum at all, and gradients of exactly 0 for x and the weight."""
    x, weight, bias = case.make((3, 2, 5, 4, 6), grad=True)
    with use_backend(backend):
        y = case.call(x, weight, bias)
        to_x, to_weight, to_bias = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert torch.equal(y, bias.detach().view(-1, *[1] * (y.dim() - 2)).expand(y.shape))
    assert not to_x.any() and not to_weight.any()
    assert torch.equal(to_bias, torch.full_like(bias, 3 * 24.0))


@on_every_backend
def test_taps_that_are_all_beyond_the_border(backend):
    """A dilation larger than the image leaves the pixel itself."""
    x, weight = torch.randn(2, 3, 4, 5), torch.randn(6, 3, 3, 3)
    centre = weight[:, :, 1:2, 1:2].contiguous()
    with use_backend(backend):
        actual = masked_conv2d(x, weight, mask_type="B", dilation=50)
        torch.testing.assert_close(actual, masked_conv2d(x, centre, mask_type="B"))
        assert not masked_conv2d(x, weight, mask_type="A", dilation=(50, 5)).any()
        line, steps = torch.randn(2, 3, 9), torch.randn(6, 3, 2)
        actual = causal_conv1d(line, steps, dilation=9)
        torch.testing.assert_close(actual, causal_conv1d(line, steps[..., 1:]))


@on_every_backend
def test_a_nan_does_not_reach_the_pixels_before_it(backend):
    """In other samples, and wherever no tap of a kernel reads it."""
    x, weight = torch.randn(2, 3, 6, 7), torch.randn(4, 3, 3, 3)
    with use_backend(backend):
        clean = masked_conv2d(x, weight, mask_type="B")
        x[0, 1, 3, 4] = torch.nan
        y = masked_conv2d(x, weight, mask_type="B")
    near = torch.zeros(2, 4, 6, 7, dtype=torch.bool)
    near[0, :, 2:5, 3:6] = True  # the whole window: a dead tap may be multiplied by 0
    assert torch.equal(y[~near], clean[~near])
    assert bool(y[0, :, 3, 4:6].isnan().all() and y[0, :, 4, 3:6].isnan().all())


@pytest.mark.parametrize("backend", NATIVE)
def test_float64_takes_the_reference_and_says_so(backend, caplog):
    x, weight = torch.randn(1, 2, 3, 3, dtype=torch.float64), torch.randn(2, 2, 3, 3, dtype=torch.float64)
    registry._log_once.cache_clear()  # another test may have had it logged
    with caplog.at_level(logging.INFO, logger="dgm_kernels"):
        masked_conv2d(x, weight, mask_type="A")
    assert "float64" in caplog.text
    with use_backend(backend), pytest.raises(ValueError, match="float64"):
        masked_conv2d(x, weight, mask_type="A")


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_and_small_numbers_in_16_bits(dtype, backend):
    """Sums are of float32: no overflow between terms that cancel, no loss of what is small."""
    big = 200.0 if dtype == torch.float16 else 2.0**9
    x = torch.full((1, 64, 1, 1), big, dtype=dtype)
    weight = torch.full((1, 64, 1, 1), big, dtype=dtype)
    weight[:, 32:] *= -1
    x[:, -1] = 0.0
    weight[:, 0] = 0.0
    bias = torch.ones(1, dtype=dtype)
    with use_backend(backend):
        y = masked_conv2d(x, weight, bias, mask_type="B")
        ones = masked_conv2d(
            torch.full((1, 4096, 1, 1), 2.0**-9).to(dtype), torch.ones(1, 4096, 1, 1).to(dtype), mask_type="B"
        )
    assert y.item() == 1.0
    assert ones.item() == 8.0


def test_the_weight_of_a_module_is_not_copied_or_written():
    weight = torch.nn.Parameter(torch.randn(4, 2, 3, 3))
    version, pointer = weight._version, weight.data_ptr()
    for backend in BACKENDS:
        with use_backend(backend):
            y: Tensor = masked_conv2d(torch.randn(1, 2, 4, 4), weight, mask_type="A")
            y.sum().backward()
    assert (weight._version, weight.data_ptr()) == (version, pointer)
