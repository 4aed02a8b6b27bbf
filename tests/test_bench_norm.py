"""The contenders of the norm op's benchmark compute one function, shown at small sizes and without compiling."""

from collections.abc import Callable

import pytest
import torch

from bench import bench_norm
from bench.compare import Case, Setup, check, make_input_sets

SETUP = Setup(torch.device("cpu"), torch.get_num_threads())
SMALL = {"TOKENS_SHAPE": (9, 10), "DIT_SHAPE": (3, 5, 10), "IMAGE_SHAPE": (3, 8, 3, 5), "IMAGE_GROUPS": 4}


@pytest.fixture(autouse=True)
def small_and_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(bench_norm, name, value)
    monkeypatch.setattr(bench_norm, "variants", lambda function, setup: {"eager": function})


@pytest.mark.parametrize(
    ("build", "tensors"),
    [
        (lambda: bench_norm.layer(SETUP, (9, 10)), 2 * 90),
        (lambda: bench_norm.layer(SETUP, (9, 10), train=True), 5 * 90),
        (lambda: bench_norm.rms(SETUP, train=True), 5 * 90),
        (lambda: bench_norm.adaptive(SETUP), 4 * 150),
        (lambda: bench_norm.adaptive(SETUP, train=True), 10 * 150),
        (lambda: bench_norm.group(SETUP, modulated=True), 2 * 360),
        (lambda: bench_norm.group(SETUP, modulated=True, train=True), 5 * 360),
        (lambda: bench_norm.group(SETUP, train=True), 5 * 360),
    ],
)
def test_contenders_agree_and_bytes_are_the_fewest(build: Callable[[], Case], tensors: int):
    case = build()
    assert case.bytes == 4 * tensors
    errors, unavailable = check(case, make_input_sets(case, SETUP.device)[0])
    assert unavailable == {}
    assert set(errors) == {case.ours, "eager"}


def test_bars_bind_at_two_threads():
    two, one = (Setup(torch.device("cpu"), threads) for threads in (2, 1))
    for name, required in (("layer-train", 1.3), ("adaptive-train", 3), ("group-train", 2.5)):
        assert bench_norm.CASES[name](two).bars == {"eager": required, "compile": 1}
        assert bench_norm.CASES[name](one).bars == {}
