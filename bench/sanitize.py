"""`compute-sanitizer python -m bench.sanitize [--only OP]`: one call of every case on every GPU backend."""

import argparse

import torch

from bench.compare import Setup, discover, running


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="one op, such as sampler")
    only = parser.parse_args().only
    device = torch.device("cuda")
    for _, name, build in discover(only):
        case = build(Setup(device))
        torch.manual_seed(0)
        inputs = case.make_inputs()
        for contender in [found for found in case.contenders if found.startswith("dgm ")]:
            with running(case, case.contenders[contender]):
                case.contenders[contender].run(inputs)
            torch.cuda.synchronize(device)
            print(f"{name}: {contender}", flush=True)


if __name__ == "__main__":
    main()
