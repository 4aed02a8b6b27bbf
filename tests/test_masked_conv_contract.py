"""The rest of the contract of masked convolutions: layouts, threads, compilation, autocast, transforms."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dgm_kernels import masked_conv2d, use_backend
from dgm_kernels.masked_conv import op
from dgm_kernels.masked_conv.taps import Layout
from tests.contract import (
    assert_autocast_like,
    assert_bitwise_repeatable,
    assert_compiles,
    assert_functional_transforms,
    assert_inputs_unchanged,
    assert_instruction_sets_agree,
    assert_threads_agree,
    assert_vmap,
    assert_vmap_of_one,
    expanded_and_dense,
    in_every_layout,
    stacked,
    sum_of_sines,
    tangents_of,
)
from tests.gradients import with_grads
from tests.masked_conv_cases import BACKENDS, CASES, NATIVE, SIZES, SMALL_SIZE, ConvCase

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_case = pytest.mark.parametrize("case", CASES, ids=str)

# One of each kind: plain, with everything, without a bias, in one dimension.
SOME_CASES = (
    ConvCase("raster", "A", (5, 3)),
    ConvCase("raster", "B", (3, 3), groups=2, dilation=(2, 1), gated=True, condition="sample"),
    ConvCase("vertical", "B", (2, 3), bias=False, gated=True, condition="map"),
    ConvCase("horizontal", "A", (1, 3), groups=2),
    ConvCase("causal", "B", (1, 2), dilation=(1, 2), gated=True),
)
some_cases = pytest.mark.parametrize("case", SOME_CASES, ids=str)


def opcheck_cases() -> list[Any]:
    x, grad = torch.randn(2, 4, 5, 6), torch.randn(2, 6, 5, 6)
    weight, bias, row = torch.randn(6, 4, 3, 5), torch.randn(6), torch.randn(6, 4, 1, 3)
    leaves = lambda *tensors: [tensor.clone().requires_grad_() for tensor in tensors]  # noqa: E731
    raster, groups = (int(Layout.RASTER), False, 1, 1, 1), (int(Layout.RASTER), True, 2, 2, 1)
    left = (int(Layout.HORIZONTAL), False, 2, 1, 3)
    vertical = (int(Layout.VERTICAL), True, 1, 1, 1)
    return [
        (op.conv, (x, weight, bias, *raster)),
        (op.conv, (*leaves(x, weight, bias), *groups)),
        (op.conv, (*leaves(x.bfloat16(), weight.bfloat16()), None, *vertical)),
        (op.conv, (*leaves(x, row, bias), *left)),
        (op.input_grad, (grad, weight, *groups)),
        (op.input_grad, (grad.half(), row.half(), *left)),
        (op.weight_grad, (grad, x, 3, 5, *vertical)),
        (op.weight_grad, (grad.bfloat16(), x.bfloat16(), 1, 3, *left)),
    ]


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("index", range(8))
def test_opcheck(backend, index):
    overloads, args = opcheck_cases()[index]
    torch.library.opcheck(overloads[backend], args)


@on_every_backend
@every_case
def test_strides_and_offsets(case, backend):
    """Every operand in every layout: the result and the gradients of contiguous operands."""
    operands = case.make((2, 3, 4, 3, 5))
    with use_backend(backend):
        expected = with_grads(case.call, operands)
        for given in in_every_layout(operands):
            # PyTorch's convolutions and sums take another way for other layouts.
            torch.testing.assert_close(with_grads(case.call, given), expected, rtol=2e-5, atol=2e-5)


@on_every_backend
@some_cases
def test_expanded_operands(case, backend):
    """One sample, channel, pixel or tap for all, without a copy of it in memory."""
    operands = case.make(SMALL_SIZE)
    with use_backend(backend):
        for wide, dense in expanded_and_dense(operands):
            actual, expected = with_grads(case.call, wide), with_grads(case.call, dense)
            torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_case
def test_inputs_unchanged_and_repeatable(case, dtype, backend):
    for size in (SIZES[3], SIZES[6]):
        operands = case.make(size, dtype)
        with use_backend(backend):
            with assert_inputs_unchanged(*operands):
                with_grads(case.call, operands)
            assert_bitwise_repeatable(lambda operands=operands: with_grads(case.call, operands))


@pytest.mark.parametrize("backend", NATIVE)
@some_cases
def test_the_number_of_threads_changes_no_bit(case, backend, thread_counts):
    """Many samples, few of many channels, one of many pixels: however the work is cut."""
    for size in ((17, 4, 6, 5, 6), (2, 34, 66, 9, 7), (1, 2, 4, 61, 67)):
        operands = case.make(size)
        with use_backend(backend):
            assert_threads_agree(lambda operands=operands: with_grads(case.call, operands), thread_counts)


@on_every_backend
@some_cases
def test_samples_do_not_depend_on_their_batch(case, backend):
    operands = case.make((5, 3, 6, 4, 7))
    alone = [t[2:3] if name in ("x", "condition") else t for name, t in zip(case.names, operands, strict=True)]
    with use_backend(backend):
        torch.testing.assert_close(case.call(*alone), case.call(*operands)[2:3], rtol=1e-5, atol=1e-6)


# No two sizes of a call are equal: torch.compile would expect them to stay so.
SMALL, LARGE = (6, 4, 8, 9, 11), (10, 12, 16, 13, 17)


@on_every_backend
@some_cases
def test_compiles_once_for_two_sizes(case, backend):
    """Another batch, image and other channels, forward and backward."""
    with use_backend(backend):
        args = [case.make(size, grad=True) for size in (SMALL, LARGE)]
        assert_compiles(case.call, *args, backend="aot_eager")


@pytest.mark.parametrize("backend", NATIVE)
def test_compiles_with_inductor(backend):
    """With what surrounds it in one graph; few elements, for from 4096 on Inductor compiles its own sums again."""
    case, sizes = SOME_CASES[3], ((5, 4, 8, 6, 7), (10, 4, 8, 9, 11))
    with use_backend(backend):
        args = [case.make(size, grad=True) for size in sizes]
        assert_compiles(lambda x, *rest: torch.tanh(case.call(F.relu(x), *rest)), *args)


@on_every_backend
def test_autocast_in_compiled_code(backend):
    case = SOME_CASES[3]

    def run(*operands: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return case.call(*operands).float()

    with use_backend(backend):
        args = [case.make(size, grad=True) for size in (SMALL, LARGE)]
        assert_compiles(run, *args, backend="aot_eager")


@on_every_backend
@every_case
def test_autocast_like_conv2d(case, backend):
    """16 bits out of float32; a float32 condition promotes, as it does eager; float64 is left alone.

    Of a gate not float16: eager rounds tanh, sigmoid and their product, which is more than the tolerance of the dtype.
    """
    operands = case.make(SMALL_SIZE)
    with use_backend(backend):
        for dtype in (torch.bfloat16, *[torch.float16] * (not case.gated)):
            assert_autocast_like(case.call, case.call_eager, operands, dtype)
            mixed = [operands[0].to(dtype), *operands[1:]]
            assert_autocast_like(case.call, case.call_eager, mixed, dtype)
    assert_autocast_like(case.call, case.call_eager, [operand.double() for operand in operands])


@on_every_backend
@some_cases
def test_gradients_under_autocast(case, backend):
    """In the dtype of each operand; as far off as 16 bits are."""

    def grads(function: Any) -> tuple[Tensor, ...]:
        leaves = [operand.clone().requires_grad_() for operand in operands]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = function(*leaves)
        return torch.autograd.grad(y.float().square().sum(), leaves)

    operands = case.make(SMALL_SIZE)
    with use_backend(backend):
        actual = grads(case.call)
    for ours, eager in zip(actual, grads(case.call_eager), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, eager, rtol=3e-2, atol=3e-2 * float(eager.abs().max()))


@every_case
def test_vmap(case):
    """Over an added dimension of every operand; over that of the weights alone, as an ensemble does; of x alone."""
    operands = stacked(lambda: case.make((2, 3, 4, 3, 4)))
    assert_vmap(case.call, operands)
    for mapped in (0, 1):
        assert_vmap_of_one(case.call, operands, mapped)


@some_cases
def test_functional_transforms(case):
    """torch.func's gradient, directional derivative and per-sample gradients are those of autograd."""
    operands = case.make((2, 3, 4, 3, 4), torch.float64)
    expected = assert_functional_transforms(case.call, operands)
    per_sample = [name in ("x", "condition") for name in case.names]

    def of_one_sample(*one: Tensor) -> Tensor:
        return sum_of_sines(case.call(*(t[None] if p else t for t, p in zip(one, per_sample, strict=True))))

    dims = tuple(0 if p else None for p in per_sample)
    each = torch.func.vmap(torch.func.grad(of_one_sample, 1), in_dims=dims)(*operands)
    torch.testing.assert_close(each.sum(0), expected[1])


