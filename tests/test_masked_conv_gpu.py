"""The Triton kernels of the masked_conv op on a GPU."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import dgm_kernels as dgm
from dgm_kernels.masked_conv import reference
from tests import masked_conv_op
from tests.contract import (
    assert_autocast_like,
    assert_bitwise_repeatable,
    assert_compiles,
    assert_inputs_unchanged,
    assert_never_waits,
    capture,
    in_every_layout,
)
from tests.gradients import incoming_gradient
from tests.masked_conv_cases import CASES, EMPTY_SIZES, SIZES, SMALL_SIZE, ConvCase
from tests.masked_conv_op import Function, results

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_triton")]
DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TINY = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
DGM = torch.ops.dgm
GATED = ConvCase("raster", "B", (3, 3), groups=2, gated=True, condition="sample")
# One of each kernel, with what it has of options.
KERNELS = [ConvCase("raster", "B", (3, 3), groups=2), ConvCase("raster", "B", (1, 1)), GATED, CASES[-1]]
# Large tiles, several of outputs and of inputs, rows of pixels that are aligned, half aligned and not.
LARGE_SIZES = [(32, 64, 128, 28, 28), (90, 130, 190, 14, 14), (130, 190, 130, 7, 7), (16, 128, 256, 32, 32)]


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """float32 without tf32, whose own tests switch it on."""
    with float32_products("ieee"):
        yield


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """What cuDNN's convolutions, and ours, do with float32."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def on_device(case: ConvCase, size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [operand.to(DEVICE) for operand in case.make(size, dtype)]


def check(function: Function, eager: Function, operands: Sequence[Tensor]) -> None:
    masked_conv_op.check(function, eager, operands, TINY[operands[0].dtype])


class TestConvolution:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_values_and_gradients(self, case, dtype):
        for size in SIZES:
            check(case.call, case.call_eager, on_device(case, size, dtype))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("size", LARGE_SIZES, ids=str)
    @pytest.mark.parametrize("case", [KERNELS[0], ConvCase("raster", "A", (7, 7)), GATED], ids=str)
    def test_tiles_of_every_size(self, case, size, dtype):
        check(case.call, case.call_eager, on_device(case, size, dtype))

    @pytest.mark.parametrize("size", [*SIZES[4:8], LARGE_SIZES[1]], ids=str)
    @pytest.mark.parametrize("case", [case for case in CASES if not case.gated], ids=str)
    def test_tf32(self, case, size):
        """Each operand is off by 2^-11 of itself at most: so is each sum by 2^-10 of that of the absolute values."""
        operands = on_device(case, size)
        with float32_products("tf32"):
            actual = results(case.call, operands, torch.float32)
        exact = results(case.call_eager, operands, torch.float64)
        leaves = [t.detach().double().abs().requires_grad_() for t in operands]
        sums = case.call_eager(*leaves)
        bounds = [sums.detach(), *torch.autograd.grad(sums, leaves, incoming_gradient(sums).abs())]
        for a, e, bound in zip(actual, exact, bounds, strict=True):
            assert bool(((a.double() - e).abs() <= 1.1 * 2**-10 * bound + 1e-5).all())

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("case", CASES[::2], ids=str)
    def test_masked_weights_are_not_read(self, case, dtype):
        operands = on_device(case, (2, 9, 12, 5, 6), dtype)
        live = case.live(operands[1]).to(DEVICE)
        expected = results(case.call, operands, dtype)
        operands[1] = operands[1].where(live, torch.nan)
        actual = results(case.call, operands, dtype)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
        assert not actual[2][~live].any()

    @pytest.mark.parametrize("groups", [2, 3, 6])
    def test_groups_that_cut_tiles(self, groups):
        for channels, mask_type in itertools.product((48, 96, 192, 384), "AB"):
            case = ConvCase("raster", mask_type, (1, 3), groups=groups)
            check(case.call, case.call_eager, on_device(case, (3, channels, 432 - channels, 5, 9), torch.bfloat16))

    @pytest.mark.parametrize("case", KERNELS, ids=str)
    def test_any_strides_and_addresses(self, case):
        """Among them addresses that are no multiples of 16 bytes."""
        operands = on_device(case, SMALL_SIZE)
        expected = results(case.call, operands, torch.float32)
        for given in in_every_layout(operands):
            with assert_inputs_unchanged(*given):
                actual = results(case.call, given, torch.float32)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    def test_calls_that_differ_in_numbers_only(self):
        """The same compiled kernel serves them; nothing of the first call may stick."""
        for size in ((2, 24, 36, 8, 8), (3, 18, 48, 4, 16), (5, 30, 40, 16, 12)):
            for case in (KERNELS[0], GATED, ConvCase("raster", "B", (3, 3), dilation=(size[0], 2))):
                check(case.call, case.call_eager, on_device(case, size))


