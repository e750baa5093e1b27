"""The messages of the way of a request: between server, manager and model workers.

Arrays are one-dimensional, contiguous numpy arrays; the comment behind each gives dtype and length. Imports nothing of
ours but `slot_parameters`, `histogram` and `grammar.source`. `codec` has the wire form, docs/structure.md the walk of
one request.

Links: server <-> manager, manager <-> each model worker; `control_messages` has those of supervisor and children.
A *stream* is one output sequence (one of a request's n choices); the server numbers streams, never reusing a number.
A *slot* is a row of the manager's and the worker's state; a stream owns one while it runs.
A *page* is `page_size` consecutive tokens of KV cache. A *step* is one forward pass.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from toka_engine.grammar.source import GrammarSource
from toka_engine.histogram import Buckets
from toka_engine.slot_parameters import Sampling, SlotBatch

Int32s: TypeAlias = NDArray[np.int32]
Int64s: TypeAlias = NDArray[np.int64]
Bytes: TypeAlias = NDArray[np.uint8]
Floats: TypeAlias = NDArray[np.float32]


NO_ITEMS: dict[np.dtype[Any], NDArray[Any]] = {
    np.dtype(kind): np.frombuffer(b"", kind) for kind in (np.int32, np.int64, np.uint8, np.float32)
}
"""The empty arrays, which nobody can write to. One for each dtype that is sent: defaults are known by identity."""


def _empty(dtype: Any) -> Any:
    """Return the default of an array, which is not sent."""
    return msgspec.field(default=NO_ITEMS[np.dtype(dtype)])


class Message(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Base of every message: tagged with its class name; fields on the wire by name, without those left at defaults.

    Most arrays of most steps are empty. To write and read them cost a small step as much as all its planning.
    """


# ---------------------------------------------------------------- server -> manager


class WordList(msgspec.Struct, frozen=True, array_like=True):
    """Words of several tokens: the last token of each is not sampled where the others have just been."""

    ids: Int32s = _empty(np.int32)  # [w]  the last tokens
    lengths: Int32s = _empty(np.int32)  # [w]  how many tokens stand before each
    tokens: Int32s = _empty(np.int32)  # [sum(lengths)]  these tokens


class LogitEdits(msgspec.Struct, frozen=True, array_like=True):
    """Changes to a request's logits by token id, before penalties. The ids of an array are distinct."""

    bias_ids: Int32s = _empty(np.int32)  # [b]
    bias_values: Floats = _empty(np.float32)  # [b]  added to the logits; -inf: never sampled
    allowed_ids: Int32s = _empty(np.int32)  # [a]  no other token is sampled; empty: all may be
    end_ids: Int32s = _empty(np.int32)  # [e]  not sampled before `min_tokens` tokens
    min_tokens: int = 0
    words: WordList = WordList()


class Submit(Message, frozen=True):
    """One prompt and its n choices. The server has checked every limit that `EngineInfo` states."""

    first_stream: int
    """Choice i is stream first_stream + i."""
    num_choices: int
    prompt_ids: Int32s  # [prompt_len >= 1]
    max_tokens: int
    sampling: Sampling
    stop_ids: tuple[int, ...]
    """Tokens that end a stream (not delivered); empty with ignore_eos."""
    deliver_each: bool
    """True: tokens in each `Deltas` as they come. False: all at once in the `Deltas` that ends the stream."""
    first_choice: int = 0
    """Choice i here is choice first_choice + i of the request, which was sent in parts, and draws with its seed."""
    edits: LogitEdits | None = None
    delivers_stop: bool = False
    """The stop token that ends a stream is delivered like the tokens before it."""
    prompt_logprobs: int = -1
    """-1: none; else `PromptLogprobs` come, with so many of the likeliest tokens at each position."""
    grammar: GrammarSource | None = None
    """The outputs are texts of this grammar."""
    priority: int = 0
    """From -100 to 100; lower ones go first. Above 0 it is background work, which others may interrupt."""
    timeout_s: float = 0.0
    """Refused at once if it will probably not start by then; 0: it may wait. The server cancels it when it is over."""
    is_streamed: bool = False
    """The client gets each token as it comes, so that a late one is seen. `deliver_each` is true of others, too."""


