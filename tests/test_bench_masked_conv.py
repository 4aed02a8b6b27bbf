"""The contenders of masked_conv's benchmarks compute one function, shown at small sizes and without compiling."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench import bench_generation, bench_masked_conv, floor
from bench import masked_conv_baselines as baselines
from bench.compare import Case, Setup, WrongResult, check, make_input_sets
from dgm_kernels import discretized_logistic_mixture, masked_conv2d, use_backend
from tests.cases import NATIVE

CPU = torch.device("cpu")
SETUP = Setup(CPU, torch.get_num_threads())
SMALL = {
    bench_masked_conv: {
        "CONV_SHAPE": (2, 6, 9, 8),
        "CONV_OUTPUTS": 5,
        "GATE_SHAPE": (3, 10, 5, 7),
        "PIXELS_SHAPE": (2, 3, 6, 5),
    },
    bench_generation: {
        "IMAGE": (1, 6, 5),
        "SMALL_IMAGE": (1, 4, 4),
        "DEPTH": 2,
        "SOUND": (1, 40),
        "SMALL_SOUND": (1, 24),
        "SOUND_WIDTH": 5,
        "SOUND_DEPTH": 4,
    },
}


@pytest.fixture(autouse=True)
def small_and_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, values in SMALL.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
        monkeypatch.setattr(module, "variants", lambda function, setup: {"eager": function})


def check_case(case: Case) -> set[str]:
    """Names of the contenders that gave the right result; a wrong one raises."""
    errors, unavailable = check(case, make_input_sets(case, CPU)[0])
    assert unavailable == {}
    assert case.ours == f"dgm {(*NATIVE, 'reference')[0]}"
    return set(errors) - {case.ours}


@pytest.mark.parametrize("name", bench_masked_conv.CASES)
def test_contenders_agree(name: str) -> None:
    others = {"cropped"} if name.startswith("conv") else set()
    assert check_case(bench_masked_conv.CASES[name](SETUP)) == {"eager", *others}


# Live taps above and to the left of the pixel lie inside 9x8 pixels for (9 - |dy|)(8 - |dx|) of them:
# 3x3 type B 8 (7 + 8 + 7) + 9 (7 + 8), 7x7 type A (6 + 7 + 8) (5 + 6 + 7 + 8 + 7 + 6 + 5) + 9 (5 + 6 + 7).
@pytest.mark.parametrize(("name", "taps", "pairs"), [("conv-3B", 5, 311), ("conv-7A", 24, 1086)])
def test_floor_of_convolutions_counts_what_must_be_done(name: str, taps: int, pairs: int) -> None:
    forward, training = (bench_masked_conv.CASES[name + suffix](SETUP) for suffix in ("", "-train"))
    x, y, weights = 2 * 6 * 72, 2 * 5 * 72, 6 * 5 * taps
    assert forward.flops == 2 * 2 * 6 * 5 * pairs and training.flops == 3 * forward.flops
    assert forward.bytes == 4 * (x + weights + y) and training.bytes == 4 * (3 * x + 3 * weights + 2 * y)


def test_floor_of_mixtures_counts_the_functions_of_a_component() -> None:
    """Three exponentials and a tanh of each colour, and two exponentials."""
    pixels, components, directions = 2 * 6 * 5, 10, 2
    functions = bench_masked_conv.mixture(SETUP).flops / (pixels * components * directions)
    assert functions == 14 * bench_masked_conv.FUNCTION_FLOPS


@pytest.mark.parametrize(("width", "batch"), [(32, 1), (32, 16), (6, 5)])
def test_images_agree(width: int, batch: int) -> None:
    assert check_case(bench_generation.gated_pixelcnn(SETUP, width, batch)) == {"eager"}


def test_sequences_agree() -> None:
    assert check_case(bench_generation.wavenet(SETUP)) == {"eager", "queues", "window", "dgm in quarters"}


def test_naive_loops_stand_for_every_pixel() -> None:
    image, sequence = bench_generation.gated_pixelcnn(SETUP, 6, 5), bench_generation.wavenet(SETUP)
    assert {name: contender.repeats for name, contender in image.contenders.items()} == {image.ours: 1, "eager": 30}
    repeats = {name: contender.repeats for name, contender in sequence.contenders.items()}
    assert repeats == {sequence.ours: 1, "eager": 40, "queues": 40, "window": 32, "dgm in quarters": 4}


def test_large_batches_go_through_a_loop_in_parts_too() -> None:
    case = bench_generation.gated_pixelcnn(SETUP, 6, 64)
    inputs = case.make_inputs()
    levels = {name: contender.run(inputs).numel() for name, contender in case.contenders.items()}
    assert levels == {case.ours: 64 * 30, "eager": 64, "parts": 16}
    assert all(levels[name] * contender.repeats == 64 * 30 for name, contender in case.contenders.items())
    assert check_case(case) == {"eager", "parts"}


def test_steps_of_a_window_are_as_much_work_as_the_loop() -> None:
    for field, pixels in ((17, 40), (9, 9), (2048, 33), (1, 5)):
        loop = baselines.NaiveLoop(torch.nn.Identity(), 2, field)
        inputs = [min(pixel + 1, field) for pixel in range(pixels)]
        assert loop.steps(pixels) == pytest.approx(sum(inputs) / inputs[-1], abs=0.5)


def test_floor_of_images_counts_what_must_be_done() -> None:
    """6x5 pixels, width 4, two layers, of which the last one's residual convolution reaches no output."""
    case = bench_generation.gated_pixelcnn(SETUP, 4, 3)
    pixels, columns = 30, 2 + 3 + 4 + 5 + 4 + 3 + 2  # of 5 columns, for dx from -3 to 3
    first = 4 * ((3 + 4 + 5) * columns + 6 * (2 + 3 + 4))  # three rows above, three pixels before
    vertical = 8 * 4 * ((5 + 6) * (4 + 5 + 4))
    horizontal, point = 8 * 4 * 6 * (4 + 5), pixels * 4 * 4
    layers = 2 * (vertical + horizontal + pixels * 8 * 8) + (1 + 2) * point  # one residual, two skips
    assert case.flops == 2 * 3 * (first + layers + point + pixels * 4)
    weights = 4 * (21 + 3) + 2 * (8 * 4 * (6 + 2) + 8 * 8) + (1 + 2) * 16 + 16 + 4
    assert case.bytes == 4 * weights + 8 * 3 * pixels


