"""`python -m bench.layer_alone [THREADS]`: an affine layer of 4096x512 next to what memory allows, round by round.

The copy moves as many bytes; `addcmul` is PyTorch's own pass over three operands and a result.
"""

import statistics
import sys
import time

import torch

from bench.timing import settle_allocator
from dgm_kernels import affine_coupling

ROUNDS = 60


def main(threads: int) -> None:
    torch.set_num_threads(threads)
    settle_allocator()
    x, shift, raw = torch.randn(3, 4096, 512).unbind()
    source, target = torch.rand(2, 2 * x.numel()).unbind()
    calls = {
        "copy": lambda: target.copy_(source),
        "addcmul": lambda: torch.addcmul(shift, x, raw),
        "exp": lambda: affine_coupling(x, shift, raw),
        "tanh": lambda: affine_coupling(x, shift, raw, scale_map="tanh"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    for name, times in seconds.items():
        print(f"{name:8} {1e6 * statistics.median(times):6.0f} us")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
