"""The Triton kernels of the masked_conv op in Triton's interpreter, and what the compiler makes of them: no GPU."""

import itertools
import os
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import dgm_kernels as dgm
from dgm_kernels.masked_conv import reference
from dgm_kernels.masked_conv.taps import Kernel, Layout
from tests.contract import (
    assert_bitwise_repeatable,
    assert_compiles,
    assert_inputs_unchanged,
    assert_passes_interpreted,
    compiled_usage,
    in_every_layout,
)
from tests.gradients import incoming_gradient
from tests.masked_conv_cases import CASES, EMPTY_SIZES, SMALL_SIZE, ConvCase, eager_gate
from tests.masked_conv_op import check, results

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HALF = [torch.float16, torch.bfloat16]
DGM = torch.ops.dgm
# One pixel, ragged, several samples a tile of pixels, several tiles a sample, several tiles of outputs and of inputs.
SIZES = [(1, 1, 1, 1, 1), (2, 3, 5, 3, 7), (9, 2, 3, 2, 4), (1, 3, 2, 9, 11), (1, 5, 70, 2, 3), (1, 70, 6, 3, 2)]
MIXTURES = [((3, 1), 1), ((2, 3, 5), 4), ((2, 3, 2, 3), 10), ((2, 1, 4, 8), 5), ((1, 3, 2), 40)]
CATEGORICAL = [((3, 5), 1), ((2, 3, 4, 5), 1), ((2, 70, 9), 1), ((2, 3, 300), 2), ((7, 256), 1), ((2, 1, 3), 1)]


