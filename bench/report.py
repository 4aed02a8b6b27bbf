"""`python -m bench.report [JSON] [--out DIR]`: a benchmark's JSON as a table, two pictures and one HTML page."""

import argparse
import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import pictures
from bench.compare import UPPER_BOUNDS, family
from bench.markdown import markdown_table

RESULTS = Path(__file__).parent / "results"
HEADINGS = (
    "case", "threads", "ours us", "floor us", "time/floor", "vs eager", "vs compile", "vs peer", "bars", "max error",
    "peak memory",
)  # fmt: skip
DETAIL_HEADINGS = ("case", "threads", "contender", "median us", "IQR us", "ratio", "max error", "peak memory")
NONE = "-"
BUSY_CORES = 0.1  # a run that shares its cores more than this is remarked on
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1b1f24; }
table { border-collapse: collapse; margin: 1rem 0 2rem; font-variant-numeric: tabular-nums; display: block;
        overflow-x: auto; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #d6dade; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #1b1f24; }
img { max-width: 100%; display: block; margin: 1rem 0 2rem; }
dl { display: grid; grid-template-columns: max-content auto; gap: .1rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; }
"""


def _number(value: float | None, suffix: str = "") -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return NONE
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}{suffix}"


def _bytes(count: int | None) -> str:
    if count is None:
        return NONE
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _ratio_to(result: dict[str, Any], wanted: Sequence[str]) -> str:
    """Ratio to the fastest contender of the wanted families."""
    contenders = result["contenders"]
    ratios = [found["ratio"] for name, found in contenders.items() if family(name) in wanted and name != result["ours"]]
    return _number(min(ratios), "x") if ratios else NONE


def _peers(result: dict[str, Any]) -> list[str]:
    own = {"eager", "compile", family(result["ours"])}
    return sorted({family(name) for name in result["contenders"]} - own)


def _bars(result: dict[str, Any]) -> str:
    bars = result["bars"]
    if not bars:
        return NONE
    unmet = []
    for bar, found in bars.items():
        if not found["met"]:
            sign = ">" if bar in UPPER_BOUNDS else "<"
            measured = _number(found["measured"]) if found["measured"] is not None else "unmeasured"
            unmet.append(f"{bar} {measured} {sign} {_number(found['required'])}")
    return f"met ({len(bars)})" if not unmet else "not met: " + ", ".join(unmet)


def summary_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """One row a case and number of threads, under `HEADINGS`."""
    rows = []
    for result in results:
        ours = result["contenders"][result["ours"]]
        row = [result["case"], str(result["threads"]), _number(ours["median_us"]), _number(result["floor"]["us"])]
        row += [_number(result["over_floor"]), _ratio_to(result, ["eager"]), _ratio_to(result, ["compile"])]
        row += [_ratio_to(result, _peers(result)), _bars(result), f"{ours['max_error']:.1e}"]
        rows.append([*row, _bytes(ours["peak_bytes"])])
    return rows


def detail_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """One row a contender, under `DETAIL_HEADINGS`."""
    rows = []
    for result in results:
        for name, found in result["contenders"].items():
            times = [_number(found["median_us"]), _number(found["iqr_us"]), _number(found["ratio"], "x")]
            measured = [*times, f"{found['max_error']:.1e}", _bytes(found["peak_bytes"])]
            rows.append([result["case"], str(result["threads"]), name, *measured])
    return rows


def remarks(results: Sequence[dict[str, Any]], failed: Sequence[dict[str, Any]]) -> list[str]:
    """Cases that report no speed or were disturbed, and contenders left out, with the reasons."""
    lines = [f"{found['case']}, {found['threads']} threads: no speed, {found['reason']}" for found in failed]
    lines += [
        f"{result['case']}, {result['threads']} threads: its times say little, since other processes kept "
        f"{result['cores_busy_elsewhere']:.1f} cores busy"
        for result in results
        if result["cores_busy_elsewhere"] > BUSY_CORES
    ]
    missing = {(result["case"], name, reason) for result in results for name, reason in result["missing"].items()}
    return lines + [f"{case}: without {name}: {reason}" for case, name, reason in sorted(missing)]


def environment_rows(environment: dict[str, Any], results: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """What the run was made with, and how busy the machine was."""
    rows = [(key, str(value)) for key, value in environment.items() if key != "slug" and value is not None]
    loads = [load[0] for result in results for load in result["load_average"].values()]
    if loads:
        rows.append(("load average", f"{min(loads):.2f} to {max(loads):.2f}"))
    return rows


def _markdown(environment: list[tuple[str, str]], results: Sequence[dict[str, Any]], notes: Sequence[str]) -> str:
    parts = ["# Results", ", ".join(f"{key} {value}" for key, value in environment)]
    parts += [markdown_table(HEADINGS, summary_rows(results)), "\n".join(f"- {note}" for note in notes)]
    parts += ["![Speed-up](speedup.png)", "![Roofline](roofline.png)", "## All contenders"]
    parts += [markdown_table(DETAIL_HEADINGS, detail_rows(results))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _html_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    body = "\n".join(cells("td", row) for row in rows)
    return f"<table><thead>{cells('th', headings)}</thead>\n<tbody>{body}</tbody></table>"


def _html(
    environment: list[tuple[str, str]], results: Sequence[dict[str, Any]], notes: Sequence[str], images: Sequence[Path]
) -> str:
    listed = "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in environment)
    embedded = [
        f'<img alt="{path.stem}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for path in images
    ]
    body = ["<h1>dgm-kernels benchmarks</h1>", f"<dl>{listed}</dl>", _html_table(HEADINGS, summary_rows(results))]
    body += ["<ul>", *(f"<li>{html.escape(note)}</li>" for note in notes), "</ul>"] if notes else []
    body += [*embedded, "<h2>All contenders</h2>", _html_table(DETAIL_HEADINGS, detail_rows(results))]
    head = f'<meta charset="utf-8"><title>dgm-kernels benchmarks</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def write(data: dict[str, Any], out: Path | None = None) -> Path:
    """Write results.md, speedup.png, roofline.png and index.html; returns their folder."""
    results = [found["extra_info"] for found in data["benchmarks"] if "contenders" in found["extra_info"]]
    results.sort(key=lambda result: result["threads"])
    folder = out or RESULTS / data["environment"]["slug"]
    folder.mkdir(parents=True, exist_ok=True)
    notes = remarks(results, data["failed"])
    environment = environment_rows(data["environment"], results)
    images = [folder / "speedup.png", folder / "roofline.png"]
    pictures.speedup(results, images[0])
    pictures.roofline(results, images[1])
    (folder / "results.md").write_text(_markdown(environment, results, notes))
    (folder / "index.html").write_text(_html(environment, results, notes, images))
    print(markdown_table(HEADINGS, summary_rows(results)), *notes, f"\nwritten to {folder}", sep="\n")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", nargs="?", type=Path, default=RESULTS / "benchmark.json", help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="folder; default: bench/results/<device>")
    arguments = parser.parse_args()
    write(json.loads(arguments.json.read_text()), arguments.out)


if __name__ == "__main__":
    main()
