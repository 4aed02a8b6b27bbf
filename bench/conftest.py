"""The fixture and options of the benchmarks; every case of every op runs through `compare`."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch._inductor.config

from bench.compare import Case, Setup, check, make_input_sets, running
from bench.compare import compare as compare_contenders
from bench.environment import available_cores, describe

_FAILED = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--threads", default="1,2", help="numbers of CPU threads; those above the cores here are left out")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device to measure")
    group.addoption("--seconds", type=float, default=2.0, help="time for the timed rounds of a case")
    group.addoption("--compile-mode", default=None, help="mode of torch.compile, instead of the default baselines")
    group.addoption("--enforce-bars", action="store_true", help="fail a case that does not meet its bars")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FAILED] = []
    config.addinivalue_line("python_files", "bench_*.py")
    logging.getLogger("torch.__trace").propagate = False  # else a failed case shows thousands of lines of it


def _thread_counts(config: pytest.Config) -> list[int]:
    if config.getoption("--device").startswith("cuda"):
        return [1]  # the host only launches
    asked = [int(word) for word in config.getoption("--threads").split(",")]
    return [count for count in asked if count <= available_cores()] or [available_cores()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "build" in metafunc.fixturenames:
        metafunc.parametrize("build", metafunc.module.CASES.values(), ids=metafunc.module.CASES.keys())
    if "threads" in metafunc.fixturenames:
        metafunc.parametrize("threads", _thread_counts(metafunc.config), ids="{}t".format, indirect=True)


@contextmanager
def _threads_in_force(count: int) -> Iterator[None]:
    """Threads of PyTorch and of what Inductor generates, which has their number compiled in."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    torch._dynamo.reset()
    try:
        with torch._inductor.config.patch({"cpp.threads": count}):
            yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """CPU threads of the case, in force while it runs."""
    with _threads_in_force(request.param):
        yield request.param


@pytest.fixture
def compare(benchmark: Any, threads: int, request: pytest.FixtureRequest) -> Callable[[Callable[[Setup], Case]], None]:
    """`compare(build)` checks the case `build(setup)`, times it and records the result in the benchmark's JSON."""
    config = request.config
    setup = Setup(torch.device(config.getoption("--device")), threads, config.getoption("--compile-mode"))

    def run(build: Callable[[Setup], Case]) -> None:
        case = build(setup)
        try:
            if benchmark.disabled:
                benchmark(check, case, make_input_sets(case, setup.device)[0])
                return
            result, input_sets = compare_contenders(case, setup, config.getoption("--seconds"))
        except Exception as error:
            failure = {"case": case.name, "threads": threads, "reason": f"{type(error).__name__}: {error}"}
            config.stash[_FAILED].append(failure)
            raise
        benchmark.extra_info.update(result)
        _record(benchmark, case, setup, input_sets, result["contenders"][case.ours]["median_us"])
        unmet = {bar: found for bar, found in result["bars"].items() if not found["met"]}
        if unmet and config.getoption("--enforce-bars"):
            pytest.fail(f"{case.name} at {threads} threads misses its bars: {unmet}")

    return run


def _record(benchmark: Any, case: Case, setup: Setup, input_sets: list[Any], microseconds: float) -> None:
    """A short run of our contender by pytest-benchmark itself, so that its own table and JSON hold the case."""
    ours = case.contenders[case.ours]

    def call() -> None:
        ours.run(input_sets[0])
        if setup.device.type == "cuda":
            torch.cuda.synchronize(setup.device)

    benchmark.group = case.name
    with running(case, ours):
        rounds = min(10, max(1, int(2e6 / microseconds)))
        benchmark.pedantic(call, rounds=rounds, iterations=max(1, int(2000 / microseconds)), warmup_rounds=1)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # results are published; the host's name is nobody's business


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["environment"] = describe(torch.device(config.getoption("--device")))
    output_json["failed"] = config.stash[_FAILED]
