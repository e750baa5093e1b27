"""Plans one step: decode rows first, then prefill chunks in what is left of the forward. Pure over
ManagerState.

Decode rows are handled as arrays only. When pages run short, the oldest rows get what there is; the others
sit this step out, and where nothing is about to come back by itself the newest streams are preempted. The
oldest stream always goes on, so one that fits the cache at all always finishes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from toka_engine.manager.admission import admit
from toka_engine.manager.lanes import Lanes
from toka_engine.manager.lifecycle import close_prefill, end_slot, preempt_newest, requeue
from toka_engine.manager.priorities import make_room, promote_oldest
from toka_engine.manager.prompt_budget import choose_budget
from toka_engine.manager.prompt_logprobs import score_chunk, scored_fields
from toka_engine.manager.requests import PendingCopy, Prefill, Request
from toka_engine.manager.row_groups import NO_GROUPS, Groups
from toka_engine.manager.slots import State
from toka_engine.manager.state import EMPTY32, InFlight, ManagerState, StepBuilder
from toka_engine.manager.step_share import WHOLE, expects_online, note_planned, share_step
from toka_engine.messages import Int32s, SlotEdits, Step
from toka_engine.slot_parameters import SlotBatch


def plan_step(state: ManagerState) -> Step | None:
    """Return the next step to send, or None where nothing can run before more tokens are back."""
    if len(state.in_flight) >= state.sizes.steps_ahead:
        return None
    if state.has_background and len(state.in_flight) >= max(1, state.sizes.steps_ahead - 1) and _may_wait(state):
        return None
    if state.has_background and state.queue:
        promote_oldest(state)
    if state.misfit is not None:
        misfit, state.misfit = state.misfit, None
        if state.has_background:
            make_room(state, misfit)
    if state.lanes is None:
        return _plan_rows(state)
    return _plan_lanes(state, state.lanes)


def _may_wait(state: ManagerState) -> bool:
    """Return whether the next step had better not be sent yet, because a request that comes now would wait for it."""
    return state.lanes is None and expects_online(state)


def _plan_lanes(state: ManagerState, lanes: Lanes) -> Step | None:
    """Plan the lane whose turn it is, or the next one of which some rows can run."""
    lanes.drop_ended(state.slots)
    lanes.gather(state.slots, state.pages.allocator.refs)
    num_idle = state.sizes.num_lanes - max(1, lanes.num_busy)
    if not state.prefills and not state.queue and len(state.in_flight) >= max(2, state.sizes.steps_ahead - num_idle):
        return None  # steps of few rows would only wait for each other, and what comes meanwhile behind them
    for lane in lanes.in_turn(has_prompts=bool(state.prefills or state.queue)):
        state.rows = lane
        if step := _plan_rows(state):
            lanes.end_turn(lane)
            return step
    return None


def _plan_rows(state: ManagerState) -> Step | None:
    """Plan a step of `state.rows` and prefill chunks."""
    step = StepBuilder(state.next_step)
    state.rows.refresh(state.slots, state.pages.allocator.refs)
    share = share_step(state) if state.has_background else WHOLE
    rows, groups = _plan_decode(state, step, share.last_order)
    budget = choose_budget(state, rows)
    copies = _take_live_copies(state)
    if not state.is_short:
        admit(state, step, budget, share.num_prefill)
    num_left = _plan_chunks(state, step, budget, share.num_prefill)
    state.prompt_turns.note(num_left, state.clock)
    if rows.size == 0 and not step.chunk_slots:
        state.copies = copies  # this step is not sent
        return None
    emit_copies(state, step, copies)
    return _finish_step(state, step, rows, groups)


def _plan_decode(state: ManagerState, step: StepBuilder, last_order: int) -> tuple[Int32s, Groups]:
    """Give each decode row the page that it needs; return the rows that take part, and their groups. Rows with an order
    higher than `last_order` do not.
    """
    slots, rows = state.slots, state.rows
    active, groups = _choose_rows(state, last_order)
    if active.size == 0:
        rows.is_short = False
        return EMPTY32, NO_GROUPS
    lengths = slots.lengths[active]
    needs = lengths >= slots.num_pages[active] * state.sizes.page_size
    num_needed = int(np.count_nonzero(needs))
    rows.is_short = num_needed > state.pages.allocator.num_available
    if rows.is_short:
        is_kept = _cope_with_shortage(state, last_order)
        active, groups = rows.slots[is_kept], rows.groups.keep(is_kept)
        lengths = slots.lengths[active]
        needs = lengths >= slots.num_pages[active] * state.sizes.page_size
        num_needed = int(np.count_nonzero(needs))
    if num_needed:
        _append_pages(state, step, active[needs])
    slots.lengths[active] = lengths + 1
    num_planned = slots.num_planned[active] + 1
    slots.num_planned[active] = num_planned
    if state.lanes is not None:
        step.after = int(slots.last_steps[active].max(initial=0))
    slots.last_steps[active] = step.number
    is_full = num_planned >= slots.limits[active]
    if is_full.any():
        slots.states[active[is_full]] = State.FULL
        rows.is_stale = True
    return active, groups


def _choose_rows(state: ManagerState, last_order: int) -> tuple[Int32s, Groups]:
    slots, chosen, groups = state.slots, state.rows.slots, state.rows.groups
    if last_order != WHOLE.last_order:
        is_kept = slots.orders[chosen] <= last_order
        if not is_kept.all():
            chosen, groups = chosen[is_kept], groups.keep(is_kept)
    if state.lanes is not None:
        # A row whose last token is yet to come from the last stage would keep the first one waiting for it.
        is_kept = slots.last_steps[chosen] <= state.next_step - state.config.pp_size
        if is_kept.any() and not is_kept.all():
            chosen, groups = chosen[is_kept], groups.keep(is_kept)
    return chosen, groups


def _append_pages(state: ManagerState, step: StepBuilder, needy: Int32s) -> None:
    slots = state.slots
    pages, columns = state.pages.take(needy.size), slots.num_pages[needy]
    slots.table[needy, columns] = pages
    slots.num_pages[needy] = columns + 1
    step.appends.append((needy, columns, pages))
    # A token that came back before its page existed is written now; the others are in flight.
    is_known = slots.num_received[needy] == slots.num_planned[needy]
    known, known_pages = needy[is_known], pages[is_known]
    state.pages.tokens[known_pages, 0] = slots.last_tokens[known]
    state.pages.logprobs[known_pages, 0] = slots.last_logprobs[known]
    if state.pages.tops.is_used and known.size:
        width = max(0, int(slots.num_logprobs[known].max()))
        state.pages.tops.place_newest(known, known_pages * state.sizes.page_size, width)


def _cope_with_shortage(state: ManagerState, last_order: int) -> NDArray[np.bool_]:
    """Preempt where nothing else will bring pages; return which of the rows then left take part in this
    step, of those with an order up to `last_order`."""
    slots, rows = state.slots, state.rows
    page_size = state.sizes.page_size

    def find_needy() -> NDArray[np.bool_]:
        needs: NDArray[np.bool_] = slots.lengths[rows.slots] >= slots.num_pages[rows.slots] * page_size
        return needs & (slots.orders[rows.slots] <= last_order)

    promised = 0
    if not slots.has_retiring and not state.pages.has_held and not (slots.states == State.FULL).any():
        while np.count_nonzero(find_needy()) > state.pages.allocator.num_available + promised:
            num_later = preempt_newest(state)
            if num_later is None:
                break
            promised += num_later
            rows.refresh(slots, state.pages.allocator.refs)
    needs = find_needy()
    needy = np.flatnonzero(needs)
    needy = needy[np.argsort(slots.orders[rows.slots[needy]])]
    is_kept = ~needs & (slots.orders[rows.slots] <= last_order)
    is_kept[needy[: state.pages.allocator.num_available]] = True
    return is_kept


def _take_live_copies(state: ManagerState) -> list[PendingCopy]:
    """Return the part-filled prompt pages to copy in this step; release those that no sibling wants any more."""
    live = []
    for copy in state.copies:
        if (state.slots.generations[copy.slots] == copy.generations).any():
            live.append(copy)
        else:
            state.pages.allocator.release(np.asarray([copy.source], np.int32))
    state.copies = []
    return live


def emit_copies(state: ManagerState, step: StepBuilder, copies: list[PendingCopy]) -> None:
    """Copy each page to the siblings that still want it; `step` holds the source until it is back."""
    for copy in copies:
        targets = copy.targets[state.slots.generations[copy.slots] == copy.generations]
        step.copy_from.append(np.full(targets.size, copy.source, np.int32))
        step.copy_to.append(targets)
        state.pages.hold(step.number, np.asarray([copy.source], np.int32))


def _plan_chunks(state: ManagerState, step: StepBuilder, budget: int, background: int) -> int:
    """Plan chunks of `budget` tokens, of which background prompts may take `background`; return what is left of it."""
    slots = state.slots
    begun: list[Int32s] = []
    for prefill in sorted(state.prefills, key=lambda prefill: prefill.request.is_background):
        if budget <= 0:
            break
        start = prefill.position
        length = min(budget, prefill.tokens.size - start)
        if prefill.request.is_background:
            length = min(length, background)
            if length <= 0:
                break
            background -= length
        budget -= length
        prefill.position = start + length
        step.chunk_slots.append(prefill.slot)
        step.chunk_starts.append(start)
        step.chunk_tokens.append(prefill.tokens[start : prefill.position])
        slots.lengths[prefill.slot] = prefill.position
        slots.last_steps[prefill.slot] = step.number
        score_chunk(step, prefill, start)
        _enter_tree(state, prefill)
        if prefill.position == prefill.tokens.size:
            begun.append(_fan_out(state, step, prefill))
    if begun:
        _begin_decode(state, begun, step.number)
    return budget


def _enter_tree(state: ManagerState, prefill: Prefill) -> None:
    """The prefill's full pages may be matched by every step planned later: the worker runs steps in order."""
    slots, tree, page_size = state.slots, state.pages.tree, state.sizes.page_size
    num_full = prefill.position // page_size
    pages = slots.table[prefill.slot]
    num_known = tree.insert_path(pages[:num_full], int(slots.num_in_tree[prefill.slot]), state.next_step)
    slots.num_in_tree[prefill.slot] = num_known
    if prefill.pending_key is not None:
        state.pending_pages.pop(prefill.pending_key, None)
        prefill.pending_key = None
    if tree.is_enabled and num_known == num_full and prefill.tokens.size >= (num_full + 1) * page_size:
        prefill.pending_key = tree.key(int(pages[num_full - 1]) if num_full else -1, int(pages[num_full]))
        state.pending_pages[prefill.pending_key] = prefill


