"""The machinery of the benchmarks: its gate, its medians, its report, and the ahead-of-time compile."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import report, timing
from bench.compare import Case, Contender, Setup, WrongResult, check, compare, judge, ours, summarize
from bench.environment import describe

SETUP = Setup(torch.device("cpu"), torch.get_num_threads())
ROOT = Path(__file__).parents[1]


def square_case(ours: Callable[[torch.Tensor], torch.Tensor] = torch.square, **fields: Any) -> Case:
    """x * x on a few numbers, against eager multiplication."""
    contenders = {"dgm cpp": Contender(ours), "eager": Contender(lambda x: x * x)}
    fields = {"contenders": contenders, "bytes": 8 * 64, "flops": 64, **fields}
    return Case("square 64", lambda: torch.randn(64), reference=lambda x: x.double() ** 2, **fields)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x * x * (1 + 1e-5),
        lambda x: torch.where(x == x.max(), torch.nan, x * x),
        lambda x: torch.where(x == x.max(), torch.inf, x * x),
        lambda x: (x * x)[:32],
    ],
    ids=["off by 1e-5", "a NaN", "an infinity", "half of it"],
)
def test_wrong_result_reports_no_speed(wrong: Callable[[torch.Tensor], torch.Tensor], monkeypatch: Any) -> None:
    monkeypatch.setattr(timing, "interleave", lambda *args: pytest.fail("timed before the check"))
    with pytest.raises(WrongResult, match="dgm cpp"):
        compare(square_case(wrong), SETUP)


def test_baseline_that_raises_is_left_out_with_its_reason() -> None:
    case = square_case()
    broken = Contender(lambda x: x @ torch.ones(3))
    case = square_case(contenders={**case.contenders, "peer": broken}, bars={"peer": 1.0})
    result, _ = compare(case, SETUP, seconds=0.01)
    assert set(result["contenders"]) == {"dgm cpp", "eager"}
    assert result["missing"]["peer"].startswith("RuntimeError: ")
    assert result["bars"]["peer"] == {"required": 1.0, "measured": None, "met": False}
    ours_broken = square_case(contenders={"dgm cpp": broken, "eager": case.contenders["eager"]})
    with pytest.raises(RuntimeError):
        check(ours_broken, torch.randn(64))


def test_ratios_come_from_medians_of_rounds() -> None:
    times = {"dgm cpp": [2e-6, 1e-6, 9e-6], "eager": [20e-6, 90e-6, 10e-6], "compile": [8e-6, 5e-6, 6e-6]}
    case = square_case(bars={"eager": 10.0, "compile": 3.1, "us": 2.0, "floor": 1.9})
    # 512 bytes at 1 GB/s are 0.512 us; 64 operations at 64 MFLOP/s are 1 us, so the floor is 1 us.
    result = summarize(case, SETUP, times, copy_times=[1e-3, 2e-3, 1e-3], copy_bytes=10**6, matmul_rate=64e6)
    medians = {name: found["median_us"] for name, found in result["contenders"].items()}
    assert medians == pytest.approx({"dgm cpp": 2.0, "eager": 20.0, "compile": 6.0})
    assert {name: found["ratio"] for name, found in result["contenders"].items()} == pytest.approx(
        {"dgm cpp": 1.0, "eager": 10.0, "compile": 3.0}
    )
    assert result["floor"]["us"] == pytest.approx(1.0) and result["floor"]["bound"] == "matmul"
    assert result["over_floor"] == pytest.approx(2.0)
    met = {bar: found["met"] for bar, found in result["bars"].items()}
    assert met == {"eager": True, "compile": False, "us": True, "floor": False}


def test_part_of_the_work_counts_as_often_as_it_is_needed(monkeypatch: Any) -> None:
    """A contender whose run is a fifth of the work: 2 us are 10 us."""
    monkeypatch.setattr(timing, "interleave", lambda entries, *_: {name: [2e-6] for name in entries})
    monkeypatch.setattr("bench.floor.matmul_rate", lambda *_: 1e9)
    contenders = {"dgm cpp": Contender(torch.square), "eager": Contender(lambda x: x * x, repeats=5)}
    result, _ = compare(square_case(contenders=contenders), SETUP)
    medians = {name: found["median_us"] for name, found in result["contenders"].items()}
    assert medians == pytest.approx({"dgm cpp": 2.0, "eager": 10.0})


@pytest.mark.parametrize(("seconds_of_a_call", "rounds"), [(0.125, 16), (0.5, 7), (1.5, 4), (6.0, 3)])
def test_slow_entries_take_few_rounds(seconds_of_a_call: float, rounds: int, monkeypatch: Any) -> None:
    """Two seconds and seven rounds at least, unless fewer rounds last six seconds."""
    now = 0.0

    def call(_: Any) -> None:
        nonlocal now
        now += seconds_of_a_call

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    entry = timing.Entry(call, [None], torch.no_grad)
    assert len(timing.interleave({"slow": entry}, SETUP.device, 2.0)["slow"]) == rounds


def test_bar_holds_against_the_fastest_of_a_family() -> None:
    judged = judge(square_case(bars={"compile": 4.0}), 1.0, 1.0, {"compile": 5.0, "compile graphs": 3.0, "eager": 2.0})
    assert judged == {"compile": {"required": 4.0, "measured": 3.0, "met": False}}


def test_memory_bar_is_the_ratio_of_eager_peak_to_ours() -> None:
    eager = Contender(lambda x: torch.stack([x, x, x, x])[0] * x)  # four copies, then the result
    case = square_case(bars={"memory": 4.0})
    case = square_case(contenders={**case.contenders, "eager": eager}, bars={"memory": 4.0})
    result, _ = compare(case, SETUP, seconds=0.01)
    peaks = {name: found["peak_bytes"] for name, found in result["contenders"].items()}
    assert result["bars"]["memory"] == {"required": 4.0, "measured": peaks["eager"] / peaks["dgm cpp"], "met": True}
    assert peaks == {"dgm cpp": 256, "eager": 5 * 256}
    assert judge(case, 1.0, 1.0, {}, saving=3.9)["memory"] == {"required": 4.0, "measured": 3.9, "met": False}


def test_ours_runs_on_the_backends_that_have_kernels() -> None:
    contenders, missing = ours(torch.square, SETUP, natives=(), check=torch.sqrt)
    assert list(contenders) == ["dgm reference"] and missing == {}
    assert contenders["dgm reference"].check is torch.sqrt
    everywhere, missing = ours(torch.square, SETUP)
    assert [*everywhere, *missing] in (["dgm cpp"], ["dgm reference", "dgm cpp"])


def test_rounds_are_interleaved(monkeypatch: Any) -> None:
    order: list[str] = []
    monkeypatch.setattr(timing, "_warm_up", lambda entry, device: 1)
    entries = {
        name: timing.Entry(lambda _, name=name: order.append(name), [None], torch.no_grad) for name in ("a", "b", "c")
    }
    times = timing.interleave(entries, torch.device("cpu"), seconds=0)
    assert order[:9] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert {name: len(found) for name, found in times.items()} == dict.fromkeys("abc", timing.MIN_ROUNDS)


def test_peak_memory_counts_what_lives_at_the_same_time() -> None:
    x = torch.empty(1 << 18)  # 1 MiB

    def call() -> torch.Tensor:
        y = x * x
        z = y * x
        del y
        return z * x

    with torch.no_grad():
        assert timing.peak_memory(call, torch.device("cpu")) / 2**20 == pytest.approx(2, abs=0.01)


def fake_result(case: str, threads: int, ratio: float) -> dict[str, Any]:
    setup = Setup(torch.device("cpu"), threads)
    times = {"dgm cpp": [1e-6] * 3, "eager": [ratio * 1e-6] * 3, "diffusers": [40e-6] * 3}
    result = summarize(square_case(bars={"eager": 10.0}), setup, times, [1e-6] * 3, 1024, 1e9)
    for found in result["contenders"].values():
        found |= {"max_error": 1e-7, "peak_bytes": 3 << 20}
    load = {"before": [0.5], "after": [1]}
    more = {"missing": {"compile": "no compiler"}, "load_average": load, "cores_busy_elsewhere": 0.9 * (threads == 2)}
    return {**result, "case": case, **more}


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = [fake_result("one", 1, 12.0), fake_result("two", 2, 8.0)]
    data = {
        "benchmarks": [{"extra_info": result} for result in results],
        "environment": describe(torch.device("cpu")),
        "failed": [{"case": "three", "threads": 1, "reason": "WrongResult: off <by> a lot"}],
    }
    assert report.write(data, tmp_path) == tmp_path
    table = (tmp_path / "results.md").read_text()
    one = re.search(r"\| one .*", table)
    two = re.search(r"\| two .*", table)
    assert one is not None and two is not None
    assert [cell.strip() for cell in one[0].split("|")[1:-1]] == [
        "one", "1", "1.00", "0.50", "2.00", "12.0x", "-", "40.0x", "met (1)", "1.0e-07", "3.0 MiB",
    ]  # fmt: skip
    assert "not met: eager 8.00 < 10.0" in two[0]
    printed = capsys.readouterr().out
    for text in (
        "three, 1 threads: no speed, WrongResult",
        "without compile: no compiler",
        "two, 2 threads: its times say little",
    ):
        assert text in table and text in printed
    assert "one, 1 threads: its" not in printed
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "off &lt;by&gt; a lot" in page
    for picture in ("speedup.png", "roofline.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


TOY = """
import torch
from bench.compare import Case, Contender