def test_floor_of_sequences_counts_what_must_be_done() -> None:
    """40 samples, width 5, four layers of dilations 1 to 8."""
    case = bench_generation.wavenet(SETUP)
    dilated = sum(10 * 5 * (40 + 40 - dilation) for dilation in (1, 2, 4, 8))
    points = (3 + 4 + 1) * 40 * 25 + 40 * 5 * 256  # residuals of all but the last layer, skips, head
    assert case.flops == 2 * (39 * 5 + dilated + points)
    assert case.bytes == 4 * (5 + 4 * 100 + (3 + 4 + 1) * 25 + 5 * 256) + 8 * 40


@pytest.mark.parametrize(("matmul", "conv"), [((0.2, 0.1), (9.0, 8.0)), ((9.0, 8.0), (0.2, 0.1))])
def test_faster_product_sets_the_ceiling(
    matmul: tuple[float, ...], conv: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of it the fastest batch."""
    monkeypatch.setattr(floor.timing, "interleave", lambda *args, **named: {"matmul": list(matmul), "conv": list(conv)})
    batch, channels, height, width = floor.CONV_SHAPE
    flops = 2 * 1024**3 if matmul < conv else 2 * batch * channels * channels * 9 * height * width
    measure = floor.matmul_rate.__wrapped__  # what is cached belongs to the process
    assert measure(CPU, torch.get_num_threads(), torch.float32) == pytest.approx(flops / 0.1)


def test_bars_of_wavenet_bind_on_the_naive_loop_that_sees_the_field() -> None:
    bars = bench_generation.CASES["wavenet"](Setup(CPU, threads=2)).bars
    assert bars["window"] == bars["eager"] == 500


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda setup: bench_generation.gated_pixelcnn(setup, 6, 5), (1, 6, 5)),
        (bench_generation.wavenet, (1, 40)),
        (bench_generation.wavenet, (1, 10)),
    ],
    ids=["image", "sequence", "quarter"],
)
def test_generator_that_is_wrong_at_full_size_only_is_found(
    build: Callable[[Setup], Case], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = bench_generation.incremental_sampler

    def sampler(network: torch.nn.Module, of_shape: tuple[int, ...], **options: object) -> Callable[..., Tensor]:
        generate = right(network, of_shape, **options)
        return (lambda *args, **named: 1 - generate(*args, **named).clamp(0, 1)) if of_shape == shape else generate

    monkeypatch.setattr(bench_generation, "incremental_sampler", sampler)
    with pytest.raises(WrongResult, match="levels are not what"):
        check_case(build(SETUP))


def small_task() -> bench_generation.Task:
    networks = baselines.twins(baselines.GatedPixelCNN, 6, 2, CPU)
    return bench_generation.Task((1, 6, 5), (1, 4, 4), 3, 2, *networks)


def test_level_that_its_number_does_not_draw_is_found() -> None:
    task = small_task()
    uniform = task.uniform(task.shape, task.batch, CPU)
    levels = baselines.NaiveLoop(task.plain, 2).generate(task.shape, uniform)
    bench_generation.verify(task, levels)
    for pixel in (0, 12, 29):
        wrong = levels.clone()
        wrong.view(3, -1)[1, pixel] ^= 1
        with pytest.raises(WrongResult, match="levels are not what"):
            bench_generation.verify(task, wrong)


def test_samples_depend_on_what_was_drawn_before() -> None:
    """Else a generator that forgets the rows above would pass."""
    torch.manual_seed(0)
    plain = baselines.twins(baselines.GatedPixelCNN, 8, 5, CPU)[1]
    x = torch.randint(2, (2, 1, 16, 16)).float()
    other = x.clone()
    other[:, :, 2] = 1 - other[:, :, 2]
    moved = (plain(other) - plain(x)).abs().amax((0, 1, 3))
    assert moved[:2].max() == 0 and moved[2:11].min() > 1e-2


@pytest.mark.parametrize(
    ("family", "shape"), [(baselines.GatedPixelCNN, (2, 1, 9, 8)), (baselines.WaveNet, (2, 1, 40))]
)
def test_twins_are_one_function(family: type[baselines.Network], shape: tuple[int, ...]) -> None:
    ours, plain = (baselines.wide(network) for network in baselines.twins(family, 6, 3, CPU))
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(plain(x), ours(x))


def test_window_is_what_the_network_sees() -> None:
    """Sequences of several windows: one input less, and the loop would draw otherwise."""
    plain = baselines.wide(baselines.twins(baselines.WaveNet, 5, 3, CPU)[1])
    assert plain.field == 9
    x = torch.randn(1, 1, 40, dtype=torch.float64, requires_grad=True)
    seen = torch.autograd.grad(plain(x)[0, :, 30].sum(), x)[0][0, 0].nonzero().flatten()
    assert seen.tolist() == list(range(30 + 1 - plain.field, 30))
    uniform = torch.rand(2, 40, dtype=torch.float64)
    whole, window = (baselines.NaiveLoop(plain, 256, field) for field in (None, plain.field))
    assert torch.equal(whole.generate((1, 40), uniform), window.generate((1, 40), uniform))


def test_queues_draw_what_the_naive_loop_draws() -> None:
    """Sequences longer than the queues, and a second one after the first."""
    plain = baselines.wide(baselines.twins(baselines.WaveNet, 5, 3, CPU)[1])
    naive, queues = baselines.NaiveLoop(plain, 256), baselines.QueueLoop(plain, 256)
    for batch in (2, 3):
        uniform = torch.rand(batch, 30, dtype=torch.float64)
        assert torch.equal(queues.generate((1, 30), uniform), naive.generate((1, 30), uniform))


@pytest.mark.parametrize(("size", "mask_type", "taps"), [(7, "A", 24), (3, "B", 5), (1, "A", 0), (1, "B", 1)])
def test_raster_mask(size: int, mask_type: str, taps: int) -> None:
    mask = baselines.raster_mask(size, mask_type, CPU)
    x, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 3, 8, 9), (4, 3, size, size), (4,)))
    assert mask.sum() == taps
    with use_backend("reference"):
        expected = masked_conv2d(x, weight, bias, mask_type=mask_type)
    torch.testing.assert_close(baselines.plain_masked_conv(x, weight, bias, mask), expected)


def test_published_mixture_is_near_the_exact_one() -> None:
    """Within what its density in place of a difference costs; at both ends of the range too."""
    x = torch.tensor([-1.0, 1.0, 0.5, -251 / 255], dtype=torch.float64).expand(2, 3, 4)
    torch.manual_seed(0)
    parameters = 0.1 * torch.randn(2, 50, 4, dtype=torch.float64)
    narrow = parameters.clone()
    narrow[:, 5:] -= 2.5  # means, scales and coefficients: many of the differences are below 1e-5
    for given, tolerance in ((parameters, 1e-9), (narrow, 1e-3)):
        exact = discretized_logistic_mixture(x, given)
        torch.testing.assert_close(baselines.plain_mixture(x, given), exact, rtol=tolerance, atol=0)
