"""The two pictures of a report: speed-up over the baselines, and measured points under the measured roofline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

BASELINE_COLORS = {"eager": "#4477aa", "compile": "#ee8866", "compile graphs": "#bbaa33", "diffusers": "#228833"}
SPARE_COLORS = ("#aa3377", "#66ccee", "#999999", "#222222", "#882255", "#44aa99", "#ddcc77", "#332288")
THREAD_COLORS = ("#4477aa", "#cc3311", "#228833", "#aa3377")


def _plain_ticks(axis: Axis) -> None:
    """Ticks at 1, 2 and 5 of every decade, written without exponents."""
    low, high = axis.get_view_interval()
    wide = high / low > 1e4  # 2s and 5s would run into one another
    axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _threads(result: dict[str, Any]) -> str:
    if result["device"] == "cuda":
        return "CUDA"
    return "1 thread" if result["threads"] == 1 else f"{result['threads']} threads"


def speedup(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Horizontal bars, one a baseline, grouped by case: how many times ours is faster, on a logarithmic axis.

    Of the numbers of threads only the largest is drawn.
    """
    results = [result for result in results if result["threads"] == max(other["threads"] for other in results)]
    groups = [
        (result, {name: found["ratio"] for name, found in result["contenders"].items() if name != result["ours"]})
        for result in results
    ]
    names = list(dict.fromkeys(name for _, ratios in groups for name in ratios))
    spare = iter(SPARE_COLORS * len(names))
    colors = {name: BASELINE_COLORS.get(name) or next(spare) for name in names}
    lines = sum(len(ratios) + 1 for _, ratios in groups)
    figure, axes = plt.subplots(figsize=(11, 1.5 + 0.24 * lines), layout="constrained")
    line, ticks, labels = 0, [], []
    for result, ratios in groups:
        ticks.append(line + (len(ratios) - 1) / 2)
        labels.append(f"{result['case']}, {_threads(result)}")
        for name, ratio in ratios.items():
            # Bars start at 1, so that a slower case points to the left.
            axes.barh(line, ratio - 1, left=1, height=0.85, color=colors[name])
            text = f"{ratio:.0f}x" if ratio >= 1000 else f"{ratio:.3g}x"
            axes.annotate(text, (max(ratio, 1), line), (4, 0), textcoords="offset points", va="center", size=8)
            line += 1
        line += 1
    everything = [1.0, *(ratio for _, ratios in groups for ratio in ratios.values())]
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xscale="log", xlim=(min(0.7, min(everything) / 1.2), max(3, max(everything)) * 2.5), ylim=(line - 0.5, -1))
    _plain_ticks(axes.xaxis)
    axes.set_yticks(ticks, labels)
    axes.set_xlabel("time of the baseline / time of dgm_kernels   (right of 1: dgm_kernels is faster)")
    handles = [Patch(color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=min(5, max(1, len(handles))), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _roofs(axes: Axes, results: Sequence[dict[str, Any]], low: float, high: float) -> None:
    """For each number of threads the fastest copy (slanted) and matrix product (level) measured in this run."""
    for color, threads in zip(THREAD_COLORS, sorted({result["threads"] for result in results}), strict=False):
        same = [result for result in results if result["threads"] == threads]
        copy = max(result["floor"]["copy_bytes_per_s"] for result in same)
        matmul = max(result["floor"]["matmul_flops_per_s"] for result in same)
        ridge = matmul / copy
        label = f"{_threads(same[0])}: copy {copy / 1e9:.0f} GB/s, matmul {matmul / 1e9:.0f} GFLOP/s"
        corners = [low, ridge, max(high, 2 * ridge)]
        axes.plot(corners, [low * copy / 1e9, matmul / 1e9, matmul / 1e9], color=color, linewidth=1.5, label=label)


def roofline(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Operations a second over operations a byte of our contender, below the measured ceilings.

    Cases that count no floating-point operation have no place on it.
    """
    points = [result for result in results if result["floor"]["flops"] > 0]
    intensities = [result["floor"]["flops"] / result["floor"]["bytes"] for result in points] or [1.0]
    markers = {case: f"${i}$" for i, case in enumerate(dict.fromkeys(r["case"] for r in points), 1)}
    figure, axes = plt.subplots(figsize=(13, max(6, 0.21 * len(markers))), layout="constrained")
    _roofs(axes, results, min(intensities) / 3, max(intensities) * 3)
    threads = sorted({result["threads"] for result in results})
    for result, intensity in zip(points, intensities, strict=False):
        seconds = result["contenders"][result["ours"]]["median_us"] * 1e-6
        gflops = result["floor"]["flops"] / seconds / 1e9
        color = THREAD_COLORS[threads.index(result["threads"]) % len(THREAD_COLORS)]
        axes.plot(intensity, gflops, marker=markers[result["case"]], color=color, markersize=8)
    axes.set(xscale="log", yscale="log")
    _plain_ticks(axes.xaxis)
    _plain_ticks(axes.yaxis)
    axes.grid(True, which="major", alpha=0.3)
    axes.set_xlabel("floating-point operations per byte that must move")
    axes.set_ylabel("GFLOP/s")
    style: dict[str, Any] = {"linestyle": "none", "color": "black"}
    cases = [Line2D([], [], marker=marker, label=case, **style) for case, marker in markers.items()]
    figure.legend(
        handles=[*axes.get_lines()[: len(threads)], *cases], loc="outside right upper", frameon=False, fontsize=9
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
