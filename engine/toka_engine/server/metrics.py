"""Prometheus metrics: this process's own counters, and the managers' `Stats` as they came last.

Owns: every metric's name. What managers report stands there twice: summed over all replicas, under a name that does not
change with their number, and for each replica with the prefix toka_replica_. What ranks tell the supervisor has the
prefix toka_rank_. Costs are per request, never per token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from toka_engine.control_messages import RankInfo, RankReport
from toka_engine.histogram import add_up
from toka_engine.messages import EngineInfo
from toka_engine.server.metric_families import make_histogram
from toka_engine.server.replicas import Replicas
from toka_engine.server.vllm_metrics import VllmMetrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

GAUGES = {
    "running": "Output sequences that have a slot: being prefilled or decoded.",
    "waiting": "Output sequences in the queue.",
    "kv_pages_total": "Pages of the KV cache, of `page_size` tokens each.",
    "kv_pages_used": "KV pages held by running sequences.",
    "kv_pages_cached": "KV pages held by the prefix cache alone; they are evicted when needed.",
}
TOTALS = {
    "prompt_tokens_total": "Prompt tokens of admitted requests.",
    "prefix_hit_tokens_total": "Prompt tokens of admitted requests that were found in the prefix cache.",
    "output_tokens_total": "Output tokens sampled.",
    "preemptions_total": "Running sequences put back into the queue because KV pages ran out.",
    "steps_total": "Forward passes (steps) of the model.",
    "hydragen_rows_total": "Decode rows that attended to a shared prefix as a group (Hydragen), over all steps.",
    "manager_cpu_s_total": "CPU seconds of the manager process.",
    "step_wall_s_total": "Wall seconds of forward passes, launch to tokens; of overlapping ones, all.",
    "step_busy_s_total": "Wall seconds in which at least one forward pass was under way.",
    "model_cpu_s_total": "CPU seconds of the model worker's thread to launch forward passes.",
}
_DURATIONS = {
    "queue_seconds": ("queue", "Seconds that output sequences waited in the queue."),
    "prefill_seconds": ("prefill", "Seconds from an output sequence's start to its first token."),
    "decode_seconds": ("decode", "Seconds from an output sequence's first token to its last."),
    "inter_token_seconds": ("between_tokens", "Seconds from an output token to the next one."),
}
"""Each name, the field of `Durations`, and the help."""
_UNITS = {name: name.replace("_s_total", "_seconds_total") for name in TOTALS if name.endswith("_s_total")}


class Metrics(Collector):
    """All metrics of the engine, in a registry of their own."""

    def __init__(self, is_ready: Callable[[], bool], num_requests: Callable[[], int], replicas: Replicas) -> None:
        self.info: EngineInfo | None = None
        self.ranks: dict[RankInfo, RankReport] = {}
        """The last report of each rank, those of lost replicas too: a counter never falls."""
        self._replicas = replicas
        self._is_ready = is_ready
        self._num_requests = num_requests
        registry = CollectorRegistry(auto_describe=False)
        self._registry = registry
        self.requests = Counter(
            "toka_requests",
            "Requests under /v1 that were answered, by endpoint and HTTP status (499: the client left).",
            ["endpoint", "status"],
            registry=registry,
        )
        self.cancelled = Counter(
            "toka_requests_cancelled",
            "Requests whose client disconnected before the answer was complete.",
            registry=registry,
        )
        self.ignored_fields = Counter(
            "toka_request_fields_ignored",
            "Fields of requests without effect, by name: hints, and what `unknown_fields=report` lets pass (other).",
            ["field"],
            registry=registry,
        )
        self.request_seconds = Histogram(
            "toka_request_seconds",
            "Seconds from the end of a request's headers to the end of its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "toka_time_to_first_token_seconds",
            "Seconds from the end of a streamed request's headers to its first event.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.request_prompt_tokens = Counter(
            "toka_request_prompt_tokens",
            "Prompt tokens of answered requests, as `usage` states them.",
            registry=registry,
        )
        self.request_completion_tokens = Counter(
            "toka_request_completion_tokens",
            "Completion tokens of answered requests, as `usage` states them.",
            registry=registry,
        )
        registry.register(self)
        self.vllm: VllmMetrics | None = None

    def add_vllm_names(self, names: VllmMetrics) -> None:
        """Serve these, too."""
        self.vllm = names
        self._registry.register(names)

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "toka_ready",
            "1 while new requests should come here (/readyz answers 200), else 0.",
            value=float(self._is_ready()),
        )
        yield GaugeMetricFamily(
            "toka_requests_running",
            "Requests that are being generated: submitted and not yet answered.",
            value=self._num_requests(),
        )
        if self.info is not None:
            yield from _sizes(self.info)
        yield from _router_metrics(self._replicas)
        if any(replica.stats for replica in self._replicas.all):
            yield from _manager_metrics(self._replicas)
            yield from _duration_metrics(self._replicas)
        yield from _rank_metrics(self.ranks.values(), {replica.index for replica in self._replicas.live})

    def add(self, collector: Collector) -> None:
        """Show the metrics of another part of the process, too."""
        self._registry.register(collector)

    def note_ranks(self, reports: Iterable[RankReport]) -> None:
        """Keep what ranks have reported."""
        self.ranks |= {report.rank: report for report in reports}

    def render(self) -> bytes:
        return generate_latest(self._registry)


def _sizes(info: EngineInfo) -> Iterable[Metric]:
    yield GaugeMetricFamily(
        "toka_max_streams", "Output sequences that can run at once (slots).", value=info.max_streams
    )
    yield GaugeMetricFamily("toka_kv_tokens", "Capacity of the KV cache in tokens.", value=info.num_kv_tokens)
    yield GaugeMetricFamily(
        "toka_max_request_tokens",
        "Most tokens of one request, prompt and output together.",
        value=info.max_request_tokens,
    )


def _router_metrics(replicas: Replicas) -> Iterable[Metric]:
    yield GaugeMetricFamily("toka_replicas", "Replicas that serve.", value=len(replicas.live))
    outstanding = GaugeMetricFamily(
        "toka_replica_outstanding_tokens", "Tokens that are still expected of it.", labels=["replica"]
    )
    for replica in replicas.live:
        outstanding.add_metric([str(replica.index)], replica.outstanding)
    yield outstanding
    cached = CounterMetricFamily(
        "toka_router_cached_tokens", "Prompt tokens in the chosen replica's cache: guessed, and found.", labels=["kind"]
    )
    cached.add_metric(["guessed"], replicas.guessed_tokens)
    cached.add_metric(["found"], replicas.cached_tokens)
    yield cached
    yield CounterMetricFamily(
        "toka_router_retries", "Prompts that one replica refused and another got.", value=replicas.num_retries
    )


def _manager_metrics(replicas: Replicas) -> Iterable[Metric]:
    for name, text in GAUGES.items():
        each = GaugeMetricFamily(f"toka_replica_{name}", text, labels=["replica"])
        values = {one.index: getattr(one.stats, name) for one in replicas.live if one.stats}
        yield GaugeMetricFamily(f"toka_{name}", text, value=sum(values.values()))
        yield _add_values(each, values)
    for name, text in TOTALS.items():
        title = _UNITS.get(name, name)
        total = CounterMetricFamily(f"toka_replica_{title}", text, labels=["replica"])
        # With those of lost replicas: a counter never falls.
        values = {one.index: getattr(one.stats, name) for one in replicas.all if one.stats}
        yield CounterMetricFamily(f"toka_{title}", text, value=sum(values.values()))
        yield _add_values(total, values)


def _duration_metrics(replicas: Replicas) -> Iterable[Metric]:
    ever = [replica.stats.durations for replica in replicas.all if replica.stats]
    for name, (field, text) in _DURATIONS.items():
        buckets = add_up([getattr(durations, field) for durations in ever])
        yield make_histogram(f"toka_{name}", text, buckets)


def _rank_metrics(reports: Collection[RankReport], live: Collection[int]) -> Iterable[Metric]:
    if not reports:
        return
    labels = ["replica", "stage", "rank"]
    steps = CounterMetricFamily("toka_rank_steps", "Forward passes that this model worker has done.", labels=labels)
    seconds = CounterMetricFamily("toka_rank_cpu_seconds", "CPU seconds of this model worker's process.", labels=labels)
    memory = GaugeMetricFamily(
        "toka_rank_memory_bytes",
        "Memory of its GPU that this model worker has allocated, or on a CPU its resident memory.",
        labels=labels,
    )
    for report in reports:
        rank = report.rank
        values = [str(rank.dp_rank), str(rank.pp_rank), str(rank.tp_rank)]
        steps.add_metric(values, report.num_steps)
        seconds.add_metric(values, report.cpu_s)
        if rank.dp_rank in live:
            memory.add_metric(values, report.memory_bytes)
    yield from (steps, seconds, memory)


def _add_values(
    family: GaugeMetricFamily | CounterMetricFamily, values: dict[int, float]
) -> GaugeMetricFamily | CounterMetricFamily:
    for index, value in values.items():
        family.add_metric([str(index)], value)
    return family
