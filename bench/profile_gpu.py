"""`python -m bench.profile_gpu [--only OP] [--out FILE]`: kernels and their times in every case, by torch.profiler."""

import argparse
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.compare import Case, Setup, discover, running

WARMUP_CALLS, CALLS = 5, 20


def profile_contender(case: Case, name: str) -> str:
    """Table of the kernels of one contender, times summed over `CALLS` calls."""
    torch.manual_seed(0)
    inputs, contender = case.make_inputs(), case.contenders[name]
    with running(case, contender):
        for _ in range(WARMUP_CALLS):
            contender.run(inputs)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            for _ in range(CALLS):
                contender.run(inputs)
            torch.cuda.synchronize()
    table = profiler.key_averages().table(sort_by="self_device_time_total", row_limit=8, max_name_column_width=70)
    return f"## {case.name}: {name}, {CALLS} calls\n{table}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="one op, such as sampler")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    setup = Setup(torch.device("cuda"))
    cases = [build(setup) for _, _, build in discover(arguments.only)]
    tables = [profile_contender(case, name) for case in cases for name in case.contenders if name.startswith("dgm ")]
    print(*tables, sep="\n")
    if arguments.out is not None:
        arguments.out.write_text("\n".join(tables))


if __name__ == "__main__":
    main()