@pytest.fixture
def scalar_bounds(monkeypatch) -> None:
    """Loops of a length that only the call knows: Triton before 3.8 makes it of an array, which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def with_index(tensor: type, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", with_index)


def settings(case: ConvCase) -> tuple[int, bool, int, int, int]:
    """What the ops take in place of a mask."""
    layout = {"raster": Layout.RASTER, "vertical": Layout.VERTICAL}.get(case.kind, Layout.HORIZONTAL)
    return int(layout), case.mask_type == "A", case.groups, *case.dilation


def plain(operands: Sequence[Tensor]) -> list[Tensor]:
    """Operands of the ops, a sequence as one row."""
    return [t.unsqueeze(2) if t.dim() == 3 else t for t in operands]


@pytest.mark.usefixtures("scalar_bounds")
class TestInterpreted:
    """Collected only where TRITON_INTERPRET=1, which Triton reads when a kernel is defined."""

    __test__ = INTERPRETED

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_values_and_gradients(self, case):
        for size in SIZES if case in CASES[::7] else SIZES[1:3]:
            check(case.call, case.call_eager, case.make(size))

    @pytest.mark.parametrize("case", CASES[::3], ids=str)
    def test_values_and_gradients_in_half_precision(self, case):
        """Not in bfloat16, which NumPy has no products of."""
        check(case.call, case.call_eager, case.make(SIZES[1], torch.float16), 0.5 * 2**-10)

    @pytest.mark.parametrize("case", CASES[::2], ids=str)
    def test_masked_weights_are_not_read(self, case):
        operands = case.make(SMALL_SIZE)
        live = case.live(operands[1])
        with dgm.use_backend("triton"):
            expected = results(case.call, operands, torch.float32)
            operands[1] = operands[1].where(live, torch.nan)
            actual = results(case.call, operands, torch.float32)
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a, e)
        assert not actual[2][~live].any()

    def test_the_large_tile(self, monkeypatch):
        """Which the sizes of these tests do not reach."""
        from dgm_kernels.masked_conv import triton as launchers

        monkeypatch.setattr(launchers, "_conv_tile", lambda *args: launchers._Tile(128, 128, 32, 3))
        for case in (ConvCase("raster", "B", (3, 3), groups=3), ConvCase("raster", "A", (3, 1), gated=True)):
            for size in ((2, 3, 6, 9, 11), (1, 66, 150, 4, 4)):
                check(case.call, case.call_eager, case.make(size))

    @pytest.mark.parametrize("groups", [2, 3, 6])
    def test_groups_that_cut_tiles(self, groups):
        """Groups whose borders are inside tiles of channels, which are partly alive then, and at their ends."""
        for channels, mask_type in itertools.product((48, 96), "AB"):
            case = ConvCase("raster", mask_type, (1, 3), groups=groups)
            check(case.call, case.call_eager, case.make((1, channels, 144 - channels, 1, 3)))

    @pytest.mark.parametrize("backward", [False, True])
    def test_dead_blocks_of_channels_are_not_read(self, backward):
        """A NaN in a channel that no output of the tile sees stays out: the tile does not go there."""
        case, channels = ConvCase("raster", "B", (1, 1), groups=2), 256
        x, weight, _ = case.make((1, channels, channels, 2, 2))
        x[:, : channels // 2 if backward else 0] = torch.nan
        x[:, 0 if backward else channels // 2 :] = torch.nan
        if backward:
            x[:, channels // 2 :] = torch.randn(1, channels // 2, 2, 2)
            y = DGM.masked_conv_input_grad.triton(x, weight, *settings(case))
            assert y[:, channels // 2 :].isfinite().all() and y[:, : channels // 2].isnan().all()
        else:
            y = DGM.masked_conv.triton(x, weight, None, *settings(case))
            assert y[:, : channels // 2].isfinite().all() and y[:, channels // 2 :].isnan().all()

    def test_a_nan_does_not_reach_the_pixels_before_it(self):
        x, weight = torch.randn(2, 3, 4, 5), torch.randn(4, 3, 3, 3)
        x[0, :, 2, 2] = torch.nan
        y = DGM.masked_conv.triton(x, weight, None, 0, False, 1, 1, 1).isnan()[:, 0]
        assert not y[1].any() and not y[0].view(-1)[: 2 * 5 + 2].any() and y[0, 2, 2]

    def test_a_gradient_of_three_splits(self, monkeypatch):
        """Of thirteen tiles of pixels, thirteen and twelve."""
        from dgm_kernels.masked_conv import triton as launchers

        monkeypatch.setattr(launchers, "_PROGRAMS", 9)
        x, weight = torch.randn(1, 2, 9, 67), torch.randn(3, 2, 1, 3)
        case = ConvCase("horizontal", "B", (1, 3), bias=False)
        check(case.call, case.call_eager, [x, weight], tiny=1e-5)

    @pytest.mark.parametrize("step", [(1, 1), (2, 3), (1 << 30, 5), (3, 1 << 30)])
    def test_any_dilation(self, step):
        kernel = Kernel(Layout.RASTER, False, 1, 3, 3, tuple(min(s, 100) for s in step))
        x, weight = torch.randn(1, 2, 5, 7), torch.randn(3, 2, 3, 3)
        expected = reference.masked_conv(x, weight, None, kernel)
        torch.testing.assert_close(DGM.masked_conv.triton(x, weight, None, 0, False, 1, *step), expected)

    def test_rounds_to_tf32(self, monkeypatch):
        """To nearest, 10 bits; the interpreter's products are exact, so only the operands are rounded."""
        from dgm_kernels.masked_conv import triton as launchers

        monkeypatch.setattr(launchers, "_is_tf32", lambda x: True)
        x, weight, grad = (torch.randn(s) for s in ((1, 4, 4, 4), (4, 4, 3, 3), (1, 4, 4, 4)))
        x[0, 0, 0, 0], x[0, 1, 3, 3] = torch.inf, torch.nan
        kernel = (0, False, 1, 1, 1)
        rounded = []
        for tensor in (x, weight, grad):
            fraction, exponent = torch.frexp(tensor.double())
            rounded.append(torch.ldexp((fraction * 2**11).round() / 2**11, exponent).where(tensor.isfinite(), tensor))
        specification = Kernel(Layout.RASTER, False, 1, 3, 3, (1, 1))
        for given, of in ((x, rounded[0]), (grad, rounded[2])):
            actual = DGM.masked_conv.triton(given, weight, None, *kernel)
            seen = reference.masked_conv(of.nan_to_num(1e3, 1e3), rounded[1], None, specification).float()
            touched = reference.masked_conv(
                (~of.isfinite()).double(), torch.ones(4, 4, 3, 3).double(), None, specification
            )
            assert not actual[touched > 0].isfinite().any()
            torch.testing.assert_close(actual[touched == 0], seen[touched == 0], rtol=1e-6, atol=1e-6)
        x = grad.flip(0, 1)
        fraction, exponent = torch.frexp(x.double())
        exact = torch.ldexp((fraction * 2**11).round() / 2**11, exponent).requires_grad_(False)
        leaf = weight.double().requires_grad_()
        expected = torch.autograd.grad(reference.masked_conv(exact, leaf, None, specification), leaf, rounded[2])[0]
        actual = DGM.masked_conv_weight_grad.triton(grad, x, 3, 3, *kernel)
        torch.testing.assert_close(actual, expected.float(), rtol=1e-6, atol=1e-5)

    @pytest.mark.parametrize("keep", [False, True])
    @pytest.mark.parametrize("case", [case for case in CASES if case.gated], ids=str)
    def test_the_gate_in_the_kernel(self, case, keep):
        """With what the backward pass needs, or without, which it computes again then."""
        x, weight, *others = plain(case.make(SMALL_SIZE))
        given = dict(zip(case.names[2:], others, strict=True))
        if (condition := given.get("condition")) is not None and case.condition != "map":
            given["condition"] = condition.flatten(1)
        operands = [t.requires_grad_() for t in (x, weight, *given.values())]

        def fused(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            named = dict(zip(given, tensors[2:], strict=True))
            options = (named.get("bias"), named.get("condition"), *settings(case), keep)
            return DGM.masked_conv_gated.triton(*tensors[:2], *options)

        out, before = fused(*operands)
        with dgm.use_backend("reference"):
            expected = case.call(*(t.squeeze(2) if case.kind == "causal" and t.dim() == 4 else t for t in operands))
            y = DGM.masked_conv.triton(x, weight, given.get("bias"), *settings(case))
        torch.testing.assert_close(out, expected.view(out.shape))
        assert torch.equal(before, y) if keep else before.numel() == 0
        actual = torch.autograd.grad(out, operands, incoming_gradient(out))
        wanted = torch.autograd.grad(expected, operands, incoming_gradient(out).view(expected.shape))
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)

    def test_a_wider_condition_takes_two_kernels(self):
        case = ConvCase("raster", "B", (3, 3), gated=True, condition="sample")
        operands = case.make(SMALL_SIZE, torch.float16)
        operands[-1] = operands[-1].float()
        with dgm.use_backend("triton"):
            y = case.call(*operands)
        assert y.dtype == torch.float32
        exact = case.call_eager(*(t.double() for t in operands))
        torch.testing.assert_close(y.double(), exact, rtol=2e-3, atol=2e-3)

    def test_second_derivatives(self):
        for case in (CASES[0], ConvCase("raster", "B", (3, 3), groups=2, gated=True, condition="sample")):
            operands = case.make((1, 2, 4, 2, 3))
            found = []
            for backend in ("triton", "reference"):
                with dgm.use_backend(backend):
                    leaves = [t.clone().requires_grad_() for t in operands]
                    y = case.call(*leaves)
                    first = torch.autograd.grad(y, leaves, incoming_gradient(y), create_graph=True)
                    found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves, allow_unused=True))
            torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float32, *HALF])
    @pytest.mark.parametrize("shape", [(2, 2), (1, 6, 59), (3, 4, 2, 3), (2, 2, 1100), (70, 8, 4, 4)])
    def test_gate(self, shape, dtype):
        """Without a condition, with one a sample, and with one an element."""
        for condition in {(), shape[:2], shape}:
            operands = [torch.randn(s).to(dtype) for s in (shape, condition) if s]
            # The interpreter truncates what it stores in bfloat16.
            tiny = {torch.float32: 1e-6, torch.float16: 0.5 * 2**-10, torch.bfloat16: 2**-7}[dtype]
            check(dgm.gated_activation, lambda x, c=None: reference.gated_activation(x, c), operands, tiny)

    @pytest.mark.parametrize(("shape", "components"), MIXTURES)
    def test_mixture(self, shape, components):
        check_mixture(torch.randint(0, 256, shape) / 127.5 - 1, torch.randn(parameter_shape(shape, components)))

    @pytest.mark.parametrize("dtype", HALF)
    def test_mixture_in_16_bits(self, dtype):
        parameters = torch.randn(2, 100, 5).to(dtype)
        check_mixture((torch.randint(0, 256, (2, 3, 5)) / 127.5 - 1).to(dtype), parameters, tiny=0.01)

    @pytest.mark.parametrize("levels", [2, 5, 256, 65536])
    def test_mixture_of_narrow_and_wide_components(self, levels):
        """Log-scales from the least one, whose gradient below it is 0, to those that are wider than the range."""
        x = torch.randint(0, levels, (2, 3, 30)) * (2.0 / (levels - 1)) - 1.0
        x[0], x[1, :, ::2] = 1.0, -1.0
        parameters = torch.randn(2, 40, 30)
        for channel in range(3):
            parameters[:, 4 + 12 * channel + 4 : 4 + 12 * channel + 8] *= 6.0
        check_mixture(x, parameters, levels, tiny=2e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, *HALF])
    @pytest.mark.parametrize(("shape", "dim"), CATEGORICAL)
    def test_categorical(self, shape, dim, dtype):
        logits = (3.0 * torch.randn(shape)).to(dtype)
        x = torch.randint(0, shape[dim], (*shape[:dim], *shape[dim + 1 :]))
        tiny = {torch.float32: 1e-6, torch.float16: 0.5 * 2**-10, torch.bfloat16: 2**-7}[dtype]

        def eager(logits: Tensor) -> Tensor:
            wide = logits if logits.dtype == torch.float64 else logits.float()
            return torch.log_softmax(wide, dim).gather(dim, x.unsqueeze(dim)).squeeze(dim)

        check(lambda logits: dgm.categorical_log_prob(x, logits, dim=dim), eager, [logits], tiny)

    def test_levels_that_are_none_give_nan(self):
        logits = torch.randn(2, 20, 3, requires_grad=True)
        x = torch.tensor([[0, 20, 19], [-1, 3, 1 << 40]])
        value, normaliser = DGM.masked_conv_categorical.triton(x, logits)
        bad = (x < 0) | (x >= 20)
        assert torch.equal(value.isnan(), bad)
        torch.testing.assert_close(normaliser, logits.logsumexp(1))
        gradient = torch.autograd.grad(value.sum(), logits)[0]
        assert torch.equal(gradient.isnan(), bad[:, None].expand(2, 20, 3))

    def test_levels_that_cannot_be(self):
        """Logits of minus infinity, among them a whole tile of levels before the first finite one."""
        for shape, dim in (((2, 40, 3), 1), ((3, 600), 1)):
            logits = torch.randn(shape)
            logits[:, :-3] = -torch.inf
            x = torch.full((*shape[:dim], *shape[dim + 1 :]), shape[dim] - 2)
            with dgm.use_backend("triton"):
                value, gradient = results(lambda t, x=x: dgm.categorical_log_prob(x, t), [logits], torch.float32)
            assert not gradient[:, :-3].any() and gradient.isfinite().all()
            index = x.unsqueeze(1)
            torch.testing.assert_close(value, logits.log_softmax(1).gather(1, index).squeeze(1))

    @pytest.mark.parametrize("case", [ConvCase("horizontal", "B", (1, 2), gated=True, condition="sample")], ids=str)
    def test_any_strides_and_unchanged_inputs(self, case):
        operands = case.make(SMALL_SIZE)
        with dgm.use_backend("triton"):
            expected = results(case.call, operands, torch.float32)
            for given in in_every_layout(operands):
                with assert_inputs_unchanged(*given):
                    actual = results(case.call, given, torch.float32)
                assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))

    @pytest.mark.parametrize("size", EMPTY_SIZES)
    def test_zero_sizes(self, size):
        for case in (CASES[0], ConvCase("raster", "B", (3, 3), groups=2, gated=True, condition="sample")):
            operands = case.make(size)
            with dgm.use_backend("triton"):
                y, *gradients = results(case.call, operands, torch.float32)
            batch, inputs, outputs, *pixels = case.fit(size)
            assert y.shape == (batch, outputs // 2 if case.gated else outputs, *pixels)
            assert [g.shape for g in gradients] == [t.shape for t in operands]
            assert all(t.isfinite().all() for t in (y, *gradients)) and not gradients[1].any()
            if inputs == 0:  # nothing but the bias and the condition
                sums = operands[2] if not case.gated else operands[2] + operands[3]
                expected = sums.view(-1, outputs, 1, 1).expand(batch, outputs, *pixels)
                torch.testing.assert_close(y, eager_gate(expected, case.groups) if case.gated else expected)

    def test_zero_sizes_of_the_distributions(self):
        with dgm.use_backend("triton"):
            for shape in ((0, 2, 3), (2, 4, 0), (0, 4)):
                x = torch.empty(shape)
                assert dgm.gated_activation(x).shape == (shape[0], shape[1] // 2, *shape[2:])
                condition = torch.randn(shape[:2])
                _, *grads = results(dgm.gated_activation, [x, condition], torch.float32)
                assert not grads[1].any() and grads[1].shape == shape[:2]
                levels = torch.empty((shape[0], *shape[2:]), dtype=torch.int64)
                assert dgm.categorical_log_prob(levels, x).shape == levels.shape
                value = dgm.discretized_logistic_mixture(
                    torch.empty(shape[0], 1, *shape[2:]), x.new_empty(shape[0], 6, *shape[2:])
                )
                assert value.shape == levels.shape

    def test_compiles(self):
        """Once for two sizes, without a break; the formulas run as they are."""
        case = ConvCase("raster", "B", (3, 3), groups=2, gated=True, condition="sample")
        small, large = (case.make(size, grad=True) for size in ((6, 2, 8, 5, 7), (10, 4, 12, 9, 11)))
        with dgm.use_backend("triton"):
            assert_compiles(case.call, small, large, backend="aot_eager")

    def test_repeatable(self):
        case = ConvCase("raster", "B", (3, 3), groups=2, gated=True, condition="sample")
        operands = case.make((2, 4, 4, 9, 9))
        with dgm.use_backend("triton"):
            assert_bitwise_repeatable(lambda: results(case.call, operands, torch.float32))

    def test_more_rows_than_a_grid_axis_holds(self):
        x = torch.randn(65536 + 7, 2, 1)
        expected = reference.gated_activation(x, None)
        torch.testing.assert_close(DGM.masked_conv_gate.triton(x, None), expected, rtol=1e-5, atol=1e-6)

    def test_refuses_what_it_cannot_compute(self):
        x = torch.randn(1).expand(1, 1, 1, (1 << 30) + 1)
        with pytest.raises(ValueError, match="at most 1073741824 pixels"):
            DGM.masked_conv_gate.triton(x.expand(1, 2, 1, -1), None)
        with pytest.raises(ValueError, match="groups must divide the 3 channels of the result, got 6"):
            DGM.masked_conv_gated.triton(
                torch.randn(1, 6, 2, 2), torch.randn(6, 6, 1, 1), None, None, 0, False, 6, 1, 1, False
            )

    @pytest.mark.parametrize("case", [CASES[0], CASES[8]], ids=str)
    def test_opcheck_conv(self, case):
        x, weight, bias = (t.requires_grad_() for t in case.make((1, 3, 3, 2, 3)))
        torch.library.opcheck(DGM.masked_conv.triton, (x, weight, bias, *settings(case)))
        grad = torch.randn(1, weight.shape[0], 2, 3)
        torch.library.opcheck(DGM.masked_conv_input_grad.triton, (grad, weight.detach(), *settings(case)))
        sizes = weight.shape[2:]
        torch.library.opcheck(DGM.masked_conv_weight_grad.triton, (grad, x.detach(), *sizes, *settings(case)))

    @pytest.mark.parametrize("keep", [False, True])
    @pytest.mark.parametrize("per_sample", [False, True])
    def test_opcheck_gated(self, keep, per_sample):
        condition = torch.randn(2, 4) if per_sample else torch.randn(2, 4, 2, 3)
        tensors = (torch.randn(2, 2, 2, 3), torch.randn(4, 2, 3, 3), torch.randn(4), condition)
        operands = [t.requires_grad_() for t in tensors]
        torch.library.opcheck(DGM.masked_conv_gated.triton, (*operands, 0, False, 2, 1, 1, keep))

    def test_opcheck_of_the_distributions(self):
        x, condition = (torch.randn(s, requires_grad=True) for s in ((2, 4, 3), (2, 4)))
        torch.library.opcheck(DGM.masked_conv_gate.triton, (x, condition))
        torch.library.opcheck(DGM.masked_conv_gate.triton, (x, None))
        parameters = torch.randn(2, 20, 3, requires_grad=True)
        torch.library.opcheck(DGM.masked_conv_mixture.triton, (torch.rand(2, 3, 3), parameters, 256))
        logits = torch.randn(2, 5, 3, requires_grad=True)
        torch.library.opcheck(DGM.masked_conv_categorical.triton, (torch.randint(0, 5, (2, 3)), logits))


def parameter_shape(shape: tuple[int, ...], components: int) -> tuple[int, ...]:
    return (shape[0], (10 if shape[1] == 3 else 3) * components, *shape[2:])


def check_mixture(x: Tensor, parameters: Tensor, levels: int = 256, tiny: float = 1e-6) -> None:
    """In float32 throughout, whatever the dtype, so eager is too."""

    def eager(parameters: Tensor) -> Tensor:
        work = torch.float64 if parameters.dtype == torch.float64 else torch.float32
        return reference.discretized_logistic_mixture(x.to(work), parameters.to(work), levels)

    check(lambda p: dgm.discretized_logistic_mixture(x, p, levels=levels), eager, [parameters], tiny)


class TestNotInterpreted:
    __test__ = not INTERPRETED

    def test_in_the_interpreter(self):
        """Runs the tests above in a process of their own: Triton interprets all kernels of a process or none."""
        assert_passes_interpreted(__file__)

    def test_live_taps_come_first_in_raster_order(self):
        """The kernels count on it: tap t is at row t // width and column t % width."""
        layouts = {
            Layout.RASTER: ((1, 1), (3, 5), (7, 3)),
            Layout.VERTICAL: ((2, 3), (1, 1)),
            Layout.HORIZONTAL: ((1, 4),),
        }
        for layout, strict, groups in itertools.product(layouts, (False, True), (1, 3)):
            for height, width in layouts[layout]:
                kernel = Kernel(layout, strict, groups, height, width, (2, 3))
                taps = [(tap.row, tap.column) for tap in kernel.taps()]
                assert taps == [divmod(t, width) for t in range(len(taps))]
                assert all(tap.rule == 1 for tap in kernel.taps()[:-1])

    @pytest.mark.parametrize(
        ("name", "registers", "shared", "stores"),
        [
            ("conv_bf16", 128, 73728, 8),
            ("conv_large_bf16", 232, 98304, 16),
            ("conv_gated_kept_bf16", 224, 73728, 12),
            ("conv_tf32", 128, 73728, 16),
            ("weight_grad_bf16", 224, 65536, 0),
            ("mixture_backward_16x3_fp32", 96, 256, 0),
        ],
    )
    def test_nothing_spills_and_two_programs_fit(self, name, registers, shared, stores):
        """A multiprocessor of sm_90 has 65536 registers, 256 a thread of two programs, and 227 KB of shared memory."""
        from dgm_kernels.masked_conv.triton import aot_specs

        usage = compiled_usage(aot_specs(), name)
        assert (usage.spill_bytes, usage.stack_bytes) == (0, 0)
        assert usage.registers <= registers and usage.shared_bytes <= shared and usage.wide_stores == stores
