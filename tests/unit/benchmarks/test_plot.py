"""Plots: the committed ones are what the command makes of the committed results, and bad results are named."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from toka_engine.benchmarks.plot import main

from tests.engine_process import ROOT

RESULTS = sorted(path for path in (ROOT / "docs/plots").iterdir() if path.suffix in (".json", ".jsonl"))
SVG = "{http://www.w3.org/2000/svg}"
MACHINE = {"device": "cpu", "dtype": "float32", "name": "a processor", "threads": 2}
COMPARISON: dict[str, Any] = {
    "kind": "comparison",
    "title": "apples",
    "systems": ["ours", "theirs"],
    "workloads": [
        {"name": "one", "unit": "out/s", "values": {"ours": 1234, "theirs": 617}},
        {"name": "two", "unit": "in/s", "values": {"ours": 5600}},
    ],
}


def speed_of(output: float) -> dict[str, Any]:
    engine = {"output_tokens_per_step": output / 100, "worker_cpu_ms_per_step": 8.0}
    return {"output_tokens_per_s": output, "roofline": {"output_tokens_per_s": 2 * output}, "engine": engine}


REPORT: dict[str, Any] = {
    "ready_s": 1.0,
    "model": "tiny",
    "machine": MACHINE,
    "workloads": {f"chat:N=8,C={opens}": speed_of(100.0 * opens) for opens in (16, 2, 4)},
}
POINT = {"kind": "point", "suffix": 8, "on_cpu_ms": 2.0, "off_cpu_ms": 3.0, "without_attention_cpu_ms": 1.5}
SWEEP: list[dict[str, Any]] = [
    {"kind": "machine", "model": "tiny", **MACHINE},
    *({**POINT, "rows": rows, "prefix": prefix} for rows in (2, 6) for prefix in (64, 1024)),
    {"kind": "nothing_shared", "rows": 2},
]


def texts_of(path: Path) -> list[str]:
    return [each.text or "" for each in ElementTree.parse(path).iter(f"{SVG}text")]


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.mark.parametrize("results", RESULTS, ids=lambda path: path.stem)
def test_a_committed_plot_is_what_its_results_give(results: Path, tmp_path: Path) -> None:
    committed = results.with_suffix(".svg")
    assert main([str(results), str(tmp_path / "again.svg")]) == 0
    assert (tmp_path / "again.svg").read_bytes() == committed.read_bytes()
    assert committed.stat().st_size < 100_000
    pages = [ROOT / "docs/performance.md", *(ROOT / "docs/lab").glob("*.md")]
    assert any(f"plots/{committed.name}" in page.read_text() for page in pages)


def test_there_are_plots_of_each_kind() -> None:
    assert {path.stem for path in RESULTS} >= {"peers", "streams-cpu", "hydragen-cpu"}


def test_a_comparison_shows_every_value_and_no_bar_where_there_is_none(tmp_path: Path) -> None:
    out = tmp_path / "out.svg"
    assert main([str(write(tmp_path / "data.json", COMPARISON)), str(out)]) == 0
    texts = texts_of(out)
    assert {"apples", "ours", "theirs", "1,234", "617", "5,600"} <= set(texts)
    styles = [
        each.get("style", "") for each in ElementTree.parse(out).iter(f"{SVG}path") if each.get("clip-path") is not None
    ]
    assert sorted(style for style in styles if "#" in style and "stroke" not in style) == [
        "fill: #1b6ca8", "fill: #1b6ca8", "fill: #d1495b",
    ]  # fmt: skip


def test_a_throughput_report_is_drawn_by_its_open_requests(tmp_path: Path) -> None:
    out = tmp_path / "out.svg"
    assert main([str(write(tmp_path / "data.json", REPORT)), str(out)]) == 0
    texts = texts_of(out)
    assert [text for text in texts if text.isdecimal()][:3] == ["2", "4", "16"]
    assert "tiny, float32, a processor, 2 threads" in texts
    assert {"roofline", "by the worker's CPU time"} <= set(texts)


def test_a_hydragen_sweep_has_a_part_for_each_number_of_rows(tmp_path: Path) -> None:
    out = tmp_path / "out.svg"
    assert main([str(write(tmp_path / "data.jsonl", *SWEEP)), str(out)]) == 0
    texts = texts_of(out)
    assert [text for text in texts if "rows" in text] == [f"{rows} rows, 8 tokens each of their own" for rows in (2, 6)]
    assert texts.count("1,024") == 2
    assert {"Hydragen on", "Hydragen off", "without attention"} <= set(texts)


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ([{"kind": "else"}], "neither"),
        ([{**REPORT, "workloads": {"single": speed_of(1.0)}}], "two values of C"),
        ([SWEEP[0]], "without points"),
        ([[1, 2]], "neither"),
    ],
)
def test_what_cannot_be_drawn_is_said(
    records: list[Any], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data.json", *records)
    assert main([str(data), str(tmp_path / "out.svg")]) == 1
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out.svg").exists()


def test_results_of_two_kinds_and_broken_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write(tmp_path / "a.json", REPORT), write(tmp_path / "b.jsonl", *SWEEP)
    broken = tmp_path / "c.json"
    broken.write_text('{"kind": "comp')
    out = str(tmp_path / "out.svg")
    assert main([str(first), str(second), out]) == 1
    assert "several kinds" in capsys.readouterr().err
    for path in (broken, tmp_path / "missing.json"):
        assert main([str(path), out]) == 1
        assert path.name in capsys.readouterr().err
    assert main([str(first)]) == 2
