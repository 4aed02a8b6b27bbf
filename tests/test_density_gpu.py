"""The Triton kernels of the density op on a GPU."""

import functools

import pytest
import torch
from torch import Tensor

import dgm_kernels as dgm
from tests.contract import (
    assert_bitwise_repeatable,
    assert_close_by_size,
    assert_compiles,
    assert_inputs_unchanged,
    assert_never_waits,
    capture,
    in_every_layout,
)
from tests.density_cases import (
    CASES,
    DENOISER_CASES,
    KDE_CASES,
    MIXTURE_CASES,
    MMD_CASES,
    SIZES,
    DensityCase,
    Sizes,
    as_tuple,
    eager_mixture,
)
from tests.density_errors import Draw, assert_parity_of_draws
from tests.gradients import with_grads

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_triton")]
DEVICE = "cuda"
NATIVE_CASES = [case for case in CASES if not case.is_full]  # full covariances are computed by the reference
# One of each kernel, with what it has of options.
KERNELS = [*MIXTURE_CASES[:2], *MIXTURE_CASES[4:6], KDE_CASES[0], DENOISER_CASES[0], DENOISER_CASES[6], *MMD_CASES[1:3]]
LARGE = [Sizes(5000, 257, 64), Sizes(300, 20_000, 100), Sizes(100_000, 5, 2)]


