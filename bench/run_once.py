"""`python -m bench.run_once [--only OP]`: one call of every case on every GPU backend, to run under a tool.

compute-sanitizer checks all of it; `ncu --profile-from-start off` sees the second call of each case alone, because the
first one compiles.
"""

import argparse

import torch

from bench.compare import Setup, discover, running


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one op, such as sampler")
    only = parser.parse_args().only
    device = torch.device("cuda")
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