def case(setup, factor):
    contenders = {"dgm cpp": Contender(lambda x: x * factor), "eager": Contender(lambda x: x * 2)}
    return Case(f"times {factor}", lambda: torch.randn(64), contenders, lambda x: x.double() * 2, bytes=512,
                bars={"us": 1e-6})

def test_right(compare):
    compare(lambda setup: case(setup, 2))

def test_wrong(compare):
    compare(lambda setup: case(setup, 3))
"""


@pytest.mark.parametrize("enforce", [False, True])
def test_fixture_writes_the_json_that_the_report_reads(tmp_path: Path, enforce: bool) -> None:
    (tmp_path / "bench_toy.py").write_text(TOY)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.conftest", "-p", "no:cacheprovider", str(tmp_path)]
    command += ["-c", "/dev/null", "--rootdir", str(tmp_path), "--device", "cpu", "--threads", "1", "--seconds", "0.01"]
    command += ["--benchmark-only", f"--benchmark-json={tmp_path / 'out.json'}", *["--enforce-bars"] * enforce]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ("2 failed" if enforce else "1 failed, 1 passed") in done.stdout, done.stdout + done.stderr
    data = json.loads((tmp_path / "out.json").read_text())
    assert [found["extra_info"]["case"] for found in data["benchmarks"]] == ["times 2"]
    assert [found["case"] for found in data["failed"]] == ["times 3"]
    info = data["benchmarks"][0]["extra_info"]
    assert info["bars"]["us"]["met"] is False and info["threads"] == 1 and len(info["load_average"]["after"]) == 3
    assert info["contenders"]["eager"]["peak_bytes"] in range(256, 300) and info["over_floor"] > 0
    assert data["environment"]["torch"] == torch.__version__ and "node" not in data["machine_info"]
    report.write(data, tmp_path / "report")
    assert "times 3, 1 threads: no speed" in (tmp_path / "report" / "results.md").read_text()


KERNELS = """
import triton
import triton.language as tl