def on_device(case: DensityCase, sizes: Sizes, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [operand.to(DEVICE) for operand in case.make(sizes, dtype)]


def results(case: DensityCase, operands: list[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of the operands that have one on every backend."""
    return with_grads(case.call, operands, case.trained)


class TestNumbers:
    @pytest.mark.parametrize("case", NATIVE_CASES, ids=str)
    def test_values_and_gradients(self, case):
        for sizes in filter(case.takes, (*SIZES, *LARGE[:2])):

            def draw(sizes: Sizes = sizes) -> Draw:
                operands = on_device(case, sizes)
                exact = with_grads(case.call_eager, [operand.double() for operand in operands], case.trained)
                differs = functools.partial(case.call_eager, differences=True)
                small = sizes.points * sizes.components * sizes.features < 1e8
                calls = (case.call_eager, differs)[: 2 if small else 1]
                forms = [with_grads(call, operands, case.trained) for call in calls]
                return results(case, operands), forms, exact

            names = [f"number {i}" for i in range(8)][: len(draw()[0])]
            assert_parity_of_draws(draw, sizes, names, slack=2.0)

    @pytest.mark.parametrize("case", KERNELS, ids=str)
    def test_16_bit_points(self, case):
        for dtype in (torch.bfloat16, torch.float16):
            operands = on_device(case, Sizes(59, 31, 16))
            short = [operands[0].to(dtype), *operands[1:]]
            actual = as_tuple(case.call(*short))
            expected = list(as_tuple(case.call(short[0].float(), *operands[1:])))
            if case in DENOISER_CASES:
                expected[0] = expected[0].to(dtype)
            torch.testing.assert_close(actual, tuple(expected), rtol=0, atol=0)

    @pytest.mark.parametrize("distance", [40.0, 1e4])
    def test_far_tails_are_finite_and_right(self, distance):
        for shape in ((1,), (31,), (31, 16)):
            means, scale = torch.randn(31, 16, device=DEVICE), 0.5 + torch.rand(shape, device=DEVICE)
            x = distance * torch.nn.functional.normalize(torch.randn(59, 16, device=DEVICE), dim=1)
            actual, r = dgm.mixture_log_prob(x, means, scale=scale, return_responsibilities=True)
            exact = eager_mixture(x.double(), means.double(), scale=scale.double(), differences=True)
            torch.testing.assert_close(actual.double(), exact, rtol=2e-6, atol=0)
            torch.testing.assert_close(r.sum(1), torch.ones(59, device=DEVICE), rtol=1e-5, atol=0)

    def test_data_far_from_zero(self):
        for shape in ((1,), (31,), (31, 16)):
            means, x = 1e3 + torch.randn(31, 16, device=DEVICE), 1e3 + torch.randn(113, 16, device=DEVICE)
            scale = 0.5 + torch.rand(shape, device=DEVICE)
            exact = eager_mixture(x.double(), means.double(), scale=scale.double(), differences=True)
            actual = dgm.mixture_log_prob(x, means, scale=scale)
            torch.testing.assert_close(actual.double(), exact, rtol=0, atol=1e-3)

    def test_a_weight_of_zero_removes_a_component(self):
        x, means, scale = torch.randn(59, 3), torch.randn(5, 3), 0.5 + torch.rand(5, 3)
        weights = torch.tensor([0.25, 0.0, 0.5, 0.0, 0.25])
        x, means, scale, weights = (t.to(DEVICE) for t in (x, means, scale, weights))
        kept = weights > 0
        actual = dgm.mixture_log_prob(x, means, scale=scale, weights=weights)
        expected = dgm.mixture_log_prob(x, means[kept], scale=scale[kept], weights=weights[kept])
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        sums = dgm.mixture_em_statistics(x, means, scale=scale, weights=weights)
        assert not any(t[~kept].any() for t in sums[1:])

    def test_full_covariances_are_the_reference(self):
        case = MIXTURE_CASES[6]
        operands = on_device(case, Sizes(59, 5, 3))
        with dgm.use_backend("auto"):
            actual = case.call(*operands)
        expected = case.call_eager(*(o.double() for o in operands))
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


class TestContract:
    @pytest.mark.parametrize("case", KERNELS, ids=str)
    def test_any_strides_and_addresses(self, case):
        """Among them addresses that are no multiples of 16 bytes."""
        operands = on_device(case, Sizes(6, 5, 16))
        expected = results(case, operands)
        for given in in_every_layout(operands):
            with assert_inputs_unchanged(*given):
                actual = results(case, given)
            assert_close_by_size(actual, expected, 1e-5)

    @pytest.mark.parametrize("case", KERNELS, ids=str)
    def test_repeatable(self, case):
        operands = on_device(case, Sizes(3000, 700, 5))
        assert_bitwise_repeatable(lambda: results(case, operands), runs=10)

    @pytest.mark.parametrize("case", [c for c in KERNELS if c not in MMD_CASES], ids=str)
    def test_zero_points(self, case):
        outputs = results(case, on_device(case, Sizes(0, 5, 3)))
        assert outputs[0].numel() == 0
        assert not any(t.any() for t in outputs)

    @pytest.mark.parametrize("case", KERNELS, ids=str)
    def test_compiles(self, case):
        def inputs(*sizes: int) -> list[Tensor]:
            operands = on_device(case, Sizes(*sizes))
            return [o.requires_grad_(i < case.trained) for i, o in enumerate(operands)]

        assert_compiles(case.call, inputs(5, 4, 3), inputs(9, 7, 6), backend="aot_eager")

    @pytest.mark.parametrize("case", KERNELS, ids=str)
    def test_autocast_changes_nothing(self, case):
        operands = on_device(case, Sizes(59, 31, 16))
        expected = as_tuple(case.call(*operands))
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            actual = as_tuple(case.call(*operands))
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)

    @pytest.mark.parametrize("case", [*NATIVE_CASES[:2], KDE_CASES[0], DENOISER_CASES[0], MMD_CASES[0]], ids=str)
    def test_memory_is_linear(self, case):
        """Of 20 000 x 20 000 pairs, a matrix of which has 1.6 GB."""
        operands = on_device(case, Sizes(20_000, 20_000, 4))
        results(case, operands)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results(case, operands)
        assert torch.cuda.max_memory_allocated() - before < 160e6

    def test_not_positive_is_nan_and_no_error(self):
        """Nobody waits for a GPU to find out."""
        x, means, scale = torch.randn(7, 3), torch.randn(4, 3), torch.ones(4, 3)
        scale[2, 1] = -1.0
        assert dgm.mixture_log_prob(*(t.to(DEVICE) for t in (x, means)), scale=scale.to(DEVICE)).isnan().all()


class TestDevice:
    @pytest.mark.parametrize("case", KERNELS, ids=str)
    def test_a_graph_replays_with_new_values(self, case):
        operands, others = on_device(case, Sizes(700, 300, 5)), on_device(case, Sizes(700, 300, 5))
        graph, replayed = capture(lambda: results(case, operands))
        for operand, other in zip(operands, others, strict=True):
            operand.copy_(other)
        graph.replay()
        for actual, expected in zip(replayed, results(case, operands), strict=True):
            assert torch.equal(actual, expected)

    @pytest.mark.parametrize("case", KERNELS, ids=str)
    def test_never_waits_for_the_device(self, case):
        leaves = [o.requires_grad_(i < case.trained) for i, o in enumerate(on_device(case, Sizes(59, 31, 5)))]
        ones = [torch.ones_like(output) for output in as_tuple(case.call(*leaves))]

        def run() -> tuple[Tensor, ...]:
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            return torch.autograd.grad(as_tuple(case.call(*leaves)), wanted, ones)

        run()  # Triton compiles here
        with assert_never_waits():
            gradients = run()
        assert all(gradient.isfinite().all() for gradient in gradients)

    def test_runs_on_the_current_stream(self):
        x, means, scale = (t.to(DEVICE) for t in (torch.randn(999, 3), torch.randn(31, 3), torch.ones(31, 3)))
        expected = dgm.mixture_log_prob(x, means, scale=scale)
        late = torch.zeros_like(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(50_000_000)  # cycles: on another stream the kernel would see zeros
            late.copy_(x)
            result = dgm.mixture_log_prob(late, means, scale=scale)
        torch.cuda.synchronize()
        assert torch.equal(result, expected)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_runs_on_the_device_of_its_tensors(self):
        case = MIXTURE_CASES[4]
        operands = [o.to("cuda:1") for o in case.make(Sizes(59, 31, 5))]
        assert torch.cuda.current_device() == 0
        actual = case.call(*operands)
        assert actual.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
        expected = case.call_eager(*(o.double() for o in operands))
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)

    def test_more_than_2_to_the_31_elements(self):
        """The last points of 2^31 numbers."""
        points, features = (1 << 29) + 100, 4
        if torch.cuda.mem_get_info()[0] < 3 * 4 * points * features:
            pytest.skip("needs 26 GB of free memory")
        x = torch.empty(points, features, device=DEVICE).normal_()
        means, scale = torch.randn(3, features, device=DEVICE), torch.ones(3, features, device=DEVICE)
        actual = dgm.mixture_log_prob(x, means, scale=scale)
        expected = eager_mixture(x[-1000:].double(), means.double(), scale=scale.double())
        torch.testing.assert_close(actual[-1000:].double(), expected, rtol=1e-5, atol=1e-5)
