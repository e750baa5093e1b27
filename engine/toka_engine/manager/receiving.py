"""What comes back from the workers: advances the slots, finds the streams that ended, makes the server's
Deltas.

Arrays only for running streams; Python only for those that ended or asked for top logprobs. Tokens of rows
whose slot has changed hands since (`generation`) are dropped.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from toka_engine.manager.lifecycle import end_slots, kept_logprobs, release_completed
from toka_engine.manager.state import EMPTYF, ManagerState
from toka_engine.manager.streams import Kept
from toka_engine.messages import (
    FINISH_ERROR,
    FINISH_LENGTH,
    FINISH_STOP,
    Deltas,
    Floats,
    Int32s,
    Int64s,
    Tokens,
)

_EMPTY64: Int64s = np.empty(0, np.int64)


def receive_tokens(state: ManagerState, tokens: Tokens) -> list[Deltas]:
    """Take in one step's tokens; return what the server must hear (possibly nothing)."""
    flight = state.in_flight.popleft()
    assert flight.number == tokens.number, "steps come back in order"
    state.completed_step = tokens.number
    state.counters.step_wall_s += tokens.step_wall_s
    state.counters.model_cpu_s += tokens.host_cpu_s
    slots = state.slots
    places = np.flatnonzero(slots.generations[flight.slots] == flight.generations)
    live, ids = flight.slots[places], tokens.ids[places]
    logprobs = tokens.logprobs[places] if tokens.logprobs.size else EMPTYF
    failed = ids < 0
    _store(state, live, ids, logprobs, failed)
    stopped = _find_stops(state, live, ids)
    num_received = slots.num_received[live] + ~failed
    slots.num_received[live] = num_received
    state.counters.output_tokens += live.size
    is_over = failed | stopped | (num_received >= slots.limits[live])
    delivered = slots.delivers_each[live] & ~failed & ~stopped
    if tokens.top_rows.size:
        _keep_tops(state, tokens, places, live, delivered)
    messages = []
    over = np.flatnonzero(is_over)
    reasons = np.where(failed[over], FINISH_ERROR, np.where(stopped[over], FINISH_STOP, FINISH_LENGTH))
    ended, tops = _report_ended(state, live[over], reasons.astype(np.uint8))
    entries = _report_delivered(state, tokens, places, live, delivered, logprobs)
    if entries or ended:
        messages.append(Deltas(**entries, **ended))
    messages.extend(tops)
    release_completed(state)
    if over.size:
        _end(state, live[over])
    return messages


def _store(state: ManagerState, live: Int32s, ids: Int32s, logprobs: Floats, failed: NDArray[np.bool_]) -> None:
    """Write each token into its page, where that exists already."""
    slots = state.slots
    slots.last_tokens[live] = ids
    columns, offsets = np.divmod(slots.prompt_lengths[live] + slots.num_received[live], state.sizes.page_size)
    has_page = columns < slots.num_pages[live]
    pages = slots.table[live[has_page], columns[has_page]]
    state.page_tokens[pages, offsets[has_page]] = ids[has_page]
    if logprobs.size:
        slots.last_logprobs[live] = logprobs
        state.page_logprobs[pages, offsets[has_page]] = logprobs[has_page]


def _find_stops(state: ManagerState, live: Int32s, ids: Int32s) -> NDArray[np.bool_]:
    slots = state.slots
    stopped = np.zeros(live.size, np.bool_)
    for place in slots.stop_ids[: slots.num_stop_places]:
        stopped |= place[live] == ids
    has_more = slots.has_more_stops[live]
    if has_more.any():
        for row in np.flatnonzero(has_more).tolist():
            stream = slots.streams[live[row]]
            assert stream is not None
            stopped[row] = int(ids[row]) in stream.request.stop_ids
    return stopped


def _keep_tops(
    state: ManagerState, tokens: Tokens, places: NDArray[np.intp], live: Int32s, delivered: NDArray[np.bool_]
) -> None:
    """Put aside the top logprobs of streams that are delivered at their end."""
    slots, width = state.slots, tokens.top_width
    ids, logprobs = tokens.top_tokens.reshape(-1, width), tokens.top_logprobs.reshape(-1, width)
    positions = np.searchsorted(places, tokens.top_rows)
    for row, position in enumerate(positions.tolist()):
        if position == places.size or places[position] != tokens.top_rows[row]:
            continue
        slot = int(live[position])
        stream = slots.streams[slot]
        if stream is None or slots.delivers_each[slot]:
            continue
        if stream.kept is None:
            stream.kept = Kept(EMPTYF)
        stream.kept.top_tokens.append(ids[row])
        stream.kept.top_logprobs.append(logprobs[row])


