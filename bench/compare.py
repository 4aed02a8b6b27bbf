"""Compares the contenders of one case: checks every result, then times all of them in interleaved rounds."""

import functools
import importlib
import math
import os
import pkgutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import dgm_kernels
from bench import floor, timing
from bench.environment import seconds_of_others

NATIVE_BACKENDS = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}  # the first is what "auto" takes
UPPER_BOUNDS = ("us", "floor")  # bars on the time itself; every other bar is a least ratio to a baseline
MEMORY = "memory"  # the bar on the ratio of eager's peak memory to ours
BASELINE_SLACK = 8


class WrongResult(AssertionError):
    """A contender's result is off, so that its case reports no speed."""


@dataclass(frozen=True)
class Setup:
    """Where and how a case runs; `compile_mode` None means the default choice of `variants`."""

    device: torch.device
    threads: int = 1
    compile_mode: str | None = None


@dataclass(frozen=True)
class Contender:
    """One implementation.

    `run` is what is timed. `check`, for a `run` that draws its own random numbers, is the same computation on given
    ones. `context` is entered once around a batch of calls. `tolerance` replaces the parity rule for a peer library
    whose arithmetic is its own (relative to the largest reference value). `repeats` calls of `run` are the work of one
    call of the others; its time is multiplied by that. Its `check` does the whole work.
    """

    run: Callable[[Any], Any]
    check: Callable[[Any], Any] | None = None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    tolerance: float | None = None
    repeats: int = 1


@dataclass(frozen=True)
class Case:
    """A computation, its contenders and what they must show.

    The first contender is ours; "eager" must be among the others, since its error is the yardstick. A contender's
    family is the first word of its name ("compile graphs" counts as "compile"). `reference` returns float64 tensors.
    `bytes` and `flops` are the fewest that any implementation must move and do. `bars`: family -> least ratio of its
    time to ours, "floor" -> greatest ratio of our time to the floor, "us" -> greatest time of a call in microseconds,
    "memory" -> least ratio of eager's peak memory to ours.
    `missing` says why a contender is left out. `grad` runs the contenders with autograd enabled.
    """

    name: str
    make_inputs: Callable[[], Any]
    contenders: Mapping[str, Contender]
    reference: Callable[[Any], Any]
    bytes: int
    flops: int = 0
    bars: Mapping[str, float] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    grad: bool = False
    matmul_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if len(self.contenders) < 2 or "eager" not in self.contenders or self.ours == "eager":
            names = list(self.contenders)
            raise ValueError(f"contenders of {self.name!r}: expected ours first, and 'eager', got {names}")
        if self.bytes <= 0 or self.flops < 0:
            raise ValueError(f"{self.name!r}: expected bytes > 0 and flops >= 0, got {self.bytes} and {self.flops}")

    @property
    def ours(self) -> str:
        """Name of the contender that the others are compared with."""
        return next(iter(self.contenders))


Bars = Callable[[Setup], Mapping[str, float]]


def bars_at_two_threads(setup: Setup, **bars: float) -> Mapping[str, float]:
    """Bars that were set on two CPU threads bind there."""
    return bars if setup.device.type == "cpu" and setup.threads == 2 else {}


def size_name(shape: Sequence[int]) -> str:
    """A shape as the names of cases have it."""
    return "x".join(map(str, shape))


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as the names of cases have it."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def family(name: str) -> str:
    """First word of a contender's name: what a bar refers to."""
    return name.split()[0]


def variants(function: Callable[..., Any], setup: Setup) -> dict[str, Callable[..., Any]]:
    """`function` as it is and compiled: the eager and `torch.compile` baselines.

    On CUDA two compiled forms compete, with and without CUDA graphs: graphs win small cases, but copy the inputs.
    """
    if setup.compile_mode is not None:
        modes = {"compile": setup.compile_mode}
    elif setup.device.type == "cuda":
        modes = {"compile": "max-autotune-no-cudagraphs", "compile graphs": "max-autotune"}
    else:
        modes = {"compile": "default"}
    return {"eager": function} | {name: torch.compile(function, mode=mode) for name, mode in modes.items()}


