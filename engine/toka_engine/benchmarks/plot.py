"""Plots of what the benchmarks print, as SVG files that are the same bytes for the same results.

Usage: python -m toka_engine.benchmarks.plot RESULTS.json ... OUT.svg
All RESULTS are of one kind, which their contents tell:
  throughput   reports of the throughput benchmark, a line each: output tokens/s by C, the requests open at once, of one
               workload that they were given with several C; dotted: the roofline; on a CPU dashed: output tokens by the
               worker's CPU time, which other processes disturb less
  hydragen     the lines of the Hydragen sweep: step time (on a CPU its CPU time) on, off and without attention, by
               prefix, a part per rows
  comparison   {"kind": "comparison", "title", "source", "systems": [...], "workloads": [{"name", "unit", "values"}]}:
               bars of each system's values, by the first system's that has one
Needs matplotlib (the extra `dev`).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from toka_engine.output import run_command

_STYLE: Any = {
    "svg.hashsalt": "toka",  # ids inside the file do not depend on chance
    "svg.fonttype": "none",  # text stays text: smaller, and searchable
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
_NO_ATTENTION = "without attention"
_WIDTH, _HEIGHT = 7.2, 3.4
_COLOURS = ("#1b6ca8", "#d1495b", "#7f8c8d", "#e0a030")

Record = dict[str, Any]


class PlotError(ValueError):
    """Results that cannot be drawn; the message says which file and why."""


def read_results(path: Path) -> tuple[str, list[Record]]:
    """(kind, the file's JSON objects). Raises PlotError."""
    try:
        text = path.read_text(encoding="utf-8")
        lines = [text] if _is_json(text) else text.splitlines()
        records = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise PlotError(f"{path}: {error}") from error
    first = records[0] if records and isinstance(records[0], dict) else {}
    if "workloads" in first and "ready_s" in first:
        return "throughput", records
    if first.get("kind") == "machine":
        return "hydragen", records
    if first.get("kind") == "comparison":
        return "comparison", records
    raise PlotError(f"{path}: neither a throughput report, nor a Hydragen sweep, nor a comparison")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def draw_throughput(records: Sequence[Record]) -> Figure:
    """Output tokens per second by the number of requests open at once."""
    names = {name.partition(":")[0] for record in records for name in record["workloads"]}
    figure, axes = _new_figure(1, f"Output tokens/s of the workload {', '.join(sorted(names))}")
    ticks: set[int] = set()
    for record, colour in zip(records, _COLOURS, strict=False):
        points = sorted(
            (
                int(match[1]),
                each["output_tokens_per_s"],
                each["roofline"]["output_tokens_per_s"],
                _by_cpu(each["engine"]),
            )
            for name, each in record["workloads"].items()
            if (match := re.search(r"[:,]C=(\d+)", name))
        )
        if len(points) < 2:
            raise PlotError("a throughput report needs a workload with two values of C or more")
        opens, speeds, bounds, by_cpu = zip(*points, strict=True)
        ticks.update(opens)
        axes[0].plot(opens, speeds, "o-", color=colour, label=_describe(record["model"], record["machine"]))
        if record["machine"]["device"] == "cpu":
            axes[0].plot(opens, by_cpu, "--", color=colour, label="by the worker's CPU time")
        axes[0].plot(opens, bounds, ":", color=colour, label="roofline")
    axes[0].set(xscale="log", yscale="log", xlabel="requests open at once", ylabel="output tokens/s")
    axes[0].set_xticks(sorted(ticks), [str(tick) for tick in sorted(ticks)])
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:,.10g}"))
    axes[0].minorticks_off()
    _add_legend(figure, axes[0])
    return figure


def _by_cpu(engine: Record) -> float:
    return float(engine["output_tokens_per_step"] / engine["worker_cpu_ms_per_step"] * 1e3)


