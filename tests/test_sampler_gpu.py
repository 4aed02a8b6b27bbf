"""The CUDA C++ and Triton kernels of the sampler op on a GPU."""

from collections.abc import Iterator

import pytest
import torch

import dgm_kernels as dgm
from dgm_kernels._core import noise
from dgm_kernels.sampler import reference
from tests.contract import (
    assert_bitwise_repeatable,
    assert_compiles,
    assert_never_waits,
    capture,
    max_error,
)
from tests.sampler_op import (
    FORMS,
    SHAPES,
    check_step,
    check_training,
    key_args,
    native_loss,
    native_noise,
    native_step,
    step_call,
    step_inputs,
    training_call,
)

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    state = dgm.backends()[request.param]
    if not state.startswith("available"):
        pytest.skip(state)
    with dgm.use_backend(request.param):
        yield request.param


def on_cpu(args: noise.OpArgs) -> noise.OpArgs:
    return tuple(arg.cpu() if isinstance(arg, torch.Tensor) else arg for arg in args)


class TestNumbers:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("device_key", [False, True])
    def test_noise_is_that_of_the_cpu(self, backend, shape, device_key):
        """Words and uniforms to the bit, normals to 4 ulp, whatever the dtype that ``like`` asks for."""
        args = key_args(shape[0], DEVICE, device_key)
        like, on_gpu = torch.empty(shape), torch.empty(shape, device=DEVICE)
        expected = [reference.noise_like(like, on_cpu(args), kind) for kind in range(3)]
        torch.testing.assert_close(native_noise(backend, on_gpu, args, 0).cpu(), expected[0], rtol=2**-21, atol=0)
        for dtype in DTYPES:
            drawn = [native_noise(backend, on_gpu.to(dtype), args, kind).cpu() for kind in range(3)]
            assert torch.equal(drawn[2], expected[2])
            assert torch.equal(drawn[1], expected[1].to(dtype))
            torch.testing.assert_close(
                drawn[0], expected[0].to(dtype), rtol=max(torch.finfo(dtype).eps, 2**-21), atol=0
            )

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_step(self, backend, form, dtype):
        for shape in SHAPES:
            check_step(backend, step_call(shape, dtype, form, DEVICE))

    @pytest.mark.parametrize("form", ["given", "drawn", "drawn device_key mixed"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_training(self, backend, form, dtype):
        for shape in [*SHAPES, (2, 7001)]:
            check_training(backend, training_call(shape, dtype, form, DEVICE))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_addresses_that_are_no_multiples_of_16_bytes(self, backend, dtype):
        call = step_call((3, 64), dtype, "drawn history known", DEVICE)
        expected = native_step(backend, call)
        for name in ("x", "model_output", "history", "known", "mask"):
            storage = torch.empty(call[name].numel() + 1, dtype=call[name].dtype, device=DEVICE)
            shifted = storage[1:].view(3, 64).copy_(call[name])
            for moved, still in zip(native_step(backend, {**call, name: shifted}), expected, strict=True):
                assert max_error(moved, still) <= 2 * torch.finfo(dtype).eps * still.abs().max()

    def test_calls_that_differ_in_numbers_only(self, backend):
        """The same compiled kernel serves them; nothing of the first call may stick."""
        for first_sample in range(3):
            call = step_call((4, 192), torch.float32, "drawn", DEVICE)
            key = dgm.NoiseKey(first_sample << 40, first_sample=first_sample, step=7 * first_sample)
            check_step(backend, {**call, "args": key.op_args(), "step": 3 + first_sample})

    def test_gradients(self, backend):
        table = dgm.tables.training(dgm.Schedule.linear(10), prediction="v")
        t, key = torch.tensor([3, 8], device=DEVICE), dgm.NoiseKey(11)
        x0, scale = (torch.randn(2, 1023, device=DEVICE, requires_grad=True) for _ in range(2))
        gradients = []
        for name in (backend, "reference"):
            with dgm.use_backend(name):
                noisy = dgm.add_noise(x0, table, t, key)
                loss = dgm.denoising_loss(noisy * scale, x0, table, t, key)
            gradients.append(torch.autograd.grad(loss, (x0, scale)))
        torch.testing.assert_close(*gradients)


class TestContract:
    @pytest.mark.parametrize("bad", [-1, 6, 1 << 40])
    def test_index_out_of_range_gives_nan(self, backend, bad):
        call = step_call((3, 59), torch.float32, "drawn known threshold", DEVICE)
        call["step"] = torch.tensor([1, bad, 2], device=DEVICE)
        for result in native_step(backend, call):
            assert result[1].isnan().all() and result[[0, 2]].isfinite().all()
        new, x0 = native_step(backend, {**call, "step": torch.tensor(bad, device=DEVICE)})
        assert new.isnan().all() and x0.isnan().all()
        call = {**training_call((3, 59), torch.float32, "drawn", DEVICE), "t": call["step"]}
        for result in native_loss(backend, call):
            assert result[1].isnan().all() and result[[0, 2]].isfinite().all()

    @pytest.mark.parametrize("form", ["given", "given history known"])
    @pytest.mark.parametrize("row_steps", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_operands_with_coefficient_zero_do_not_count(self, backend, form, row_steps, dtype):
        """Row 2 of the table uses neither noise nor history, so the samples at it may hold anything there."""
        for elements in (59, 1024):
            call = step_call((3, elements), dtype, form, DEVICE)
            call["rows"][2, 7] = 0.0
            call["step"] = torch.tensor([2, 3, 2], device=DEVICE) if row_steps else 2
            expected = native_step(backend, call)
            for operand, junk in ((call["args"][0], float("inf")), (call["history"], float("nan"))):
                if operand is not None:
                    operand[::2] = junk
            for result, clean in zip(native_step(backend, call), expected, strict=True):
                assert torch.equal(result, clean)

    def test_nan_passes_the_bounds(self, backend):
        call = step_call((2, 59), torch.float32, "threshold", DEVICE)
        call["x"][0, 7] = float("nan")
        for threshold in (None, call["threshold"]):
            for result in native_step(backend, {**call, "threshold": threshold}):
                assert result[0, 7].isnan() and result.isnan().sum() == 1

    def test_out_may_be_x(self, backend):
        call = step_call((2, 1025), torch.float32, "drawn history", DEVICE)
        expected, x0 = native_step(backend, call)
        bound = torch.empty_like(x0)
        getattr(torch.ops.dgm.sampler_step_out, backend)(*step_inputs(call), call["x"], bound)
        assert torch.equal(call["x"], expected) and torch.equal(bound, x0)

    def test_zero_sizes(self, backend):
        for shape in ((0, 3), (3, 0)):
            like = torch.empty(shape, device=DEVICE)
            assert native_noise(backend, like, key_args(0, DEVICE, False), 0).shape == shape
            assert native_step(backend, step_call(shape, torch.float32, "drawn", DEVICE))[0].shape == shape
            loss, residual = native_loss(backend, training_call(shape, torch.float32, "drawn", DEVICE))
            assert loss.shape == shape[:1] and residual.shape == shape and loss.isnan().all()

    def test_repeatable(self, backend):
        step = step_call((2, 1025), torch.float32, "drawn", DEVICE)
        assert_bitwise_repeatable(lambda: native_step(backend, step))
        loss = training_call((3, 100_003), torch.float32, "drawn", DEVICE)
        assert_bitwise_repeatable(lambda: native_loss(backend, loss), runs=10)

    @pytest.mark.parametrize("form", ["drawn", "given known guided history"])
    def test_opcheck(self, backend, form):
        call = step_call((2, 59), torch.float32, form, DEVICE)
        call["x"].requires_grad_()
        torch.library.opcheck(getattr(torch.ops.dgm.sampler_step, backend), (*step_inputs(call), True))

    def test_compiles(self, backend):
        table = dgm.tables.ddpm(dgm.Schedule.linear(10), clip=1.0)

        def step(x, m):
            return dgm.sampler_step(x, m, table, 4, noise=dgm.NoiseKey(3))

        def inputs(*shape):
            return [torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(2)]

        assert_compiles(step, inputs(2, 59), inputs(3, 113))


class TestDevice:
    def test_a_graph_replays_with_new_noise(self, backend):
        """Seed and step live on the device; every replay runs one step and moves the step on."""
        table = dgm.tables.ddpm(dgm.Schedule.linear(10), clip=1.0)
        x, m = torch.randn(4, 3, 8, 8, device=DEVICE), torch.randn(4, 3, 8, 8, device=DEVICE)
        step, seed = torch.tensor(0, device=DEVICE), torch.tensor([5], device=DEVICE)

        def run():
            dgm.sampler_step(x, m, table, step, noise=dgm.NoiseKey(seed), out=x)
            step.add_(1)

        graph, _ = capture(run)
        start = torch.randn_like(x)
        for new_seed in (5, 6):
            expected = start
            for index in range(len(table)):
                expected = dgm.sampler_step(expected, m, table, index, noise=dgm.NoiseKey(new_seed))
            x.copy_(start), step.zero_(), seed.fill_(new_seed)
            for _ in range(len(table)):
                graph.replay()
            torch.testing.assert_close(x, expected)

    def test_a_graph_replays_the_loss(self, backend):
        call = training_call((3, 7001), torch.float32, "drawn device_key", DEVICE)
        results = []
        graph, _ = capture(lambda: results.append(native_loss(backend, call)))
        call["t"].add_(1), call["args"][1].add_(1), call["x0"].neg_()
        graph.replay()
        for replayed, expected in zip(results[-1], native_loss(backend, call), strict=True):
            assert torch.equal(replayed, expected)

    def test_never_waits_for_the_device(self, backend):
        step = step_call((2, 113), torch.float32, "drawn row_steps device_key known threshold", DEVICE)
        loss = training_call((2, 113), torch.float32, "drawn device_key", DEVICE)
        native_step(backend, step), native_loss(backend, loss)  # Triton compiles here
        with assert_never_waits():
            results = *native_step(backend, step), *native_loss(backend, loss)
        assert all(result.isfinite().all() for result in results)

    def test_runs_on_the_current_stream(self, backend):
        call = step_call((2, 1023), torch.float32, "drawn", DEVICE)
        expected, _ = native_step(backend, call)
        late = {**call, "x": torch.zeros_like(call["x"])}
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(50_000_000)  # cycles: on another stream the kernel would see zeros
            late["x"].copy_(call["x"])
            result, _ = native_step(backend, late)
        torch.cuda.synchronize()
        assert torch.equal(result, expected)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_runs_on_the_device_of_its_tensors(self, backend):
        assert torch.cuda.current_device() == 0
        check_step(backend, step_call((2, 1023), torch.float32, "drawn device_key history", "cuda:1"))
        check_training(backend, training_call((2, 1023), torch.float32, "drawn device_key", "cuda:1"))
        assert torch.cuda.current_device() == 0

    def test_more_samples_than_a_grid_axis_holds(self, backend):
        args = key_args(1, DEVICE, False)
        for elements in (1, 300):
            like = torch.empty(65536 + 7, elements, device=DEVICE)
            expected = reference.noise_like(like, args, 2)
            assert torch.equal(native_noise(backend, like, args, 2), expected)

    @pytest.mark.parametrize("shape", [(1, (1 << 31) + 72), (3, (1 << 30) + 72), (3, (1 << 30) + 71)])
    def test_more_than_2_to_the_31_elements(self, backend, shape):
        """The last 1000 elements of every sample, and of the tensor."""
        if torch.cuda.mem_get_info()[0] < 5 * shape[0] * shape[1]:
            pytest.skip("needs 5 bytes an element of free memory")
        args = key_args(shape[0], DEVICE, False)
        drawn = native_noise(backend, torch.empty(shape, dtype=torch.bfloat16, device=DEVICE), args, 1)
        elements = torch.arange(shape[1] - 1000, shape[1])
        for row in range(shape[0]):
            expected = uniforms_at(elements, args, row)
            assert torch.equal(drawn[row, -1000:].cpu(), expected.to(torch.bfloat16))


def uniforms_at(elements: torch.Tensor, args: noise.OpArgs, row: int) -> torch.Tensor:
    """The contract of docs/design.md, spelled out for single elements."""
    _, _, seed, _, step, _, first_sample, stream = args
    sample = first_sample + row
    counter = [step & 0xFFFFFFFF, sample & 0xFFFFFFFF, stream << 24 | sample >> 32]
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    words = noise.philox4x32((elements // 4, *map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    picked = torch.stack(noise.uniforms(words)).gather(0, (elements % 4)[None])
    return picked[0]