class TestPixels:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(2, 2), (1, 6, 59), (3, 4, 2, 3), (2, 2, 1100), (70, 8, 4, 4), (5, 64, 28, 28)])
    def test_gate(self, shape, dtype):
        for condition in {(), shape[:2], shape}:
            operands = [torch.randn(s).to(DEVICE, dtype) for s in (shape, condition) if s]
            check(dgm.gated_activation, lambda x, c=None: reference.gated_activation(x, c), operands)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("components", [1, 5, 10, 16, 40])
    def test_mixture(self, components, channels, dtype):
        for pixels in ((), (59,), (32, 33)):
            x = (torch.randint(0, 256, (3, channels, *pixels)) / 127.5 - 1).to(DEVICE)
            numbers = 10 if channels == 3 else 3
            parameters = torch.randn(3, numbers * components, *pixels).to(DEVICE, dtype)

            def eager(parameters: Tensor, x: Tensor = x) -> Tensor:
                work = torch.float64 if parameters.dtype == torch.float64 else torch.float32
                return reference.discretized_logistic_mixture(x.to(work), parameters.to(work), 256)

            check(lambda p, x=x: dgm.discretized_logistic_mixture(x, p), eager, [parameters])

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("shape", "dim"), [((3, 5), 1), ((2, 3, 4, 5), 1), ((2, 3, 300), 2), ((700, 256), 1), ((4, 256, 28, 28), 1)]
    )
    def test_categorical(self, shape, dim, dtype):
        logits = (3.0 * torch.randn(shape)).to(DEVICE, dtype)
        x = torch.randint(0, shape[dim], (*shape[:dim], *shape[dim + 1 :])).to(DEVICE)

        def eager(logits: Tensor) -> Tensor:
            wide = logits if logits.dtype == torch.float64 else logits.float()
            return torch.log_softmax(wide, dim).gather(dim, x.unsqueeze(dim)).squeeze(dim)

        check(lambda logits: dgm.categorical_log_prob(x, logits, dim=dim), eager, [logits])

    def test_levels_that_are_none_give_nan(self):
        logits = torch.randn(2, 20, 3, device=DEVICE, requires_grad=True)
        x = torch.tensor([[0, 20, 19], [-1, 3, 1 << 40]], device=DEVICE)
        value = dgm.categorical_log_prob(x, logits)
        bad = (x < 0) | (x >= 20)
        assert torch.equal(value.isnan(), bad)
        gradient = torch.autograd.grad(value.sum(), logits)[0]
        assert torch.equal(gradient.isnan(), bad[:, None].expand(2, 20, 3))