@every_case
def test_forward_mode_in_float32(case):
    """Dual numbers take the reference by themselves."""
    actual, expected = tangents_of(case.call, case.call_eager, case.make((2, 3, 4, 3, 4)))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_what_takes_no_gradient_records_none():
    operands = SOME_CASES[1].make(SMALL_SIZE, grad=True)
    for backend in BACKENDS:
        with use_backend(backend), torch.no_grad():
            assert not SOME_CASES[1].call(*operands).requires_grad
        with use_backend(backend), torch.inference_mode():
            torch.testing.assert_close(SOME_CASES[1].call(*operands), SOME_CASES[1].call_eager(*operands))


def test_meta_tensors_give_shapes():
    """Without values: for models built on the meta device."""
    for case in CASES:
        operands = [operand.to("meta") for operand in case.make(SMALL_SIZE)]
        y = case.call(*operands)
        assert y.device.type == "meta" and y.shape == case.call_eager(*case.make(SMALL_SIZE)).shape


ISA_SCRIPT = """
from tests.masked_conv_cases import CASES, SIZES
outputs = []
for case in CASES[::2]:
    for dtype in (torch.float32, torch.bfloat16):
        leaves = case.make(SIZES[4], dtype, grad=True)
        y = case.call(*leaves)
        y.float().square().sum().backward()
        outputs.append([y.detach()] + [leaf.grad for leaf in leaves])
"""


@pytest.mark.parametrize("backend", NATIVE)
def test_instruction_sets_agree(backend, tmp_path):
    assert_instruction_sets_agree(ISA_SCRIPT, tmp_path, float32=1e-5, others=2e-2)


@on_every_backend
def test_an_unusual_image_is_not_cut_short(backend):
    """Thousands of samples, columns or rows: more than any tile of a kernel."""
    weight, bias = torch.randn(2, 1, 3, 3), torch.randn(2)
    for shape in ((3000, 1, 2, 2), (1, 1, 2, 5000), (1, 1, 5000, 2)):
        x = torch.randn(shape)
        with use_backend(backend):
            actual = masked_conv2d(x, weight, bias, mask_type="A")
        expected = ConvCase("raster", "A", (3, 3)).call_eager(x.double(), weight.double(), bias.double())
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