def _fan_out(state: ManagerState, step: StepBuilder, prefill: Prefill) -> Int32s:
    """The prompt is complete: sample for the leader and for the siblings that get a page of their own; return
    them."""
    slots, page_size = state.slots, state.sizes.page_size
    length = int(prefill.tokens.size)
    num_full, tail = divmod(length, page_size)
    must_copy = tail > 0 and prefill.request.max_tokens > 1
    close_prefill(state, prefill)
    if must_copy and len(prefill.siblings) > state.pages.allocator.num_available:
        late = prefill.siblings[state.pages.allocator.num_available :]
        prefill.siblings = prefill.siblings[: state.pages.allocator.num_available]
        requeue(state, prefill, late)
    siblings = np.asarray(prefill.siblings, np.int32)
    if siblings.size:
        shared = slots.table[prefill.slot, :num_full].copy()
        if num_full:
            state.pages.allocator.retain(shared, siblings.size)
            slots.table[siblings, :num_full] = shared
            columns = np.tile(np.arange(num_full, dtype=np.int32), siblings.size)
            step.appends.append((np.repeat(siblings, num_full), columns, np.tile(shared, siblings.size)))
        slots.num_pages[siblings] = num_full
        slots.num_in_tree[siblings] = slots.num_in_tree[prefill.slot]
        if must_copy:
            schedule_copies(state, step, prefill, siblings, num_full)
        step.new_slots.extend(prefill.siblings)
        step.new_lengths.extend([0] * len(prefill.siblings))
    members = np.asarray([prefill.slot, *prefill.siblings] if prefill.is_leader_wanted else prefill.siblings, np.int32)
    step.fanout_slots.append(members)
    step.fanout_chunks.append(np.full(members.size, len(step.chunk_slots) - 1, np.int32))
    slots.lengths[members] = length
    for slot in members.tolist():
        stream = slots.streams[slot]
        assert stream is not None
        stream.prefill = None
    if not prefill.is_leader_wanted:
        end_slot(state, prefill.slot)
    return members