class TestContract:
    @pytest.mark.parametrize("size", EMPTY_SIZES)
    def test_zero_sizes(self, size):
        for case in KERNELS:
            operands = on_device(case, size)
            y, *gradients = results(case.call, operands, torch.float32)
            assert [g.shape for g in gradients] == [t.shape for t in operands]
            assert all(t.isfinite().all() for t in (y, *gradients)) and not gradients[1].any()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("case", KERNELS, ids=str)
    def test_repeatable(self, case, dtype):
        operands = on_device(case, (8, 64, 64, 29, 31), dtype)
        assert_bitwise_repeatable(lambda: results(case.call, operands, dtype), runs=10)

    def test_repeatable_distributions(self):
        x, condition = torch.randn(3, 8, 3001, device=DEVICE), torch.randn(3, 8, device=DEVICE)
        assert_bitwise_repeatable(lambda: results(dgm.gated_activation, [x, condition], torch.float32), runs=10)
        parameters = torch.randn(3, 100, 301, device=DEVICE)
        pixels = torch.zeros(3, 3, 301, device=DEVICE)
        mixture = lambda p: dgm.discretized_logistic_mixture(pixels, p)  # noqa: E731
        assert_bitwise_repeatable(lambda: results(mixture, [parameters], torch.float32), runs=10)

    def test_opcheck(self):
        shapes = ((2, 4, 5, 6), (8, 4, 3, 3), (8,), (2, 8))
        x, weight, bias, condition = (torch.randn(s, device=DEVICE, requires_grad=True) for s in shapes)
        kernel = (0, False, 2, 1, 1)
        torch.library.opcheck(DGM.masked_conv.triton, (x, weight, bias, *kernel))
        torch.library.opcheck(DGM.masked_conv_gated.triton, (x, weight, bias, condition, *kernel, True))
        torch.library.opcheck(DGM.masked_conv_gate.triton, (x.detach().flatten(2).requires_grad_(), None))
        pixels, parameters = torch.rand(2, 3, 5, device=DEVICE), torch.randn(2, 20, 5, device=DEVICE)
        torch.library.opcheck(DGM.masked_conv_mixture.triton, (pixels, parameters.requires_grad_(), 256))
        levels, logits = torch.randint(0, 7, (2, 5), device=DEVICE), torch.randn(2, 7, 5, device=DEVICE)
        torch.library.opcheck(DGM.masked_conv_categorical.triton, (levels, logits.requires_grad_()))

    @pytest.mark.parametrize("case", KERNELS[:3], ids=str)
    def test_compiles(self, case):
        def inputs(size: tuple[int, ...]) -> list[Tensor]:
            return [t.requires_grad_() for t in on_device(case, size)]

        assert_compiles(case.call, inputs((6, 2, 8, 5, 7)), inputs((10, 4, 12, 9, 11)))

    @pytest.mark.parametrize("case", KERNELS, ids=str)
    def test_autocast(self, case):
        operands = on_device(case, SMALL_SIZE)
        assert_autocast_like(case.call, case.call_eager, operands, device_type=DEVICE)


Call = tuple[Callable[..., Tensor], list[Tensor]]


def training_calls() -> list[Call]:
    """Every kernel, forward and backward, with the operands that get a gradient."""
    calls: list[Call] = [(case.call, on_device(case, (4, 16, 32, 14, 14), torch.bfloat16)) for case in KERNELS]
    pixels = torch.zeros(3, 3, 301, device=DEVICE)
    levels = torch.zeros(3, 301, dtype=torch.int64, device=DEVICE)
    calls.append((dgm.gated_activation, [torch.randn(3, 8, 3001, device=DEVICE), torch.randn(3, 8, device=DEVICE)]))
    calls.append((lambda p: DGM.masked_conv_mixture.triton(pixels, p, 256), [torch.randn(3, 100, 301, device=DEVICE)]))
    logits = [torch.randn(3, 256, 301, device=DEVICE)]
    return [*calls, (lambda t: DGM.masked_conv_categorical.triton(levels, t)[0], logits)]


