"""The sizes that the manager works with: the workers', and the limits that follow from them and the settings.

Pure. Every limit that the server enforces for the manager (`EngineInfo`) is made here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from toka_engine.config import EngineConfig
from toka_engine.errors import MessageError
from toka_engine.messages import EngineInfo, WorkerReady

PREFILL_SHARE = 8
"""One part in this many of a full forward is kept from decode rows, so that prefill never starves."""
FEW_ROWS = 512
"""Rows of a lane on a GPU up to which one lane more costs more time, as its step reads the weights once more, than it
saves by evening out stages (measured with an 8B in two)."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Final sizes of one engine."""

    num_pages: int
    page_size: int
    num_slots: int
    max_running: int
    """Streams that may own a slot at once: each must fit as a decode row beside a little prefill."""
    max_tokens_per_forward: int
    max_prefill_tokens: int
    """Prompt tokens of a step with decode rows: more would make these streams wait longer for their next token."""
    max_lone_prefill_tokens: int
    """Prompt tokens of a step without any."""
    steps_ahead: int
    """Steps in flight. On a GPU one runs, one waits in its queue, and one is being planned."""
    max_pages_per_seq: int
    max_request_tokens: int
    target_gap_s: float = 0.0
    """Steps with rows of streamed answers have no more prompt tokens than fit into this time; 0: they may."""
    num_lanes: int = 1
    """Sets of decode rows that take turns (see `lanes`)."""
    num_few_rows: int = 0
    """Decode rows, in all, up to which no more lanes than pipeline stages are used."""


_SMALLEST = ("num_pages", "max_seqs", "max_tokens_per_forward", "max_pages_per_seq")
"""Sizes of which a replica has what its smallest rank has."""
_EQUAL = ("vocab_size", "max_positions", "page_size", "device", "dtype")


def agree_on(readies: Sequence[WorkerReady]) -> WorkerReady:
    """Return what all ranks of a replica can do. Raises MessageError that names what they disagree on."""
    for name in _EQUAL:
        values = {getattr(ready, name) for ready in readies}
        if len(values) > 1:
            raise MessageError(f"the model workers disagree on {name}: {', '.join(map(str, sorted(values)))}")
    return msgspec.structs.replace(
        readies[0], **{name: min(getattr(ready, name) for ready in readies) for name in _SMALLEST}
    )


def choose_sizes(config: EngineConfig, ready: WorkerReady) -> Sizes:
    """Return the sizes that `ready`, on which all ranks agree, and `config` allow."""
    max_request_tokens = min(
        ready.max_positions,
        ready.num_pages * ready.page_size,
        ready.max_pages_per_seq * ready.page_size,
        config.max_num_tokens_per_request or ready.max_positions,
    )
    most_rows = max(1, ready.max_tokens_per_forward - ready.max_tokens_per_forward // PREFILL_SHARE)
    is_cpu = ready.device == "cpu"
    alone = beside_rows = ready.max_tokens_per_forward
    if not is_cpu and config.num_lanes > 1:  # of several steps in flight none is much longer than the others
        alone = beside_rows = max(1, ready.max_tokens_per_forward // config.num_lanes)
    elif not is_cpu:
        beside_rows = max(1, ready.max_tokens_per_forward // 2)
    return Sizes(
        num_pages=ready.num_pages,
        page_size=ready.page_size,
        num_slots=ready.max_seqs,
        max_running=min(ready.max_seqs, most_rows),
        max_tokens_per_forward=ready.max_tokens_per_forward,
        max_prefill_tokens=config.max_prefill_tokens_per_forward or beside_rows,
        max_lone_prefill_tokens=config.max_prefill_tokens_per_forward or alone,
        steps_ahead=config.choose_steps_ahead(is_cpu),
        max_pages_per_seq=ready.max_pages_per_seq,
        max_request_tokens=max_request_tokens,
        target_gap_s=1e-3 * config.choose_target_gap_ms(is_cpu),
        num_lanes=config.num_lanes,
        num_few_rows=0 if is_cpu else FEW_ROWS * config.pp_size,
    )


def engine_info(sizes: Sizes, ready: WorkerReady) -> EngineInfo:
    return EngineInfo(
        vocab_size=ready.vocab_size,
        max_request_tokens=sizes.max_request_tokens,
        num_kv_tokens=sizes.num_pages * sizes.page_size,
        max_streams=sizes.max_running,
        device=ready.device,
        dtype=ready.dtype,
    )
