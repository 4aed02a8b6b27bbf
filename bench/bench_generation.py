"""Cases of generation with masked_conv: whole images and sequences, each pixel's features once against a naive loop.

The loops are timed by their last pixel, whose time is counted as often as gives the work of the whole loop
(`Contender.repeats`, `Loop.steps`): 784 passes through the widest network would take an hour. "eager" runs every pass
over the whole image or sequence, as published PixelCNN code does; of a WaveNet that is many times what a sample can
see, so the naive loop that its ratios should be read from is "window". That whole loops draw the same samples is
checked on small images, and what the timed calls draw by one pass over their samples, in which every level must be what
its uniform number draws.

No peer library competes. wavenet_vocoder has a WaveNet of its own with queues, which is what "queues" does; no package
that installs today generates from a PixelCNN in another way than the naive one.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bench.compare import Bars, Case, Contender, Setup, WrongResult, bars_at_two_threads, ours, size_name, variants
from bench.environment import available_cores
from bench.masked_conv_baselines import (
    LEVELS,
    GatedPixelCNN,
    Loop,
    NaiveLoop,
    Network,
    QueueLoop,
    WaveNet,
    least_work,
    twins,
    wide,
)
from dgm_kernels import NoiseKey, incremental_sampler
from dgm_kernels._core.noise import uniform_noise

KEY = NoiseKey(1234)
IMAGE, DEPTH = (1, 28, 28), 7
SOUND, SOUND_WIDTH, SOUND_DEPTH = (1, 16000), 64, 20
SMALL_IMAGE, SMALL_SOUND = (1, 6, 6), (1, 48)
CHECKED = 4  # samples of a batch that are checked
TOGETHER = 16  # samples that a pass of "parts" takes: of 64 at once each costs 1.6 to 2 times as much
NOT_COMPILED = "compiling takes longer than the case; of the smallest images it is measured"
ROUNDING = 1e-5  # a uniform number that is closer than this to the edge of a level may draw either


class Task(NamedTuple):
    """What is generated, with which networks."""

    shape: tuple[int, ...]
    small: tuple[int, ...]  # what whole naive loops generate
    batch: int
    levels: int
    network: Network
    plain: Network

    @property
    def pixels(self) -> int:
        return torch.Size(self.shape).numel()

    def sampler(self, shape: tuple[int, ...] | None = None) -> Callable[..., Tensor]:
        """Ours, of another shape if asked."""
        output = "bernoulli" if self.levels == 2 else "categorical"
        return incremental_sampler(self.network, shape or self.shape, output=output, levels=self.levels)

    def uniform(self, shape: tuple[int, ...], batch: int, device: torch.device) -> Tensor:
        """The numbers that KEY stands for: of four a pixel the first."""
        pixels = torch.Size(shape).numel()
        return uniform_noise(torch.Size((batch, pixels, 4)), device, KEY.op_args())[:, :, 0]


def verify(task: Task, levels: Tensor) -> None:
    """Raises WrongResult unless every level is what its uniform number draws given the levels before it."""
    chosen = torch.linspace(0, task.batch - 1, min(task.batch, CHECKED)).long().to(levels.device)
    levels, numbers = levels[chosen], task.uniform(task.shape, task.batch, levels.device)[chosen].double()
    loop = NaiveLoop(wide(task.plain), task.levels)
    outputs = loop.network(loop.values(levels.double())).flatten(2)
    low, high = (loop.draw(outputs, (numbers + shift).clamp(0, 1)) for shift in (-ROUNDING, ROUNDING))
    wrong = (levels.flatten(1) < low) | (levels.flatten(1) > high)
    if wrong.any():
        raise WrongResult(f"{int(wrong.sum())} of {wrong.numel()} levels are not what their uniform numbers draw")


def checked(task: Task, generate: Callable[..., Tensor], small: Callable[..., Tensor], i: SimpleNamespace) -> Tensor:
    """Ours on a small image, after a look at what it generates at full size."""
    verify(task, generate(task.batch, key=KEY))
    return small(min(task.batch, CHECKED), key=KEY).float()


def generation_case(
    setup: Setup,
    name: str,
    task: Task,
    loops: Mapping[str, Loop],
    *,
    missing: Mapping[str, str],
    bars: Mapping[str, float],
) -> tuple[Case, Contender]:
    """Ours against loops in PyTorch ("eager" among them), and the contender that is ours.

    What must be done: for every sample the products of the weights that count with pixels of the image (`least_work`).
    What must move: those weights and the levels.
    """
    generate, small = task.sampler(), task.sampler(task.small)
    uniform = task.uniform(task.small, min(task.batch, CHECKED), setup.device)

    def step(i: SimpleNamespace, loop: Loop) -> Tensor:
        return loop.step(i.canvas, task.pixels - 1, i.uniform)

    check = partial(checked, task, generate, small)
    contenders, without = ours(lambda i: generate(task.batch, key=KEY), setup, ("cpp",), check)
    for loop_name, loop in loops.items():
        whole = partial(lambda i, loop: loop.generate(task.small, uniform).float(), loop=loop)
        contenders[loop_name] = Contender(partial(step, loop=loop), whole, repeats=loop.steps(task.pixels))
    work = least_work(task.plain, task.shape)
    case = Case(
        name,
        lambda: SimpleNamespace(
            canvas=torch.zeros(task.batch, *task.shape, device=setup.device),
            uniform=torch.rand(task.batch, device=setup.device),
        ),
        contenders,
        lambda i: NaiveLoop(wide(task.plain), task.levels).generate(task.small, uniform.double()).double(),
        bytes=work.weights * 4 + task.batch * task.pixels * 8,
        flops=2 * work.products * task.batch,
        bars=bars,
        missing=dict(missing) | without,
    )
    return case, contenders[case.ours]


def gated_pixelcnn(setup: Setup, width: int, batch: int, bars: Bars = bars_at_two_threads) -> Case:
    """Binary images. The smallest case is checked by a whole naive loop at full size, and has a compiled network.

    In "parts" a large batch goes through the naive loop, whose feature maps then stay nearer to the caches.
    """
    smallest = width * batch == 32
    task = Task(IMAGE, IMAGE if smallest else SMALL_IMAGE, batch, 2, *twins(GatedPixelCNN, width, DEPTH, setup.device))
    networks = variants(task.plain, setup) if smallest else {"eager": task.plain}
    loops = {name: NaiveLoop(network, task.levels) for name, network in networks.items()}
    missing = {} if smallest else {"compile": NOT_COMPILED}
    name = f"gated PixelCNN {size_name(IMAGE[1:])}, width {width}, batch {batch}"
    case, _ = generation_case(setup, name, task, loops, missing=missing, bars=bars(setup))
    if batch <= TOGETHER:
        return case
    eager = case.contenders["eager"]

    def part(i: SimpleNamespace) -> Tensor:
        return eager.run(SimpleNamespace(canvas=i.canvas[:TOGETHER], uniform=i.uniform[:TOGETHER]))

    parts = replace(eager, run=part, repeats=eager.repeats * batch // TOGETHER)
    return replace(case, contenders={**case.contenders, "parts": parts})


def wavenet(setup: Setup, bars: Bars = bars_at_two_threads) -> Case:
    """A sequence of 256 levels, in one piece and in four: a sample costs the same however many there were before.

    "window" is a naive loop whose passes see no more than the network can, "queues" keeps features as ours does.
    """
    task = Task(SOUND, SMALL_SOUND, 1, LEVELS, *twins(WaveNet, SOUND_WIDTH, SOUND_DEPTH, setup.device))
    loops: dict[str, Loop] = {"eager": NaiveLoop(task.plain, LEVELS), "queues": QueueLoop(task.plain, LEVELS)}
    loops["window"] = NaiveLoop(task.plain, LEVELS, task.plain.field)
    name = f"WaveNet {SOUND[1]} samples, {SOUND_DEPTH} layers, width {SOUND_WIDTH}"
    case, whole = generation_case(setup, name, task, loops, missing={"compile": NOT_COMPILED}, bars=bars(setup))
    part = task._replace(shape=(1, SOUND[1] // 4))
    generate = part.sampler()
    check = partial(checked, part, generate, part.sampler(part.small))
    quarter = replace(whole, run=lambda i: generate(1, key=KEY), check=check, repeats=4)
    return replace(case, contenders={**case.contenders, "dgm in quarters": quarter})


CASES: dict[str, Callable[[Setup], Case]] = {
    "32-1": partial(gated_pixelcnn, width=32, batch=1, bars=partial(bars_at_two_threads, eager=20)),
    "32-16": partial(gated_pixelcnn, width=32, batch=16, bars=partial(bars_at_two_threads, eager=150)),
    "32-64": partial(gated_pixelcnn, width=32, batch=64, bars=partial(bars_at_two_threads, eager=400)),
    "256-1": partial(gated_pixelcnn, width=256, batch=1, bars=partial(bars_at_two_threads, eager=80)),
    "256-16": partial(gated_pixelcnn, width=256, batch=16, bars=partial(bars_at_two_threads, eager=400)),
    "256-64": partial(gated_pixelcnn, width=256, batch=64, bars=partial(bars_at_two_threads, eager=1000)),
    "wavenet": partial(wavenet, bars=partial(bars_at_two_threads, eager=500, window=500, dgm=0.9)),
}
LARGE = ("32-16", "32-64", "256-1", "256-16", "256-64", "wavenet")


def test_generation(
    compare: Callable[[Callable[[Setup], Case]], None],
    build: Callable[[Setup], Case],
    threads: int,
    pytestconfig: pytest.Config,
) -> None:
    fewer = pytestconfig.getoption("--device") == "cpu" and threads < min(2, available_cores())
    if fewer and any(build is CASES[name] for name in LARGE):
        pytest.skip("takes long, and the bar is for two threads")
    compare(build)
