"""The dashboard: each metric that it asks for is served, with the labels by which it groups, and vLLM's pods fit in."""

from __future__ import annotations

import json
import re
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from toka_engine.control_messages import RankInfo, RankReport, RankReports
from toka_engine.messages import Stats

from tests.engine_process import ROOT
from tests.unit.server.conftest import completion_body
from tests.unit.server.harness import RunningServer, wait_until

DASHBOARD = json.loads((ROOT / "charts" / "toka" / "files" / "dashboard.json").read_text())
_OF_PROMETHEUS = {"namespace", "pod", "le"}
_NAME = r"(?:toka_|vllm:)\w+"
_OURS_ALONE = {1, 2, 9, 16, *range(19, 25)}
"""Panels of what vLLM does not tell."""


def expressions() -> list[str]:
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return found + [each["query"]["query"] for each in DASHBOARD["templating"]["list"] if each["type"] == "query"]


def labels_by_sample(server: RunningServer) -> dict[str, set[str]]:
    page = server.request("GET", "/metrics")[2].decode()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_each_metric_of_the_dashboard_is_served_with_its_labels(server: RunningServer) -> None:
    server.post("/v1/completions", completion_body())
    server.manager.send(Stats(*[3] * 15))
    server.control.send(RankReports((RankReport(RankInfo(), 1, 1.0, 1),)))
    wait_until(lambda: {"toka_running", "toka_rank_memory_bytes"} <= labels_by_sample(server).keys())
    served = labels_by_sample(server)
    asked = {name for expression in expressions() for name in re.findall(_NAME, expression)}
    assert len(asked) > 30
    assert asked - served.keys() == set()
    for expression in expressions():
        for labels in re.findall(r"by \(([^)]*)\)", expression):
            of_all = set.intersection(*(served[name] for name in re.findall(_NAME, expression)))
            assert set(re.findall(r"\w+", labels)) <= of_all | _OF_PROMETHEUS, expression


def test_a_pod_with_vllms_names_alone_or_ours_alone_is_in_every_panel_that_can_show_it() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            parts = target["expr"].split(" or ")
            if panel["id"] in _OURS_ALONE:
                assert "vllm:" not in target["expr"]
                continue
            assert len(parts) == (3 if panel["id"] == 17 else 2), panel["title"]  # 17 divides one by another
            names = [re.findall(_NAME, part) for part in parts]
            assert names[0][0].startswith("vllm:")
            assert names[-1][-1].startswith("toka_")
            assert all(re.search(r"sum by \((pod|pod, le)\) \(", part) for part in parts[1:])
    for each in DASHBOARD["templating"]["list"]:
        if each["type"] == "query":
            assert '__name__=~"toka_running|vllm:num_requests_running"' in each["query"]["query"]


def test_panels_do_not_overlap_and_name_their_data_source() -> None:
    taken: set[tuple[int, int]] = set()
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in DASHBOARD["panels"]:
        place: dict[str, Any] = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells
        assert panel["datasource"]["uid"] == "${datasource}"
