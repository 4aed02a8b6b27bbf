"""`python -m bench.run_once [--only OP] [--small]`: one call of every case on every GPU backend, to run under a tool.

`ncu --profile-from-start off` sees the second call of each case alone, because the first one compiles. With `--small`,
for compute-sanitizer, which is slow, a ragged call of every kernel on every native backend runs in place of the cases.
"""

import argparse

import torch

import dgm_kernels
from bench.compare import NATIVE_BACKENDS, Setup, discover, running
from bench.small_calls import small_calls


def run_small(device: torch.device, only: str | None) -> None:
    """Every small call on every native backend of the device; ops without a kernel there are passed over."""
    for op, call in small_calls(only):
        for backend in NATIVE_BACKENDS[device.type]:
            if not dgm_kernels.backends()[backend].startswith("available"):
                print(f"{op}: without {backend}: {dgm_kernels.backends()[backend]}", flush=True)
                continue
            torch.manual_seed(0)
            try:
                with dgm_kernels.use_backend(backend):
                    call(device)
            except ValueError as error:
                if "has no kernel for this op" not in str(error):
                    raise
                print(f"{op}: {error}", flush=True)
                continue
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            print(f"{op}: {backend}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one op, such as sampler")
    parser.add_argument("--small", action="store_true", help="a small call of every kernel in place of the cases")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    arguments = parser.parse_args()
    only, device = arguments.only, torch.device(arguments.device)
    if arguments.small:
        return run_small(device, only)
    for op, name, build in discover(only):
        case = build(Setup(device))
        torch.manual_seed(0)
        inputs = case.make_inputs()
        for backend, contender in case.contenders.items():
            if backend.startswith("dgm "):
                with running(case, contender):
                    contender.run(inputs)
                    torch.cuda.synchronize(device)
                    with torch.cuda.profiler.profile():
                        contender.run(inputs)
                        torch.cuda.synchronize(device)
                print(f"{op} {name}: {backend}", flush=True)


if __name__ == "__main__":
    main()
