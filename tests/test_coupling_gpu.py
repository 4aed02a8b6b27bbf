"""The Triton kernels of the coupling op on a GPU."""

import functools
import itertools

import pytest
import torch
from torch import Tensor

import dgm_kernels as dgm
from tests.contract import (
    assert_autocast_like,
    assert_bitwise_repeatable,
    assert_compiles,
    assert_inputs_unchanged,
    assert_never_waits,
    capture,
    in_every_layout,
    tensors_of,
)
from tests.coupling_cases import (
    ADDITIVE_CASES,
    AFFINE_CASES,
    LOG_PROB_CASES,
    SPLINE_CASES,
    CouplingCase,
    eager_affine,
    spline_operands,
)
from tests.coupling_op import SHAPES, SPLINE_SHAPES, affine_args, check_case, spline_args
from tests.gradients import values_and_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_triton")]
DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DGM = torch.ops.dgm
# One of each kernel, with what it has of options.
KERNELS = [AFFINE_CASES[0], AFFINE_CASES[9], ADDITIVE_CASES[0], SPLINE_CASES[0], SPLINE_CASES[1], LOG_PROB_CASES[1]]


def on_device(case: CouplingCase, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [operand.to(DEVICE) for operand in case.make(shape, dtype)]


class TestNumbers:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("case", [*AFFINE_CASES, *ADDITIVE_CASES, *LOG_PROB_CASES], ids=str)
    def test_values_and_gradients(self, case, dtype):
        for shape in filter(case.takes, [*SHAPES, (2, 7001), (8, 24, 32, 32)]):
            check_case("triton", case, shape, dtype, DEVICE)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("case", SPLINE_CASES, ids=str)
    def test_values_and_gradients_of_splines(self, case, dtype):
        for shape in SPLINE_SHAPES:
            check_case("triton", case, shape, dtype, DEVICE)

    @pytest.mark.parametrize("bins", [2, 3, 16, 33, 64])
    def test_any_number_of_bins(self, bins):
        for tails, inverse in itertools.product(("linear", None), (False, True)):
            x, *raw = spline_operands((50, 30), bins, tails, 3.0)
            call = functools.partial(dgm.rational_quadratic_spline, tails=tails, inverse=inverse)
            actual = values_and_gradients(call, [t.to(DEVICE) for t in (x, *(0.5 * p for p in raw))])
            with dgm.use_backend("reference"):
                exact = values_and_gradients(call, [t.double() for t in (x, *(0.5 * p for p in raw))])
            for a, e in zip(actual, exact, strict=True):
                torch.testing.assert_close(a.double().cpu(), e, rtol=2e-3, atol=2e-5 * float(e.abs().max()))

    @pytest.mark.parametrize("case", KERNELS, ids=str)
    def test_any_strides_and_addresses(self, case):
        """Among them addresses that are no multiples of 16 bytes."""
        operands = on_device(case, (6, 64))
        expected = values_and_gradients(case.call, operands)
        for given in in_every_layout(operands):
            with assert_inputs_unchanged(*given):
                actual = values_and_gradients(case.call, given)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    def test_calls_that_differ_in_numbers_only(self):
        """The same compiled kernel serves them; nothing of the first call may stick."""
        for batch, channels, height, width in ((2, 4, 8, 8), (3, 8, 4, 16), (5, 2, 16, 8)):
            for case in (AFFINE_CASES[8], AFFINE_CASES[12]):  # a checkerboard and a channel mask
                check_case("triton", case, (batch, channels, height, width), device=DEVICE)
        for bound, least in ((1.0, 1e-3), (3.0, 1e-2), (4.5, 5e-2)):
            options = {"bound": bound, "min_bin_width": least, "min_bin_height": least / 2, "min_derivative": least}
            operands = [t.to(DEVICE) for t in spline_operands((4, 16), 8, "linear", bound)]
            actual = dgm.rational_quadratic_spline(*operands, **options)
            with dgm.use_backend("reference"):
                exact = dgm.rational_quadratic_spline(*(t.double() for t in operands), **options)
            torch.testing.assert_close([a.double() for a in actual], list(exact), rtol=1e-4, atol=1e-4)


class TestContract:
    def test_a_nan_stays_where_it_is_and_outside_is_nan_without_tails(self):
        for inverse in (False, True):
            x, *raw = (t.to(DEVICE) for t in spline_operands((3, 5), 4, None, 3.0))
            x[1, 2], x[2, 0] = torch.nan, 3.5
            y, logdet = dgm.rational_quadratic_spline(x, *raw, tails=None, inverse=inverse)
            assert y.isnan().nonzero().tolist() == [[1, 2], [2, 0]]
            assert logdet.isnan().tolist() == [False, True, True]

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_domain_is_never_left(self, dtype):
        for bound, inverse in itertools.product((1.0, 3.3, 4.71), (False, True)):
            raw = [p.to(DEVICE, dtype) for p in spline_operands((500, 4), 7, "linear", bound)[1:]]
            end = torch.tensor(bound).to(dtype)
            end = end if float(end) <= bound else torch.nextafter(end, torch.zeros_like(end))
            x = torch.stack([-end, -end * 0.998, end * 0.998, end]).to(DEVICE, dtype).repeat(500, 1)
            y, _ = DGM.coupling_spline.triton(*spline_args(x, *raw, bound=bound, inverse=inverse))
            assert float(y.double().abs().max()) <= bound

    @pytest.mark.parametrize("case", KERNELS, ids=str)
    def test_zero_sizes(self, case):
        for shape in ((0, 4), (3, 0)):
            operands = on_device(case, shape)
            outputs = values_and_gradients(case.call, operands)
            assert [g.shape for g in outputs[-len(operands) :]] == [o.shape for o in operands]

    @pytest.mark.parametrize("case", KERNELS, ids=str)
    def test_repeatable(self, case):
        operands = on_device(case, (3, 20_002))
        assert_bitwise_repeatable(lambda: values_and_gradients(case.call, operands), runs=10)

    def test_opcheck(self):
        operands = [t.requires_grad_() for t in torch.randn(3, 2, 59, device=DEVICE)]
        torch.library.opcheck(DGM.coupling_affine.triton, affine_args(*operands))
        raw = [t.to(DEVICE).requires_grad_() for t in spline_operands((2, 9), 4, "linear", 3.0)]
        torch.library.opcheck(DGM.coupling_spline.triton, spline_args(*raw))
        z, logdet = torch.randn(2, 59, device=DEVICE), torch.randn(2, device=DEVICE)
        torch.library.opcheck(DGM.coupling_log_prob.triton, (z.requires_grad_(), logdet.requires_grad_(), True))

    @pytest.mark.parametrize("case", KERNELS, ids=str)
    def test_compiles(self, case):
        def inputs(*shape: int) -> list[Tensor]:
            return [t.requires_grad_() for t in on_device(case, shape)]

        assert_compiles(case.call, inputs(2, 58), inputs(3, 114))

    def test_autocast(self):
        operands = on_device(AFFINE_CASES[0], (3, 16), torch.bfloat16)
        assert_autocast_like(dgm.affine_coupling, eager_affine, operands, device_type=DEVICE)


class TestDevice:
    @pytest.mark.parametrize("case", KERNELS, ids=str)
    def test_a_graph_replays_with_new_values(self, case):
        """Forward and backward, of samples of several programs."""
        operands, others = on_device(case, (3, 3000)), on_device(case, (3, 3000))

        def run() -> list[Tensor]:
            leaves = [operand.detach().requires_grad_() for operand in operands]
            outputs = tensors_of(case.call(*leaves))
            used = [o for o in outputs if o.requires_grad]
            return [*outputs, *torch.autograd.grad(used, leaves, [torch.ones_like(o) for o in used])]

        graph, replayed = capture(run)
        for operand, other in zip(operands, others, strict=True):
            operand.copy_(other)
        graph.replay()
        for actual, expected in zip(replayed, run(), strict=True):
            assert torch.equal(actual, expected)

    @pytest.mark.parametrize("case", KERNELS, ids=str)
    def test_never_waits_for_the_device(self, case):
        operands = on_device(case, (3, 114))
        leaves = [operand.requires_grad_() for operand in operands]
        ones = [torch.ones(s, device=DEVICE) for s in ((3, 114), (3,))]

        def run() -> tuple[Tensor, ...]:
            outputs = tensors_of(case.call(*leaves))
            used = [o for o in outputs if o.requires_grad]
            return torch.autograd.grad(used, leaves, ones[2 - len(outputs) :][: len(used)])

        run()  # Triton compiles here
        with assert_never_waits():
            results = run()
        assert all(result.isfinite().all() for result in results)

    def test_runs_on_the_current_stream(self):
        x, shift, log_scale = torch.randn(3, 2, 1023, device=DEVICE)
        expected = dgm.affine_coupling(x, shift, log_scale)
        late = torch.zeros_like(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(50_000_000)  # cycles: on another stream the kernel would see zeros
            late.copy_(x)
            result = dgm.affine_coupling(late, shift, log_scale)
        torch.cuda.synchronize()
        assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    @pytest.mark.parametrize("case", KERNELS, ids=str)
    def test_runs_on_the_device_of_its_tensors(self, case):
        assert torch.cuda.current_device() == 0
        check_case("triton", case, (9, 16), device="cuda:1")
        assert torch.cuda.current_device() == 0

    def test_more_samples_than_a_grid_axis_holds(self):
        for elements in (1, 1030):
            x, shift, log_scale = torch.randn(3, 65536 + 7, elements, device=DEVICE)
            actual = dgm.affine_coupling(x, shift, log_scale)
            with dgm.use_backend("reference"):
                torch.testing.assert_close(actual, dgm.affine_coupling(x, shift, log_scale))

    @pytest.mark.parametrize("shape", [(1, (1 << 31) + 72), (3, (1 << 30) + 72), (3, (1 << 30) + 71)])
    def test_more_than_2_to_the_31_elements(self, shape):
        """The last 1000 elements of every sample; shift and log-scale are the same for all, and not copied."""
        if torch.cuda.mem_get_info()[0] < 10 * shape[0] * shape[1]:
            pytest.skip("needs 10 bytes an element of free memory")
        x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_()
        shift = torch.empty(shape[1], dtype=torch.bfloat16, device=DEVICE).normal_().expand(shape)
        y, _ = DGM.coupling_affine.triton(*affine_args(x, shift, shift, mask="checkerboard"))
        ends = [t[:, -1000:].float() for t in (x, shift)]
        moved = torch.arange(shape[1] - 1000, shape[1], device=DEVICE) % 2 == 1
        expected = torch.where(moved, ends[0] * ends[1].exp() + ends[1], ends[0]).to(torch.bfloat16)
        torch.testing.assert_close(y[:, -1000:], expected, rtol=2**-7, atol=0)