@triton.jit
def scale(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.sin(tl.load(x + i, mask=i < n)), mask=i < n)
"""


def test_ahead_of_time_compile(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "toy_kernels.py").write_text(KERNELS)
    from bench import aot

    scale = __import__("toy_kernels").scale
    signature = {"x": "*fp32", "y": "*fp32", "n": "i64"}
    small = aot.Spec("small", scale, signature, {"BLOCK": 256}, {"num_warps": 4})
    usages = aot.compile_all([small])
    assert [usage.target for usage in usages] == ["sm_80", "sm_90a", "sm_100a"]
    assert all(0 < usage.registers <= 255 and usage.spill_bytes == 0 for usage in usages)
    # 24 registers a thread cannot hold 128 elements.
    spilling = aot.Spec("large", scale, signature, {"BLOCK": 4096}, {"num_warps": 1, "maxnreg": 24})
    assert aot.compile_spec(spilling, 90).spill_bytes > 0
    monkeypatch.setattr(aot, "op_specs", lambda: iter([small, spilling]))
    monkeypatch.setattr(sys, "argv", ["aot", "--out", str(tmp_path / "aot.md")])
    with pytest.raises(SystemExit, match=r"registers spilled by large \(sm_80\)"):
        aot.main()
    assert (tmp_path / "aot.md").read_text().count("| small") == 1  # one line for the three targets


def test_small_calls_run_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    from bench import run_once, small_calls

    ops = {path.name for path in (ROOT / "csrc").iterdir() if (path / "launch.cpp").exists()}
    assert set(small_calls.CALLS) == ops
    run_once.run_small(torch.device("cpu"), None)
    assert {line.split(":")[0] for line in capsys.readouterr().out.splitlines()} == ops


def test_aot_occupancy():
    """Registers of a warp come in units of 256, blocks take 1 KiB of shared memory for themselves."""
    from bench.aot import occupancy

    assert occupancy(90, 4, 255, 0) == 8 / 64
    assert occupancy(90, 4, 32, 0) == 1.0
    assert occupancy(80, 4, 33, 0) == 48 / 64
    assert occupancy(90, 8, 64, 113 << 10) == 16 / 64
    assert occupancy(80, 8, 64, 100 << 10) == 8 / 64


def test_case_wants_ours_first_and_eager() -> None:
    names = SimpleNamespace(ours=Contender(torch.square), eager=Contender(torch.square))
    for contenders in ({"eager": names.eager}, {"eager": names.eager, "dgm cpp": names.ours}, {"dgm cpp": names.ours}):
        with pytest.raises(ValueError, match="expected ours first"):
            square_case(contenders=contenders)