def schedule_copies(state: ManagerState, step: StepBuilder, prefill: Prefill, siblings: Int32s, column: int) -> None:
    """Give each sibling a page of its own for the prompt's tail, to be filled by a copy in the next step."""
    slots = state.slots
    source = int(slots.table[prefill.slot, column])
    state.pages.allocator.retain(np.asarray([source], np.int32))
    pages = state.pages.take(siblings.size)
    slots.table[siblings, column] = pages
    slots.num_pages[siblings] = column + 1
    state.pages.tokens[pages] = state.pages.tokens[source]
    step.appends.append((siblings, np.full(siblings.size, column, np.int32), pages))
    state.copies.append(PendingCopy(source, pages, siblings, slots.generations[siblings]))


def _begin_decode(state: ManagerState, begun: list[Int32s], number: int) -> None:
    """Let the choices of each prompt of `begun`, whose first tokens step `number` samples, be decode rows."""
    slots, members = state.slots, np.concatenate(begun)
    slots.num_planned[members] += 1
    slots.last_steps[members] = number
    is_full = slots.num_planned[members] >= slots.limits[members]
    slots.states[members] = np.where(is_full, State.FULL, State.DECODE)
    if state.lanes is None:
        state.rows.add(members[~is_full], slots, state.pages.allocator.refs)
        return
    for choices in begun:
        if (live := choices[slots.states[choices] == State.DECODE]).size:
            state.lanes.add(live, slots, state.pages.allocator.refs, state.rows)