class Cancel(Message, frozen=True):
    """These streams are no longer wanted (client gone, stop string seen). Unknown ones are ignored; no answer comes."""

    streams: Int64s  # [k]


ServerToManager: TypeAlias = Submit | Cancel

# ---------------------------------------------------------------- manager -> server

FINISH_STOP = 0
"""A stop token."""
FINISH_LENGTH = 1
FINISH_ERROR = 2
"""This stream's logits were NaN or infinite: 500 for its request, the others go on."""


FINISH_GRAMMAR = 3
"""This stream's grammar could not be followed: as above."""


class EngineInfo(Message, frozen=True):
    """First message to the server, once the workers are ready: the limits that the server enforces."""

    vocab_size: int
    max_request_tokens: int
    """Prompt plus max_tokens of one stream."""
    num_kv_tokens: int
    max_streams: int
    """Slots: streams that can run at once."""
    device: str
    dtype: str


DEADLINE_UNREACHABLE = "deadline_unreachable"


class Refused(Message, frozen=True):
    """The queue is full, or so long that the request cannot start in time: 429 for this request."""

    first_stream: int
    message: str
    code: str = "queue_full"
    retry_after_s: int = 1


class Started(Message, frozen=True):
    """Prompts that were admitted, each before its first token. One that starts in several parts, or again after it was
    preempted during its prefill, is named again.
    """

    streams: Int64s  # [a]  a stream of each
    num_cached: Int32s  # [a]  tokens of the prompt found in the prefix tree


class Deltas(Message, frozen=True):
    """Results of one or more steps, for all streams.

    A stop token that ends a stream is counted in `ended_num_tokens` but is not in any token array, unless its request
    has `delivers_stop`.
    """

    streams: Int64s = _empty(np.int64)  # [k]  one entry per delivered token, deliver_each streams only
    tokens: Int32s = _empty(np.int32)  # [k]
    logprobs: Floats = _empty(np.float32)  # [k] or [0]; NaN where not asked for
    top_rows: Int32s = _empty(np.int32)  # [r]  indices into the k entries (or into `ended_tokens`: see top_of_ended)
    top_tokens: Int32s = _empty(np.int32)  # [r * top_width]; -1 where fewer were asked for
    top_logprobs: Floats = _empty(np.float32)  # [r * top_width]
    top_width: int = 0
    ended: Int64s = _empty(np.int64)  # [e]  streams that ended
    ended_reasons: Bytes = _empty(np.uint8)  # [e]  FINISH_*
    ended_num_tokens: Int32s = _empty(np.int32)  # [e]  completion tokens of the whole stream, for usage
    ended_lengths: Int32s = _empty(np.int32)  # [e]  how many of ended_tokens are this stream's; 0 if deliver_each
    ended_tokens: Int32s = _empty(np.int32)  # [sum(ended_lengths)]
    ended_logprobs: Floats = _empty(np.float32)  # [sum(ended_lengths)] or [0]
    top_of_ended: bool = False
    """The top_* arrays describe ended_tokens. Such a Deltas carries no per-step entries."""


class PromptLogprobs(Message, frozen=True):
    """Logprobs of some of a prompt's tokens. They come in order, all of them before its choices' first tokens."""

    first_stream: int
    """The first stream of the `Submit`."""
    start: int
    """Position in the prompt of the first of these tokens, at least 1."""
    logprobs: Floats  # [k]
    ranks: Int32s  # [k]  1: no token is likelier
    top_tokens: Int32s  # [k * top_width]
    top_logprobs: Floats  # [k * top_width]
    top_width: int