class TestDevice:
    def test_a_graph_replays_with_new_values(self):
        for call, operands in training_calls():
            seed = torch.ones_like(call(*operands))

            def run(call: Any = call, operands: Any = operands, seed: Tensor = seed) -> list[Tensor]:
                leaves = [operand.detach().requires_grad_() for operand in operands]
                y = call(*leaves)
                return [y, *torch.autograd.grad(y, leaves, seed)]

            graph, replayed = capture(run)
            for operand in operands:
                operand.copy_(torch.randn_like(operand))
            graph.replay()
            for actual, expected in zip(replayed, run(), strict=True):
                assert torch.equal(actual, expected)

    def test_never_waits_for_the_device(self):
        for call, operands in training_calls():
            leaves = [operand.requires_grad_() for operand in operands]
            seed = torch.ones_like(call(*leaves))
            torch.autograd.grad(call(*leaves), leaves, seed)  # Triton compiles here
            with assert_never_waits():
                grads = torch.autograd.grad(call(*leaves), leaves, seed)
            assert all(grad.isfinite().all() for grad in grads)

    @pytest.mark.parametrize("case", KERNELS, ids=str)
    def test_runs_on_the_current_stream(self, case):
        """All of its launches: the image and the weights are brought to other layouts first."""
        operands = on_device(case, (4, 16, 32, 14, 14))
        expected = case.call(*operands)
        late = [torch.zeros_like(operand) for operand in operands]
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(50_000_000)  # cycles: on another stream the kernel would see zeros
            for to, operand in zip(late, operands, strict=True):
                to.copy_(operand)
            result = case.call(*late)
        torch.cuda.synchronize()
        assert torch.equal(result, expected)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    @pytest.mark.parametrize("case", KERNELS, ids=str)
    def test_runs_on_the_device_of_its_tensors(self, case):
        assert torch.cuda.current_device() == 0
        check(case.call, case.call_eager, [t.to("cuda:1") for t in case.make(SMALL_SIZE)])
        assert torch.cuda.current_device() == 0

    def test_more_samples_than_a_grid_axis_holds(self):
        case = ConvCase("raster", "B", (3, 3))
        check(case.call, case.call_eager, on_device(case, (65536 + 7, 2, 3, 2, 3)))
        x = torch.randn(65536 + 7, 2, 5, device=DEVICE)
        torch.testing.assert_close(dgm.gated_activation(x), reference.gated_activation(x, None))

    def test_more_than_2_to_the_31_elements(self):
        """The last rows of an image of 2^31 elements and a few, against those rows alone."""
        height, width, rows = 8200, 8192, 8
        if torch.cuda.mem_get_info()[0] < 12 * 32 * height * width:
            pytest.skip("needs 12 bytes an element of free memory")
        x = torch.empty((1, 32, height, width), dtype=torch.bfloat16, device=DEVICE).normal_()
        weight, kernel = torch.randn(32, 32, 3, 3, device=DEVICE).bfloat16() / 16, (0, False, 1, 1, 1)
        last = x[:, :, -rows:].contiguous()
        y = DGM.masked_conv.triton(x, weight, None, *kernel)
        assert torch.equal(y[:, :, 1 - rows :], DGM.masked_conv.triton(last, weight, None, *kernel)[:, :, 1:])
        grad = y.zero_()
        grad[:, :, 1 - rows :].normal_()
        expected = DGM.masked_conv_weight_grad.triton(grad[:, :, -rows:].contiguous(), last, 3, 3, *kernel)
        actual = DGM.masked_conv_weight_grad.triton(grad, x, 3, 3, *kernel)
        torch.testing.assert_close(actual, expected, rtol=2**-7, atol=1.0)  # sums of 57344 products, in other orders
        expected = DGM.masked_conv_gate.triton(last, None)
        assert torch.equal(DGM.masked_conv_gate.triton(x, None)[:, :, -rows:], expected)

    def test_more_than_2_to_the_31_parameters(self):
        """Of the last pixels, whose levels and parameters are far from the first ones."""
        pixels = (1 << 23) + 72
        if torch.cuda.mem_get_info()[0] < 5 * 260 * pixels:
            pytest.skip("needs 5 bytes a parameter of free memory")
        parameters = torch.empty((1, 260, pixels), dtype=torch.bfloat16, device=DEVICE).normal_()
        end = parameters[:, :, -100:].contiguous()
        x = torch.randint(0, 256, (1, 3, pixels), device=DEVICE) / 127.5 - 1
        actual = DGM.masked_conv_mixture.triton(x, parameters, 256)[:, -100:]
        torch.testing.assert_close(actual, DGM.masked_conv_mixture.triton(x[:, :, -100:].contiguous(), end, 256))
        levels = torch.randint(0, 260, (1, pixels), device=DEVICE)
        actual, _ = DGM.masked_conv_categorical.triton(levels, parameters)
        expected, _ = DGM.masked_conv_categorical.triton(levels[:, -100:].contiguous(), end)
        torch.testing.assert_close(actual[:, -100:], expected)
