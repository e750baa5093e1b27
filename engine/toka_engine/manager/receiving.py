"""Takes in the workers' tokens: advances the slots, finds the streams that ended, makes the server's
Deltas.

Arrays only for running streams; Python only for those that ended. Tokens of rows whose slot has changed hands since
(`generation`) are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toka_engine.manager.lifecycle import end_slots, keeps_tops, release_completed
from toka_engine.manager.prompt_logprobs import report_scores
from toka_engine.manager.requests import Kept
from toka_engine.manager.state import EMPTYF, ManagerState
from toka_engine.manager.top_logprobs import NO_TOP, Indices, pack, unpack
from toka_engine.messages import (
    FINISH_ERROR,
    FINISH_GRAMMAR,
    FINISH_LENGTH,
    FINISH_STOP,
    GRAMMAR_FAILED,
    Deltas,
    Floats,
    Int32s,
    Int64s,
    PromptLogprobs,
    Tokens,
)

_EMPTY64: Int64s = np.empty(0, np.int64)


def receive_tokens(state: ManagerState, tokens: Tokens) -> list[PromptLogprobs | Deltas]:
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
    _store(state, tokens, places, live, ids, logprobs)
    num_decoded, now = flight.num_decoded, state.clock()
    if live.size < flight.slots.size:
        num_decoded = int(np.searchsorted(places, num_decoded))
    if flight.size is not None:
        state.step_times.note(flight.size, min(tokens.step_wall_s, now - state.last_tokens_s))
    state.last_tokens_s = now
    state.times.note_tokens(live, num_decoded, now, may_differ=state.has_background)
    stopped = _find_stops(state, live, ids)
    num_received = slots.num_received[live] + ~failed
    slots.num_received[live] = num_received
    state.counters.output_tokens += live.size
    is_over = failed | stopped | (num_received >= slots.limits[live])
    delivered = slots.delivers_each[live] & ~failed & (~stopped | slots.delivers_stop[live])
    messages: list[PromptLogprobs | Deltas] = list(report_scores(flight.scored, tokens))
    over = np.flatnonzero(is_over)
    reasons = np.where(stopped[over], FINISH_STOP, FINISH_LENGTH)
    if failed.any():
        reasons[failed[over]] = FINISH_ERROR
        reasons[ids[over] == GRAMMAR_FAILED] = FINISH_GRAMMAR
    ended, tops = _report_ended(state, live[over], reasons.astype(np.uint8))
    entries = _report_delivered(state, tokens, places, live, delivered, logprobs)
    if entries or ended:
        messages.append(Deltas(**entries, **ended))
    messages.extend(tops)
    release_completed(state)
    if over.size:
        state.times.note_ends(live[over], now)
        _end(state, live[over])
    return messages


def _store(
    state: ManagerState, tokens: Tokens, places: NDArray[np.intp], live: Int32s, ids: Int32s, logprobs: Floats
) -> None:
    """Write each token, and what comes with it, into its page, where that exists already."""
    slots, page_size = state.slots, state.sizes.page_size
    slots.last_tokens[live] = ids
    columns, offsets = np.divmod(slots.prompt_lengths[live] + slots.num_received[live], page_size)
    has_page = columns < slots.num_pages[live]
    pages = slots.table[live[has_page], columns[has_page]]
    state.pages.tokens[pages, offsets[has_page]] = ids[has_page]
    if logprobs.size:
        slots.last_logprobs[live] = logprobs
        state.pages.logprobs[pages, offsets[has_page]] = logprobs[has_page]
    if tokens.top_rows.size:
        where = np.full(live.size, -1, np.int32)
        where[has_page] = pages * page_size + offsets[has_page]
        _store_tops(state, tokens, places, live, where)


def _store_tops(state: ManagerState, tokens: Tokens, places: NDArray[np.intp], live: Int32s, where: Int32s) -> None:
    """Put aside the top logprobs of streams that are delivered at their end."""
    at = np.searchsorted(places, tokens.top_rows)
    is_live = np.append(places, -1)[at] == tokens.top_rows
    is_live[is_live] = keeps_tops(state, live[at[is_live]])
    if is_live.any():
        at, tops = at[is_live], pack(tokens.top_tokens, tokens.top_logprobs, tokens.top_width)
        state.pages.tops.store(live[at], where[at], tops[is_live])


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
    has_tops = keeps_tops(state, over)
    plain, topped = over[~has_tops], over[has_tops]
    fields = _ended_fields(state, plain, reasons[~has_tops]) if plain.size else {}
    if topped.size == 0:
        return fields, []
    return fields, [Deltas(**_ended_fields(state, topped, reasons[has_tops]), top_of_ended=True)]


def _ended_fields(state: ManagerState, over: Int32s, reasons: NDArray[np.uint8]) -> dict[str, Any]:
    """Return the ended_* fields of `over`, and the top_* fields if these keep top logprobs: all of them do, or none."""
    slots, page_size = state.slots, state.sizes.page_size
    num_tokens = slots.num_received[over]
    is_stop = (reasons == FINISH_STOP) & ~slots.delivers_stop[over]
    lengths = np.where(slots.delivers_each[over], 0, num_tokens - is_stop).astype(np.int32)
    fields: dict[str, Any] = {
        "ended": slots.stream_ids[over],
        "ended_reasons": reasons,
        "ended_num_tokens": num_tokens,
        "ended_lengths": lengths,
    }
    if not lengths.any():
        return fields
    owners, ends = np.repeat(over, lengths), np.cumsum(lengths)
    within = np.arange(owners.size) - np.repeat(ends - lengths, lengths)
    columns, offsets = np.divmod(slots.prompt_lengths[owners] + within, page_size)
    pages = slots.table[owners, columns]
    ids = state.pages.tokens[pages, offsets]
    # The newest token may have no page; where a stop token ended the stream, that one is not delivered.
    newest = (lengths > 0) & ~is_stop & (reasons != FINISH_ERROR)
    ids[ends[newest] - 1] = slots.last_tokens[over[newest]]
    fields["ended_tokens"] = ids
    asked = (slots.num_logprobs[over] >= 0) & (lengths > 0)
    if asked.any():
        logprobs = state.pages.logprobs[pages, offsets]
        logprobs[ends[newest] - 1] = slots.last_logprobs[over[newest]]
        all_kept = list(_find_kept(state, over, lengths))
        for start, kept in all_kept:
            logprobs[start : start + kept.logprobs.size] = kept.logprobs
        logprobs[~np.repeat(asked, lengths)] = np.nan
        fields["ended_logprobs"] = logprobs
        if keeps_tops(state, over[0]):
            places = np.where(columns < slots.num_pages[owners], pages * page_size + offsets, -1)
            fields |= _ended_tops(state, owners, places, all_kept)
    return fields


def _ended_tops(
    state: ManagerState, owners: Int32s, places: Indices, all_kept: Iterable[tuple[int, Kept]]
) -> dict[str, Any]:
    """Return the top_* fields of output tokens of the slots `owners`, all padded to the widest row."""
    num_asked = state.slots.num_logprobs[owners]
    width = int(num_asked.max())
    tops = state.pages.tops.at_places(places, width)
    has_no_place = places < 0  # the newest ones
    tops[has_no_place] = state.pages.tops.newest(owners[has_no_place], width)
    for start, kept in all_kept:
        if kept.tops is not None:
            tops[start : start + kept.tops.shape[0], : kept.tops.shape[1]] = kept.tops
    tops[np.arange(width) >= num_asked[:, None]] = NO_TOP
    ids, logprobs = unpack(tops)
    rows = np.arange(owners.size, dtype=np.int32)
    return {"top_rows": rows, "top_tokens": ids, "top_logprobs": logprobs, "top_width": width}


def _find_kept(state: ManagerState, over: Int32s, lengths: Int32s) -> Iterator[tuple[int, Kept]]:
    """Returns where among the output tokens those of before a preemption begin, and what was kept of them."""
    starts = np.cumsum(lengths) - lengths
    for start, slot, length in zip(starts.tolist(), over.tolist(), lengths.tolist(), strict=True):
        stream = state.slots.streams[slot]
        assert stream is not None
        if stream.kept is not None and length:  # else they were delivered one by one
            yield start, stream.kept


def _end(state: ManagerState, over: Int32s) -> None:
    slots = state.slots
    for slot in over.tolist():
        stream = slots.streams[slot]
        assert stream is not None
        state.leave(stream.id, stream.request)
    state.predictor.finished(slots.num_received[over], slots.limits[over])
    end_slots(state, over)