class Durations(msgspec.Struct, frozen=True, array_like=True):
    """Durations in the lives of streams. One that is preempted counts in `queue`, `prefill` and `first_token` once."""

    queue: Buckets = Buckets()
    """From its arrival at the manager to its start."""
    prefill: Buckets = Buckets()
    """From its start to its first token."""
    first_token: Buckets = Buckets()
    """From its arrival to its first token."""
    decode: Buckets = Buckets()
    """From its first token to its end, if it was not preempted in between."""
    between_tokens: Buckets = Buckets()
    """From a token to the next one, for each token but the first."""


class Stats(Message, frozen=True):
    """For /metrics, a few times a second while there is work. Totals only grow."""

    running: int
    waiting: int
    kv_pages_total: int
    kv_pages_used: int
    kv_pages_cached: int
    """Held by the prefix tree alone: free when needed."""
    prompt_tokens_total: int
    prefix_hit_tokens_total: int
    output_tokens_total: int
    preemptions_total: int
    steps_total: int
    hydragen_rows_total: int
    manager_cpu_s_total: float
    step_wall_s_total: float
    """From each step's launch to its tokens: steps that overlap count more than once."""
    step_busy_s_total: float
    """While at least one step was under way."""
    model_cpu_s_total: float
    """CPU time of the model worker, to launch the steps."""
    durations: Durations = Durations()


ManagerToServer: TypeAlias = EngineInfo | Refused | Started | Deltas | PromptLogprobs | Stats

# ---------------------------------------------------------------- manager -> model worker


class SlotEdits(msgspec.Struct, frozen=True, array_like=True):
    """The edits of one request, for those of its streams that a step sets up."""

    slots: Int32s  # [k]
    edits: LogitEdits


class Step(Message, frozen=True):
    """One forward pass, as differences to the state that the worker keeps by slot.

    The worker applies the parts in this order: set up new slots, append pages, copy pages, forward, sample.
    Rows of the forward: first the decode rows (one token each: the slot's last sampled one, which the worker holds, at
    position `length[slot]`), then the tokens of the prefill chunks. Both advance `length[slot]` by what they wrote.

    Sampled tokens come in this order: one per decode row, then one per fan-out entry. A fan-out entry samples for
    `fanout_slots[i]` from the last row of prefill chunk `fanout_chunks[i]`; n choices of one prompt are n entries on
    one chunk, and the worker sets `length` of such a slot to the chunk slot's length.
    """

    number: int
    new: SlotBatch = SlotBatch()
    """Slots to set up. Their `length` is what a prefix hit gave; `num_sampled` > 0 after preemption."""
    edits: tuple[SlotEdits, ...] = ()
    """For those of the new slots whose requests ask for edits; other new slots have none."""
    # block table: table[append_slots[i], append_indices[i]] = append_pages[i]
    append_slots: Int32s = _empty(np.int32)  # [b]
    append_indices: Int32s = _empty(np.int32)  # [b]
    append_pages: Int32s = _empty(np.int32)  # [b]
    # KV pages copied in all layers before the forward (a shared prompt's part-filled last page)
    copy_from: Int32s = _empty(np.int32)  # [c]
    copy_to: Int32s = _empty(np.int32)  # [c]
    # decode rows, members of a Hydragen group side by side
    decode_slots: Int32s = _empty(np.int32)  # [d]
    # prefill chunks
    prefill_slots: Int32s = _empty(np.int32)  # [p]
    prefill_starts: Int32s = _empty(np.int32)  # [p]  position of the chunk's first token = length[slot] before
    prefill_lengths: Int32s = _empty(np.int32)  # [p]  >= 1
    prefill_tokens: Int32s = _empty(np.int32)  # [sum(prefill_lengths)]
    fanout_slots: Int32s = _empty(np.int32)  # [s]
    fanout_chunks: Int32s = _empty(np.int32)  # [s]  index into the p chunks
    # prompt logprobs: chunks of which each row but the prompt's last gives the logprob of the token that follows
    scored_chunks: Int32s = _empty(np.int32)  # [q]  index into the p chunks
    scored_next: Int32s = _empty(np.int32)  # [q]  the prompt's token after the chunk; -1: the chunk is its end
    scored_counts: Int32s = _empty(np.int32)  # [q]  how many of the likeliest tokens are asked for
    # Hydragen groups over decode rows: rows [first_row, first_row + num_rows) share the pages at block table columns
    # [first_column, first_column + num_columns). Groups may nest (levels): an inner group starts where its outer ends.
    # Sorted by first_column; groups of one first_column do not overlap. Every page of a group is full.
    group_first_rows: Int32s = _empty(np.int32)  # [g]
    group_num_rows: Int32s = _empty(np.int32)  # [g]
    group_first_columns: Int32s = _empty(np.int32)  # [g]
    group_num_columns: Int32s = _empty(np.int32)  # [g]
    # Output so far of those new slots that have a grammar and `num_sampled` > 0, in the order of `new`
    grammar_outputs: Int32s = _empty(np.int32)  # [sum of these slots' num_sampled]
    after: int = 0
    """The last step that samples a token which a decode row reads; 0 where steps take no turns (one lane). The first
    stage of a pipeline waits for that token."""