def _finish_step(state: ManagerState, step: StepBuilder, rows: Int32s, groups: Groups) -> Step:
    slots = state.slots
    fanout_slots = np.concatenate([EMPTY32, *step.fanout_slots])
    sampled = np.concatenate((rows, fanout_slots))
    size = note_planned(state, rows, step)
    state.in_flight.append(InFlight(step.number, sampled, rows.size, slots.generations[sampled], step.scored, size))
    state.next_step += 1
    state.counters.steps += 1
    state.counters.hydragen_rows += int(groups.num_rows[groups.first_columns == 0].sum())
    fields: dict[str, Any] = {}
    if step.chunk_slots:
        fields |= {
            "prefill_slots": np.asarray(step.chunk_slots, np.int32),
            "prefill_starts": np.asarray(step.chunk_starts, np.int32),
            "prefill_lengths": np.asarray([chunk.size for chunk in step.chunk_tokens], np.int32),
            "prefill_tokens": np.concatenate(step.chunk_tokens),
            "fanout_slots": fanout_slots,
            "fanout_chunks": np.concatenate([EMPTY32, *step.fanout_chunks]),
        }
        if step.scored:
            fields |= scored_fields(step)
    if step.appends:
        for name, parts in zip(("slots", "indices", "pages"), zip(*step.appends, strict=True), strict=True):
            fields[f"append_{name}"] = np.concatenate(parts)
    if step.copy_to:
        fields |= {"copy_from": np.concatenate(step.copy_from), "copy_to": np.concatenate(step.copy_to)}
    if groups.first_rows.size:
        fields |= {
            "group_first_rows": groups.first_rows,
            "group_num_rows": groups.num_rows,
            "group_first_columns": groups.first_columns,
            "group_num_columns": groups.num_columns,
        }
    if step.new_slots:
        fields["new"] = _batch_new_slots(state, step)
        fields["edits"] = _batch_edits(state, step)
    if step.grammar_outputs:
        fields["grammar_outputs"] = np.concatenate(step.grammar_outputs)
    return Step(number=step.number, decode_slots=rows, after=step.after, **fields)


def _batch_new_slots(state: ManagerState, step: StepBuilder) -> SlotBatch:
    streams = [stream for slot in step.new_slots if (stream := state.slots.streams[slot]) is not None]
    return SlotBatch.of_streams(
        step.new_slots,
        [stream.request.sampling for stream in streams],
        length=step.new_lengths,
        num_sampled=[stream.num_kept for stream in streams],
        seed=[stream.seed for stream in streams],
        grammar=[0 if stream.request.grammar is None else stream.request.grammar.number for stream in streams],
    )


def _batch_edits(state: ManagerState, step: StepBuilder) -> tuple[SlotEdits, ...]:
    """Return the edits of the step's new slots, once for all slots of a request."""
    slots_of: dict[Request, list[int]] = {}
    for slot in step.new_slots:
        stream = state.slots.streams[slot]
        if stream is not None and stream.request.edits is not None:
            slots_of.setdefault(stream.request, []).append(slot)
    return tuple(
        SlotEdits(np.asarray(slots, np.int32), request.edits)
        for request, slots in slots_of.items()
        if request.edits is not None
    )
