"""Prometheus metrics: this process's own counters, and the manager's `Stats` as they came last.

Owns: every metric's name. Costs are per request, never per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from toka_engine.messages import EngineInfo, Stats

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

_GAUGES = {
    "running": "Output sequences that run.",
    "waiting": "Output sequences that wait for a slot.",
    "kv_pages_total": "Pages of the KV cache.",
    "kv_pages_used": "Pages that running sequences hold.",
    "kv_pages_cached": "Pages that only the prefix tree holds: free when needed.",
}
_TOTALS = {
    "prompt_tokens_total": "Prompt tokens of admitted requests.",
    "prefix_hit_tokens_total": "Prompt tokens found in the prefix tree.",
    "output_tokens_total": "Tokens sampled.",
    "preemptions_total": "Sequences put back to the queue for lack of pages.",
    "steps_total": "Forward passes.",
    "hydragen_rows_total": "Decode rows that attended to a shared prefix as a group.",
    "manager_cpu_s_total": "CPU seconds of the manager.",
    "step_wall_s_total": "Wall seconds of forward passes, launch to tokens; of overlapping ones, all.",
    "step_busy_s_total": "Wall seconds in which at least one forward pass was under way.",
    "model_cpu_s_total": "CPU seconds of the model worker's thread to launch forward passes.",
}
_UNITS = {name: name.replace("_s_total", "_seconds_total") for name in _TOTALS if name.endswith("_s_total")}


class Metrics(Collector):
    """All metrics of the engine, in a registry of their own."""

    def __init__(self, is_ready: Callable[[], bool], num_requests: Callable[[], int]) -> None:
        self.stats: Stats | None = None
        self.info: EngineInfo | None = None
        self._is_ready = is_ready
        self._num_requests = num_requests
        registry = CollectorRegistry(auto_describe=False)
        self._registry = registry
        self.requests = Counter("toka_requests", "Answered requests.", ["endpoint", "status"], registry=registry)
        self.cancelled = Counter("toka_requests_cancelled", "Requests whose client left early.", registry=registry)
        self.request_seconds = Histogram(
            "toka_request_seconds",
            "From a request's head to its answer's end.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "toka_time_to_first_token_seconds", "Streamed requests.", buckets=_SECONDS, registry=registry
        )
        self.request_prompt_tokens = Counter("toka_request_prompt_tokens", "As in usage.", registry=registry)
        self.request_completion_tokens = Counter("toka_request_completion_tokens", "As in usage.", registry=registry)
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("toka_ready", "1 while /readyz says so.", value=float(self._is_ready()))
        yield GaugeMetricFamily("toka_requests_running", "Requests in this server.", value=self._num_requests())
        if self.info is not None:
            yield from _sizes(self.info)
        if self.stats is not None:
            yield from _manager_metrics(self.stats)

    def render(self) -> bytes:
        return generate_latest(self._registry)


def _sizes(info: EngineInfo) -> Iterable[Metric]:
    yield GaugeMetricFamily("toka_max_streams", "Output sequences that can run at once.", value=info.max_streams)
    yield GaugeMetricFamily("toka_kv_tokens", "Tokens that the KV cache holds.", value=info.num_kv_tokens)
    yield GaugeMetricFamily("toka_max_request_tokens", "Longest request.", value=info.max_request_tokens)


def _manager_metrics(stats: Stats) -> Iterable[Metric]:
    for name, text in _GAUGES.items():
        yield GaugeMetricFamily(f"toka_{name}", text, value=getattr(stats, name))
    for name, text in _TOTALS.items():
        yield CounterMetricFamily(f"toka_{_UNITS.get(name, name)}", text, value=getattr(stats, name))