def ours(
    run: Callable[[Any], Any],
    setup: Setup,
    natives: Sequence[str] | None = None,
    check: Callable[[Any], Any] | None = None,
) -> tuple[dict[str, Contender], dict[str, str]]:
    """`run` on every native backend of the device (on `reference` where there is none), and why others are missing.

    `natives` are the backends that the op has kernels for; None stands for all.
    """
    wanted = [name for name in NATIVE_BACKENDS[setup.device.type] if natives is None or name in natives]
    state = {name: dgm_kernels.backends()[name] for name in wanted}
    missing = {f"dgm {name}": reason for name, reason in state.items() if not reason.startswith("available")}
    found = [name for name in state if f"dgm {name}" not in missing] or ["reference"]
    contexts = {name: functools.partial(dgm_kernels.use_backend, name) for name in found}
    return {f"dgm {name}": Contender(run, check, context) for name, context in contexts.items()}, missing


def discover(only: str | None = None) -> Iterator[tuple[str, str, Callable[[Setup], Case]]]:
    """(op, case name, builder) of every entry of `CASES` in `bench/bench_<op>.py`."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        op = module.name.removeprefix("bench_")
        if module.name.startswith("bench_") and only in (None, op):
            for name, build in importlib.import_module(f"bench.{module.name}").CASES.items():
                yield op, name, build


@contextmanager
def running(case: Case, contender: Contender) -> Iterator[None]:
    """The grad mode and backend that a contender's calls run under."""
    with torch.set_grad_enabled(case.grad), contender.context():
        yield


def _tensors(result: Any) -> list[torch.Tensor]:
    return [result.detach()] if isinstance(result, torch.Tensor) else [tensor.detach() for tensor in result]