def _report_delivered(
    state: ManagerState,
    tokens: Tokens,
    places: NDArray[np.intp],
    live: Int32s,
    delivered: NDArray[np.bool_],
    logprobs: Floats,
) -> dict[str, Any]:
    if not delivered.any():
        return {}
    slots, sent = state.slots, live[delivered]
    fields: dict[str, Any] = {"streams": slots.stream_ids[sent], "tokens": tokens.ids[places[delivered]]}
    asked = slots.num_logprobs[sent] >= 0
    if logprobs.size and asked.any():
        fields["logprobs"] = np.where(asked, logprobs[delivered], np.float32(np.nan)).astype(np.float32)
    if tokens.top_rows.size:
        wanted = np.isin(tokens.top_rows, places[delivered])
        width = tokens.top_width
        fields |= {
            "top_rows": np.searchsorted(places[delivered], tokens.top_rows[wanted]).astype(np.int32),
            "top_tokens": tokens.top_tokens.reshape(-1, width)[wanted].reshape(-1),
            "top_logprobs": tokens.top_logprobs.reshape(-1, width)[wanted].reshape(-1),
            "top_width": width,
        }
    return fields


def _report_ended(state: ManagerState, over: Int32s, reasons: NDArray[np.uint8]) -> tuple[dict[str, Any], list[Deltas]]:
    """Return the ended_* fields of the step's Deltas, and one Deltas of its own for ended streams with top
    logprobs."""
    if over.size == 0:
        return {}, []
    slots = state.slots
    has_tops = (slots.num_logprobs[over] > 0) & ~slots.delivers_each[over]
    plain, topped = over[~has_tops], over[has_tops]
    fields = _ended_fields(state, plain, reasons[~has_tops]) if plain.size else {}
    if topped.size == 0:
        return fields, []
    extra = _ended_fields(state, topped, reasons[has_tops])
    return fields, [Deltas(**extra, **_ended_tops(state, topped, extra["ended_lengths"]), top_of_ended=True)]


def _ended_fields(state: ManagerState, over: Int32s, reasons: NDArray[np.uint8]) -> dict[str, Any]:
    slots, page_size = state.slots, state.sizes.page_size
    num_tokens = slots.num_received[over]
    is_stop = reasons == FINISH_STOP
    lengths = np.where(slots.delivers_each[over], 0, num_tokens - is_stop).astype(np.int32)
    fields: dict[str, Any] = {
        "ended": slots.stream_ids[over],
        "ended_reasons": reasons,
        "ended_num_tokens": num_tokens,
        "ended_lengths": lengths,
    }
    if not lengths.any():
        return fields
    ends = np.cumsum(lengths)
    owners = np.repeat(over, lengths)
    within = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    columns, offsets = np.divmod(slots.prompt_lengths[owners] + within, page_size)
    pages = slots.table[owners, columns]
    ids = state.page_tokens[pages, offsets]
    # The newest token may have no page; where a stop token ended the stream, that one is not delivered.
    newest = (lengths > 0) & (reasons == FINISH_LENGTH)
    ids[ends[newest] - 1] = slots.last_tokens[over[newest]]
    fields["ended_tokens"] = ids
    asked = (slots.num_logprobs[over] >= 0) & (lengths > 0)
    if asked.any():
        logprobs = np.full(ids.size, np.nan, np.float32)
        for row in np.flatnonzero(asked).tolist():
            slot = int(over[row])
            stream = slots.streams[slot]
            assert stream is not None
            kept = kept_logprobs(state, slot, stream)
            assert kept is not None
            logprobs[ends[row] - lengths[row] : ends[row]] = kept.logprobs[: lengths[row]]
        fields["ended_logprobs"] = logprobs
    return fields


def _ended_tops(state: ManagerState, over: Int32s, lengths: Int32s) -> dict[str, Any]:
    """Return the top_* fields of ended streams, all padded to the widest row."""
    rows: list[int] = []
    ids: list[Int32s] = []
    logprobs: list[Floats] = []
    start = 0
    for slot, length in zip(over.tolist(), lengths.tolist(), strict=True):
        stream = state.slots.streams[slot]
        assert stream is not None
        if stream.kept is not None:
            ids += stream.kept.top_tokens[:length]
            logprobs += stream.kept.top_logprobs[:length]
            rows += range(start, start + min(length, len(stream.kept.top_tokens)))
        start += length
    width = max((each.size for each in ids), default=0)
    flat_ids = np.full((len(rows), width), -1, np.int32)
    flat_logprobs = np.full((len(rows), width), np.nan, np.float32)
    for row, (each_ids, each_logprobs) in enumerate(zip(ids, logprobs, strict=True)):
        flat_ids[row, : each_ids.size] = each_ids
        flat_logprobs[row, : each_logprobs.size] = each_logprobs
    return {
        "top_rows": np.asarray(rows, np.int32),
        "top_tokens": flat_ids.reshape(-1),
        "top_logprobs": flat_logprobs.reshape(-1),
        "top_width": width,
    }


def _end(state: ManagerState, over: Int32s) -> None:
    slots = state.slots
    for stream in slots.stream_ids[over].tolist():
        state.where.pop(stream, None)
    state.predictor.finished(slots.num_received[over], slots.limits[over])
    end_slots(state, over)