def draw_hydragen(records: Sequence[Record]) -> Figure:
    """Step times by prefix, one part for each (rows, own tokens)."""
    points = [record for record in records if record["kind"] == "point"]
    parts = sorted({(point["rows"], point["suffix"]) for point in points})
    if not parts:
        raise PlotError("a Hydragen sweep without points")
    figure, axes = _new_figure(len(parts), f"One decode step: {_describe(records[0]['model'], records[0])}")
    unit = "cpu_ms" if records[0]["device"] == "cpu" else "ms"
    ways = (
        (f"off_{unit}", "Hydragen off"),
        (f"on_{unit}", "Hydragen on"),
        (f"without_attention_{unit}", _NO_ATTENTION),
    )
    for (rows, suffix), part in zip(parts, axes, strict=True):
        chosen = sorted(
            (point for point in points if (point["rows"], point["suffix"]) == (rows, suffix)),
            key=lambda point: int(point["prefix"]),
        )
        places = range(len(chosen))
        for (field, label), colour, shift in zip(
            ways, (_COLOURS[1], _COLOURS[0], _COLOURS[2]), (-1, 0, 1), strict=True
        ):
            part.bar(
                [at + 0.27 * shift for at in places],
                [point[field] for point in chosen],
                0.25,
                color=colour,
                label=label,
            )
        part.set_xticks(list(places), [f"{point['prefix']:,}" for point in chosen])
        part.set(title=f"{rows:,} rows, {suffix} tokens each of their own", xlabel="shared tokens")
        part.grid(axis="x", visible=False)
    axes[0].set_ylabel("CPU ms per step" if unit == "cpu_ms" else "ms per step")
    _add_legend(figure, axes[0])
    return figure


def draw_comparison(records: Sequence[Record]) -> Figure:
    """Bars: each system's values as multiples of the first system that has one; the values stand on the bars."""
    (record,) = records
    systems, workloads = record["systems"], record["workloads"]
    figure, (axis,) = _new_figure(1, record["title"])
    width = 0.8 / len(systems)
    for index, (system, colour) in enumerate(zip(systems, _COLOURS, strict=False)):
        for place, workload in enumerate(workloads):
            value = workload["values"].get(system)
            if value is None:
                continue
            base = next(workload["values"][each] for each in systems if workload["values"].get(each) is not None)
            label = system if place == _first_place(workloads, system) else None
            at = place + (index - (len(systems) - 1) / 2) * width
            axis.bar(at, value / base, width * 0.92, color=colour, label=label)
            axis.text(at, value / base, _short(value), ha="center", va="bottom", fontsize=8)
    axis.set_xticks(range(len(workloads)), [f"{each['name']}\n{each['unit']}" for each in workloads])
    axis.set_ylabel(f"by {systems[0]}")
    axis.grid(axis="x", visible=False)
    _add_legend(figure, axis)
    return figure


def _first_place(workloads: Sequence[Record], system: str) -> int:
    return next(place for place, each in enumerate(workloads) if each["values"].get(system) is not None)


def _short(value: float) -> str:
    return f"{value / 1000:,.4g} k" if value >= 10_000 else f"{value:,.4g}"


def _describe(model: str, machine: Record) -> str:
    threads = f", {machine['threads']} thread" + "s" * (machine["threads"] > 1) if machine["device"] == "cpu" else ""
    return f"{model}, {machine['dtype']}, {machine['name']}{threads}"


def _new_figure(num_parts: int, title: str) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(
        1, num_parts, figsize=(_WIDTH, _HEIGHT), sharey=num_parts > 1, squeeze=False, layout="constrained"
    )
    figure.suptitle(title, fontsize=10)
    return figure, list(axes[0])


def _add_legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


_DRAW: dict[str, Callable[[Sequence[Record]], Figure]] = {
    "throughput": draw_throughput,
    "hydragen": draw_hydragen,
    "comparison": draw_comparison,
}


def draw(paths: Sequence[Path], out: Path) -> None:
    """Write the plot of `paths` to `out`. Raises PlotError."""
    results = [read_results(path) for path in paths]
    kinds = {kind for kind, _ in results}
    if len(kinds) != 1:
        raise PlotError(f"results of several kinds: {', '.join(sorted(kinds))}")
    records = [record for _, each in results for record in each]
    (kind,) = kinds
    if kind == "comparison" and len(records) != 1:
        raise PlotError("a comparison is drawn alone")
    with matplotlib.rc_context(_STYLE):
        figure = _DRAW[kind](records)
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    paths = [Path(word) for word in words]
    if len(paths) < 2 or paths[-1].suffix != ".svg":
        print(__doc__, file=sys.stderr)
        return 2
    try:
        draw(paths[:-1], paths[-1])
    except PlotError as error:
        print(f"toka_engine.benchmarks.plot: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_command(main, __doc__)