class Grammar(Message, frozen=True):
    """Compile the grammar with this number, to which slots refer by a column of `new`; `GrammarReady` answers."""

    number: int
    source: GrammarSource | None  # None: forget it, no slot will refer to it any more


class Stop(Message, frozen=True):
    """End after the steps sent so far."""


ManagerToWorker: TypeAlias = Step | Grammar | Stop

# ---------------------------------------------------------------- model worker -> manager


class StepTime(msgspec.Struct, frozen=True, array_like=True):
    """The time that a step of the warm-up has taken."""

    num_rows: int
    """Decode rows."""
    num_context: int
    """Tokens in the contexts of those."""
    num_prefill: int
    """Tokens of its one prompt."""
    seconds: float


class WorkerReady(Message, frozen=True):
    """The worker has loaded and warmed up; sizes are final."""

    vocab_size: int
    max_positions: int
    num_pages: int
    page_size: int
    max_seqs: int
    """Slots."""
    max_tokens_per_forward: int
    max_pages_per_seq: int
    """Columns of the block table."""
    device: str
    dtype: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    step_times: tuple[StepTime, ...] = ()
    """Empty: none was measured."""


NOT_FINITE = -1  # in place of a token's id: the row's logits were not finite
GRAMMAR_FAILED = -3  # the row's grammar could not be followed (-2 is NO_STOP of manager.slots)


class GrammarReady(Message, frozen=True):
    """The worker has compiled a grammar, and slots may refer to it; or it could not, which `error` explains."""

    number: int
    error: str = ""


class Tokens(Message, frozen=True):
    """Tokens that step `number` sampled, in the order that `Step` states."""

    number: int
    ids: Int32s  # [d + s]; NOT_FINITE or GRAMMAR_FAILED where there is no token
    logprobs: Floats = _empty(np.float32)  # [d + s] or [0]: of the chosen token, from the unscaled distribution
    top_rows: Int32s = _empty(np.int32)  # [r]  rows that asked for top logprobs
    top_tokens: Int32s = _empty(np.int32)  # [r * top_width]
    top_logprobs: Floats = _empty(np.float32)  # [r * top_width]
    top_width: int = 0
    step_wall_s: float = 0.0
    """From the step's launch until its tokens are on the host."""
    host_cpu_s: float = 0.0
    """CPU time of the thread that launched it."""
    scored_logprobs: Floats = _empty(np.float32)  # [u]  of the rows of scored chunks, in their order
    scored_ranks: Int32s = _empty(np.int32)  # [u]  1: no token is likelier
    scored_top_tokens: Int32s = _empty(np.int32)  # [u * scored_top_width]; -1 where fewer were asked for
    scored_top_logprobs: Floats = _empty(np.float32)  # [u * scored_top_width]
    scored_top_width: int = 0


WorkerToManager: TypeAlias = WorkerReady | GrammarReady | Tokens
