"""`kubectl toka top`: what each engine does now, from its own metrics, read through the API server's proxy of pods."""

from __future__ import annotations

import re
from typing import Any

from kubectl_toka.kubectl import Kubectl, KubectlError
from kubectl_toka.names import pod_selector

Json = dict[str, Any]
COLUMNS = {
    "RUNNING": "toka_running",
    "WAITING": "toka_waiting",
    "KV-USED": "toka_kv_pages_used",
    "KV-TOTAL": "toka_kv_pages_total",
}
"""Column of the table -> the engine's metric; a test compares them with the engine's."""
_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{[^}]*\})? (?P<value>[-+0-9.eEnNaAiIfF]+)$", re.MULTILINE)


def make_table(kubectl: Kubectl, name: str) -> str:
    """A line for each pod that answers, and one for each that does not."""
    port = (kubectl.deployment(name)["spec"].get("engine") or {}).get("port", 10210)
    rows = [["POD", *COLUMNS]]
    for pod in kubectl.list("pods", pod_selector(name)):
        metadata = pod["metadata"]
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods/http:{metadata['name']}:{port}/proxy/metrics"
        try:
            rows.append([metadata["name"], *read_metrics(kubectl.run("get", f"--raw={path}"))])
        except KubectlError:
            rows.append([metadata["name"], *["-"] * len(COLUMNS)])
    if len(rows) == 1:
        raise KubectlError(f"{name} has no pods")
    widths = [max(len(row[number]) for row in rows) for number in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def read_metrics(text: str) -> list[str]:
    """The values of the columns, summed over an engine's replicas."""
    sums: dict[str, float] = {}
    for sample in _SAMPLE.finditer(text):
        sums[sample["name"]] = sums.get(sample["name"], 0.0) + float(sample["value"])
    return [f"{sums[metric]:g}" if metric in sums else "-" for metric in COLUMNS.values()]
