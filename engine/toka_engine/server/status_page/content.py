"""The content of the status page, gathered from the parts of the server; `pages` makes text of it."""

from __future__ import annotations

import sqlite3
import time

import msgspec

from toka_engine.server.batches.database import Database
from toka_engine.server.batches.records import Batch
from toka_engine.server.batches.service import Batches
from toka_engine.server.errors import ApiError
from toka_engine.server.exchange import Exchange
from toka_engine.server.health import Phase
from toka_engine.server.keys.check import owner_of
from toka_engine.server.service import Service
from toka_engine.server.status_page.plots import Plot, draw, format_number
from toka_engine.server.status_page.samples import LoadSamples
from toka_engine.version import __version__

_MAX_BATCHES = 20
_STATES = {
    Phase.STARTING: ("Starting", "wait"),
    Phase.SERVING: ("Ready", "good"),
    Phase.DRAINING: ("Draining", "wait"),
    Phase.REFUSING: ("Shutting down", "wait"),
    Phase.FAILING: ("Failing", "bad"),
}


class State(msgspec.Struct, frozen=True):
    """Whether the engine takes requests, and what it waits for. The probes say the same without a key."""

    word: str
    kind: str
    detail: str
    version: str = __version__


class Fact(msgspec.Struct, frozen=True):
    """A line of the page: a name and its value."""

    name: str
    value: str


class BatchRow(msgspec.Struct, frozen=True):
    """A batch as the page lists it."""

    id: str
    endpoint: str
    status: str
    kind: str
    done: int
    failed: int
    total: int
    begun: str
    note: str


class Content(msgspec.Struct, frozen=True):
    """All that needs a key where keys are asked for."""

    state: State
    models: tuple[str, ...]
    facts: list[Fact]
    load: list[Fact]
    plots: list[Plot]
    batches: list[BatchRow]
    no_batches: str
    """Why there is no list of batches; "" where there is."""
    key_facts: list[Fact]
    has_batches: bool
    """Whether the engine keeps batches of anybody."""


def read_state(service: Service) -> State:
    """Return the engine's state."""
    health = service.health
    word, kind = _STATES[health.phase]
    if health.silent_process:
        word, kind = "Not ready", "wait"
    return State(word, kind, health.explain())


async def gather(service: Service, samples: LoadSamples, batches: Batches, exchange: Exchange) -> Content:
    """Return what the page shows to the sender of `exchange`."""
    rows, reason = await list_batches(batches, owner_of(exchange))
    return Content(
        read_state(service),
        service.names,
        _describe_engine(service),
        _describe_load(samples),
        _draw_plots(samples),
        rows,
        reason,
        _describe_key(exchange),
        batches.config.data_dir is not None,
    )


def _describe_engine(service: Service) -> list[Fact]:
    info = service.metrics.info
    if info is None:
        return []
    replicas = service.streams.replicas
    facts = [
        Fact("Device", f"{info.device}, {info.dtype}"),
        Fact("Longest request", f"{info.max_request_tokens:,} tokens"),
        Fact("KV cache", f"{info.num_kv_tokens:,} tokens"),
    ]
    if len(replicas.all) > 1:
        facts.append(Fact("Replicas", f"{len(replicas.live)} of {len(replicas.all)} serve"))
    return facts


def _describe_load(samples: LoadSamples) -> list[Fact]:
    now = samples.read()
    return [
        Fact("Running", format_number(now.running)),
        Fact("Waiting", format_number(now.waiting)),
        Fact("KV cache in use", f"{_share(now.pages_used, now.pages_total):.0%}".replace("%", " %")),
        Fact("Output tokens since the start", format_number(now.output_tokens)),
    ]


def _draw_plots(samples: LoadSamples) -> list[Plot]:
    return [
        draw("Output tokens", samples.rate(lambda one: one.output_tokens), "/s"),
        draw("Prompt tokens", samples.rate(lambda one: one.prompt_tokens), "/s"),
        draw("Running sequences", samples.level(lambda one: one.running), ""),
        draw("Waiting sequences", samples.level(lambda one: one.waiting), ""),
        draw(
            "KV cache in use", samples.level(lambda one: _share(one.pages_used, one.pages_total)), " %", is_share=True
        ),
    ]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _describe_key(exchange: Exchange) -> list[Fact]:
    use = exchange.key
    if use is None:
        return []
    facts = [Fact("Key", use.name), Fact("Requests", f"{use.num_running:,} running")]
    if (most := use.entry.max_requests) is not None:
        facts[-1] = Fact("Requests", f"{use.num_running:,} of {most:,} at once")
    if (most := use.entry.max_tokens_per_minute) is not None:
        facts.append(Fact("Tokens left now", f"{use.tokens_left:,} of {most:,} a minute"))
    facts.append(Fact("Tokens used", f"{use.prompt_tokens:,} of prompts, {use.completion_tokens:,} of answers"))
    return facts


async def list_batches(batches: Batches, owner: str) -> tuple[list[BatchRow], str]:
    """Return the owner's latest batches, or why there is no list."""
    if batches.config.data_dir is None:
        return [], "This engine keeps no batches: its key data_dir is not set."
    try:
        stored = await batches.opened().database.run(Database.list_batches, owner, after=None, limit=_MAX_BATCHES)
    except ApiError as error:
        return [], error.message
    except (OSError, sqlite3.Error) as error:  # the rest of the page is what helps then
        return [], f"The batches cannot be read: {error}."
    runs = [batches.find_run(owner, one.batch.id) for one in stored]
    newest = [run.stored.batch if run else one.batch for run, one in zip(runs, stored, strict=True)]
    return [_describe_batch(batch, time.time()) for batch in newest], "" if newest else "There is none."


def _describe_batch(batch: Batch, now_s: float) -> BatchRow:
    counts = batch.request_counts
    kinds = {"completed": "good", "failed": "bad", "expired": "bad"}
    note = batch.errors.data[0].message if batch.errors and batch.errors.data else ""
    return BatchRow(
        batch.id,
        batch.endpoint,
        batch.status.replace("_", " "),
        kinds.get(batch.status, "wait"),
        counts.completed + counts.failed,
        counts.failed,
        counts.total,
        format_age(now_s - batch.created_at),
        note,
    )


def format_age(seconds: float) -> str:
    """Write a time that has passed in its largest unit."""
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"
