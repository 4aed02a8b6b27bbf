"""Timing in interleaved rounds, and the peak memory of a call."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

BATCH_SECONDS = 2e-3  # a timed batch lasts at least this long, so that reading the clock costs nothing
WARMUP_SECONDS = 0.1
MIN_ROUNDS, MAX_ROUNDS = 7, 200
SLOW_SECONDS, MIN_SLOW_ROUNDS = 6.0, 3  # rounds that last this long together are enough, be they few


def settle_allocator() -> None:
    """Frees one large block, after which glibc keeps freed memory of that size instead of returning it every time.

    A process that has trained or sampled anything of real size is in that state. A fresh one is not, and pays hundreds
    of page faults in whichever contender allocates next: what would be timed is the operating system.
    """
    torch.empty(31 << 20, dtype=torch.uint8).fill_(1)


class Entry(NamedTuple):
    """A callable, the input sets that its calls rotate through and the context they run in."""

    run: Callable[[Any], Any]
    input_sets: Sequence[Any]
    context: Callable[[], AbstractContextManager[Any]]


def time_batch(entry: Entry, count: int, device: torch.device) -> float:
    """Seconds per call over `count` calls in a row."""
    run = entry.run
    calls = [entry.input_sets[index % len(entry.input_sets)] for index in range(count)]
    with entry.context():
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(device)
            start.record()
            for inputs in calls:
                run(inputs)
            end.record()
            torch.cuda.synchronize(device)
            return start.elapsed_time(end) * 1e-3 / count
        begin = time.perf_counter()
        for inputs in calls:
            run(inputs)
        return (time.perf_counter() - begin) / count


def _warm_up(entry: Entry, device: torch.device) -> int:
    """Run for a while, which also compiles what compiles at the first call; returns the calls of a batch."""
    seconds = time_batch(entry, 1, device)
    begin = time.perf_counter()
    while time.perf_counter() - begin < WARMUP_SECONDS:
        seconds = time_batch(entry, max(1, min(1000, math.ceil(BATCH_SECONDS / seconds))), device)
    return max(1, math.ceil(BATCH_SECONDS / seconds))


def interleave(entries: Mapping[str, Entry], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Seconds per call of every entry, one batch a round; who goes first rotates from round to round."""
    counts = {name: _warm_up(entry, device) for name, entry in entries.items()}
    names = list(entries)
    times: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        for round_index in range(MAX_ROUNDS):
            spent = time.perf_counter() - begin
            if (round_index >= MIN_ROUNDS and spent >= seconds) or (
                round_index >= MIN_SLOW_ROUNDS and spent >= max(seconds, SLOW_SECONDS)
            ):
                break
            shift = round_index % len(names)
            for name in names[shift:] + names[:shift]:
                times[name].append(time_batch(entries[name], counts[name], device))
    finally:
        if collecting:
            gc.enable()
    return times


def median_and_iqr(values: Sequence[float]) -> tuple[float, float]:
    """Median and interquartile range."""
    if len(values) == 1:
        return values[0], 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, high - low


def peak_memory(call: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that one call holds beyond what was allocated before it, its result included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