def _relative_errors(name: str, result: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> list[float]:
    shapes, wanted = [tuple(t.shape) for t in result], [tuple(t.shape) for t in expected]
    if shapes != wanted:
        raise WrongResult(f"{name}: expected outputs of shapes {wanted}, got {shapes}")
    scales = [reference.abs().max().clamp(min=torch.finfo(torch.float32).tiny) for reference in expected]
    return [
        ((tensor.double() - reference).abs().max() / scale).item()
        for tensor, reference, scale in zip(result, expected, scales, strict=True)
    ]


def _results(case: Case, inputs: Any) -> tuple[dict[str, list[torch.Tensor]], dict[str, str]]:
    """What every contender returns, and why a baseline could not run.

    A baseline other than eager that raises is left out: a case is about ours, not about what else is installed.
    """
    results, unavailable = {}, {}
    for name, contender in case.contenders.items():
        try:
            with running(case, contender):
                results[name] = _tensors((contender.check or contender.run)(inputs))
        except Exception as error:
            if family(name) in (family(case.ours), "eager"):
                raise
            unavailable[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return results, unavailable


def check(case: Case, inputs: Any) -> tuple[dict[str, float], dict[str, str]]:
    """Largest error of every contender relative to the float64 reference, and why a baseline could not run.

    Raises WrongResult where ours breaks the parity rule, error <= 2 * error of eager + one rounding of its dtype, or
    where a baseline is off by `BASELINE_SLACK` times as much, so that it computes something else.
    """
    expected = _tensors(case.reference(inputs))
    if any(reference.dtype != torch.float64 for reference in expected):
        raise ValueError(f"reference of {case.name!r}: expected float64, got {[r.dtype for r in expected]}")
    results, unavailable = _results(case, inputs)
    errors = {name: _relative_errors(name, result, expected) for name, result in results.items()}
    wrong = []
    for name, found in errors.items():
        tolerance = case.contenders[name].tolerance
        slack = 1 if family(name) == family(case.ours) else BASELINE_SLACK
        for index, (error, eager) in enumerate(zip(found, errors["eager"], strict=True)):
            rounding = torch.finfo(results[name][index].dtype).eps
            limit = slack * (2 * eager + rounding) if tolerance is None else tolerance
            if not (math.isfinite(error) and error <= limit):
                wrong.append(f"{name}: output {index} has relative error {error:.3g}, allowed {limit:.3g}")
    if wrong:
        raise WrongResult(f"{case.name}: " + "; ".join(wrong))
    return {name: max(found) for name, found in errors.items()}, unavailable


def judge(
    case: Case, ours_us: float, over_floor: float, ratios: Mapping[str, float], saving: float | None = None
) -> dict[str, dict[str, Any]]:
    """Every bar with what was measured; the fastest contender of a family counts, an unmeasured bar is not met."""
    judged = {}
    for bar, required in case.bars.items():
        if bar in UPPER_BOUNDS:
            measured: float | None = ours_us if bar == "us" else over_floor
            met = measured is not None and measured <= required
        else:
            by_time = (ratio for name, ratio in ratios.items() if family(name) == bar)
            measured = saving if bar == MEMORY else min(by_time, default=None)
            met = measured is not None and measured >= required
        judged[bar] = {"required": required, "measured": measured, "met": met}
    return judged


def summarize(
    case: Case,
    setup: Setup,
    times: Mapping[str, Sequence[float]],
    copy_times: Sequence[float],
    copy_bytes: int,
    matmul_rate: float,
    peaks: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Medians, spreads, ratios to ours, floor and bars from the seconds per call of every round and peak memory."""
    stats = {name: timing.median_and_iqr(seconds) for name, seconds in times.items()}
    ours = stats[case.ours][0]
    copy_rate = copy_bytes / timing.median_and_iqr(copy_times)[0]
    copy_s, matmul_s = case.bytes / copy_rate, case.flops / matmul_rate
    floor_s = max(copy_s, matmul_s)
    ratios = {name: median / ours for name, (median, _) in stats.items() if name != case.ours}
    saving = peaks["eager"] / max(1, peaks[case.ours]) if peaks else None
    return {
        "case": case.name,
        "device": setup.device.type,
        "threads": setup.threads,
        "ours": case.ours,
        "rounds": len(copy_times),
        "contenders": {
            name: {"median_us": median * 1e6, "iqr_us": iqr * 1e6, "ratio": median / ours}
            for name, (median, iqr) in stats.items()
        },
        "floor": {
            "us": floor_s * 1e6,
            "bound": "copy" if copy_s >= matmul_s else "matmul",
            "bytes": case.bytes,
            "flops": case.flops,
            "copy_bytes_per_s": copy_rate,
            "matmul_flops_per_s": matmul_rate,
        },
        "over_floor": ours / floor_s,
        "bars": judge(case, ours * 1e6, ours / floor_s, ratios, saving),
    }


def make_input_sets(case: Case, device: torch.device) -> list[Any]:
    """Inputs shared by all contenders; on CUDA enough sets to rotate through that together they exceed the L2 cache."""
    sets = []
    for seed in range(floor.rotations(case.bytes, device)):
        torch.manual_seed(seed)
        sets.append(case.make_inputs())
    return sets


def compare(case: Case, setup: Setup, seconds: float = 2.0) -> tuple[dict[str, Any], list[Any]]:
    """Check, warm up and time all contenders for about `seconds`; returns the summary and the inputs used."""
    timing.settle_allocator()
    input_sets = make_input_sets(case, setup.device)
    errors, unavailable = check(case, input_sets[0])
    contenders = {name: contender for name, contender in case.contenders.items() if name in errors}

    def entered(contender: Contender) -> timing.Entry:
        return timing.Entry(contender.run, input_sets, lambda: running(case, contender))

    copy, copy_bytes = floor.copy_call(case.bytes, setup.device)
    entries = {name: entered(contender) for name, contender in contenders.items()}
    rate = floor.matmul_rate(setup.device, setup.threads, case.matmul_dtype)
    load, others, begin = os.getloadavg(), seconds_of_others(), time.perf_counter()
    # The copy competes in the same rounds: a change of the machine's load then moves a time and its floor alike.
    times = timing.interleave(entries | {"": timing.Entry(copy, [None], nullcontext)}, setup.device, seconds)
    busy = (seconds_of_others() - others) / (time.perf_counter() - begin)
    copy_times = times.pop("")
    times = {name: [seconds * contenders[name].repeats for seconds in found] for name, found in times.items()}
    peaks = {name: _peak_bytes(case, contender, input_sets[0], setup) for name, contender in contenders.items()}
    result = summarize(case, setup, times, copy_times, copy_bytes, rate, peaks)
    result["load_average"] = {"before": load, "after": os.getloadavg()}
    result["cores_busy_elsewhere"] = max(0.0, busy)
    result["missing"] = dict(case.missing) | unavailable
    for name in contenders:
        result["contenders"][name] |= {"max_error": errors[name], "peak_bytes": peaks[name]}
    return result, input_sets


def _peak_bytes(case: Case, contender: Contender, inputs: Any, setup: Setup) -> int:
    with running(case, contender):
        return timing.peak_memory(functools.partial(contender.run, inputs), setup.device)
