"""Metrics under vLLM's names, so that dashboards, scalers and routers made for it work here.

Owns: these names, their types and labels (docs/observability.md lists them), and what is counted for them alone. The
rest is what the managers report. Costs are per request; what is measured per token is measured by the managers.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from toka_engine.histogram import Buckets, Histogram, add_up
from toka_engine.messages import Durations, Stats
from toka_engine.server.errors import ApiError, ClientGoneError
from toka_engine.server.metric_families import make_histogram
from toka_engine.server.replicas import Replicas

_GAUGES = {
    "num_requests_running": ("Output sequences that have a slot.", "running"),
    "num_requests_waiting": ("Output sequences in the queue.", "waiting"),
}
_COUNTERS = {
    "prompt_tokens": ("Prompt tokens of requests.", "prompt_tokens_total"),
    "generation_tokens": ("Output tokens sampled.", "output_tokens_total"),
    "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", "prompt_tokens_total"),
    "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", "prefix_hit_tokens_total"),
    "num_preemptions": ("Running sequences put back into the queue.", "preemptions_total"),
}
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("Seconds from a request's way into the queue to its first token.", "first_token"),
    "inter_token_latency_seconds": ("Seconds from an output token to the next one.", "between_tokens"),
    "time_per_output_token_seconds": ("The same as inter_token_latency_seconds, by its older name.", "between_tokens"),
    "request_queue_time_seconds": ("Seconds in the queue.", "queue"),
    "request_prefill_time_seconds": ("Seconds from the start to the first token.", "prefill"),
    "request_decode_time_seconds": ("Seconds from the first token to the last.", "decode"),
}
_USAGE = ("kv_cache_usage_perc", "gpu_cache_usage_perc")
_REASONS = ("stop", "length", "abort", "error")
_LABELS = ("model_name", "engine")


class VllmMetrics(Collector):
    """All metrics under vLLM's names, for all replicas together: `engine` is 0."""

    def __init__(self, model: str, replicas: Replicas, page_size: int, *, has_prefix_cache: bool) -> None:
        self._labels = (model, "0")
        self._replicas = replicas
        self._page_size = page_size
        self._has_prefix_cache = has_prefix_cache
        self._ends = Counter(dict.fromkeys(_REASONS, 0))
        self._request_seconds = Histogram()

    def note_end(self, reasons: Iterable[str | None], started_s: float) -> None:
        """Count a request that was answered, by the finish reason of each choice."""
        for reason in reasons:
            self._ends["length" if reason == "length" else "stop"] += 1
        self._request_seconds.add(time.monotonic() - started_s)

    def note_failure(self, error: Exception, num_choices: int) -> None:
        """Count a request that ended early."""
        if isinstance(error, ClientGoneError) or (isinstance(error, ApiError) and error.status == 504):
            self._ends["abort"] += num_choices
        elif not isinstance(error, ApiError) or error.status >= 500:
            self._ends["error"] += num_choices

    def collect(self) -> Iterator[Metric]:
        live = [replica.stats for replica in self._replicas.live if replica.stats]
        ever = [replica.stats for replica in self._replicas.all if replica.stats]
        for name, (text, field) in _GAUGES.items():
            yield self._gauge(name, text, sum(map(attrgetter(field), live)))
        yield from self._cache(live)
        for name, (text, field) in _COUNTERS.items():
            family = CounterMetricFamily(f"vllm:{name}", text, labels=_LABELS)
            family.add_metric(self._labels, sum(map(attrgetter(field), ever)))
            yield family
        ends = CounterMetricFamily(
            "vllm:request_success", "Output sequences that ended.", labels=(*_LABELS, "finished_reason")
        )
        for reason in _REASONS:
            ends.add_metric((*self._labels, reason), self._ends[reason])
        yield ends
        durations: Sequence[Durations] = [stats.durations for stats in ever]
        for name, (text, field) in _HISTOGRAMS.items():
            yield self._histogram(name, text, add_up(list(map(attrgetter(field), durations))))
        text = "Seconds from the end of a request's headers to the end of its answer."
        yield self._histogram("e2e_request_latency_seconds", text, self._request_seconds.report())

    def _cache(self, live: Sequence[Stats]) -> Iterator[Metric]:
        num_pages = sum(stats.kv_pages_total for stats in live)
        share = sum(stats.kv_pages_used for stats in live) / num_pages if num_pages else 0.0
        for name in _USAGE:
            yield self._gauge(name, "KV pages held by running sequences, as a share of all: 0 to 1.", share)
        labels = {
            "block_size": str(self._page_size),
            "num_gpu_blocks": str(num_pages),
            "enable_prefix_caching": str(self._has_prefix_cache),
            "model_name": self._labels[0],
            "engine": self._labels[1],
        }
        info = GaugeMetricFamily("vllm:cache_config_info", "The KV cache; always 1.", labels=tuple(labels))
        info.add_metric(tuple(labels.values()), 1.0)
        yield info

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _histogram(self, name: str, text: str, buckets: Buckets) -> Metric:
        return make_histogram(f"vllm:{name}", text, buckets, _LABELS, self._labels)
