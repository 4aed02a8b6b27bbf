"""Measured ceilings of the machine: how fast it copies memory and multiplies matrices."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from bench import timing

SMALLEST_COPY = 1 << 20  # below this a copy measures the cost of a call, not the memory
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
CONV_SHAPE = (8, 128, 28, 28)
MAX_ROTATIONS = 32


def _l2_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def rotations(working_set: int, device: torch.device) -> int:
    """Input sets to rotate through, so that on CUDA no call finds its inputs in the L2 cache; 1 on CPU."""
    if device.type != "cuda":
        return 1
    return max(1, min(MAX_ROTATIONS, math.ceil(4 * _l2_bytes(device) / working_set)))


def copy_call(working_set: int, device: torch.device) -> tuple[Callable[[Any], Any], int]:
    """A copy to time next to a case and the bytes it moves, reads plus writes.

    On CPU it is as large as the case, so that both live in the same level of cache. On CUDA, where the inputs are
    rotated out of the cache, it is large enough to measure device memory.
    """
    size = max(working_set, SMALLEST_COPY) if device.type == "cpu" else max(working_set, 16 * _l2_bytes(device))
    elements = max(1, size // 8)
    source, target = torch.rand(elements, device=device), torch.empty(elements, device=device)
    return lambda _: target.copy_(source), 2 * source.nbytes


@functools.cache
def matmul_rate(device: torch.device, threads: int, dtype: torch.dtype) -> float:
    """Operations a second of a square matrix product on random data, measured once a run at the threads in force.

    On CPU a 3x3 convolution competes: the library behind `@` may leave half of the vector units of a processor unused.
    The fastest batch counts, since other load on the machine is no property of the ceiling.
    """
    if torch.get_num_threads() != threads:
        raise ValueError(f"threads: expected {torch.get_num_threads()}, the number in force, got {threads}")
    size = MATMUL_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    entries = {"matmul": timing.Entry(lambda _: left @ right, [None], torch.no_grad)}
    flops = {"matmul": 2 * size**3}
    if device.type == "cpu":
        batch, channels, height, width = CONV_SHAPE
        x, weight = torch.randn(CONV_SHAPE).to(dtype), torch.randn(channels, channels, 3, 3).to(dtype)
        entries["conv"] = timing.Entry(lambda _: F.conv2d(x, weight, padding=1), [None], torch.no_grad)
        flops["conv"] = 2 * batch * height * width * weight.numel()
    times = timing.interleave(entries, device, seconds=0.3)
    return max(flops[name] / min(seconds) for name, seconds in times.items())
