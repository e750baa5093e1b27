"""The table of a slot's parameters, and the batches of new slots that are made from it.

A slot is a row of the manager's and the worker's state. `Sampling` is the table: each field is one column of that
state, with its dtype, its default and where it goes. The wire message (`Step.new`), the worker's mirror on the host,
the state on the device and what warm-up sends follow from it; nothing else lists the columns. To add one, see
docs/adding-a-sampling-parameter.md. Imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Final, NamedTuple, get_type_hints

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

FILTER: Final = "filter"
"""The sampler leaves tokens out of a row where such a column is not at its default, unless the row is greedy."""
PENALTY: Final = "penalty"
"""The sampler changes a row's logits by its tokens so far where such a column is not at its default."""


MAX_GRAMMAR_STREAMS: Final = 1024
"""Streams with a grammar that run at once: what GPU workers have pinned memory for. Others wait for one to end."""


class Stored(NamedTuple):
    """The storage of a column, beside the worker's mirror on the host, which has all of them."""

    dtype: type[np.int32] | type[np.int64] | type[np.float32]
    on_device: bool = False
    """GPU kernels read it by slot."""
    part: str | None = None
    """The part of the sampler that a row takes where this column is not at its default: FILTER, PENALTY or None."""


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """The parameters by which one request's tokens are sampled. Defaults mean "off"; greedy is temperature 0."""

    temperature: Annotated[float, Stored(np.float32, on_device=True)] = 1.0
    top_p: Annotated[float, Stored(np.float32, on_device=True, part=FILTER)] = 1.0
    top_k: Annotated[int, Stored(np.int32, on_device=True, part=FILTER)] = 0
    """0: all."""
    min_p: Annotated[float, Stored(np.float32, on_device=True, part=FILTER)] = 0.0
    seed: Annotated[int, Stored(np.int64, on_device=True)] = -1
    """-1: none; else 0 <= seed < 2**63. A slot's seed is mixed with its choice's index."""
    num_logprobs: Annotated[int, Stored(np.int32)] = -1
    """-1: none; 0: the chosen token's; k: also the k most likely tokens'."""
    presence_penalty: Annotated[float, Stored(np.float32, part=PENALTY)] = 0.0
    frequency_penalty: Annotated[float, Stored(np.float32, part=PENALTY)] = 0.0
    repetition_penalty: Annotated[float, Stored(np.float32, part=PENALTY)] = 1.0


class Column(NamedTuple):
    """One row of the table."""

    name: str
    dtype: np.dtype[Any]
    default: float | int
    on_device: bool
    part: str | None


def _read_columns() -> tuple[Column, ...]:
    hints, defaults = get_type_hints(Sampling, include_extras=True), Sampling()
    stored = {name: hints[name].__metadata__[0] for name in Sampling.__struct_fields__}
    of_sampling = [
        Column(name, np.dtype(each.dtype), getattr(defaults, name), each.on_device, each.part)
        for name, each in stored.items()
    ]
    return (
        Column("length", np.dtype(np.int32), 0, False, None),  # tokens whose KV the slot's pages hold already
        Column("num_sampled", np.dtype(np.int32), 0, True, None),  # output tokens so far: seeded draws go on from there
        Column("grammar", np.dtype(np.int32), 0, False, None),  # number of the grammar that the output follows; 0: none
        *of_sampling,
    )


SLOT_COLUMNS: Final = _read_columns()
"""Every column of a slot: what the manager says of its progress, then the fields of `Sampling`."""
_COLUMN_OF_NAME = {column.name: column for column in SLOT_COLUMNS}


class SlotBatch(msgspec.Struct, frozen=True, array_like=True):
    """New slots and their parameters. A column in which every slot has the default is left out."""

    slots: NDArray[np.int32] = msgspec.field(default_factory=lambda: _NO_SLOTS)  # [a]
    columns: dict[str, NDArray[Any]] = msgspec.field(default_factory=dict)
    """By the name in SLOT_COLUMNS: [a], of the column's dtype."""

    @classmethod
    def of(cls, slots: ArrayLike, **columns: ArrayLike) -> SlotBatch:
        """Return `slots` [a] with values [a], or one for all, of the columns that are named. Raises KeyError."""
        batch = np.asarray(slots, np.int32)
        return cls(batch, dict(_find_set(batch.size, columns.items())))

    @classmethod
    def of_streams(
        cls,
        slots: list[int],  # [a]
        samplings: list[Sampling],  # [a]
        **replaced: Sequence[Any],  # [a] each: columns beside those of `Sampling`, or in their place
    ) -> SlotBatch:
        """Return `slots` with their streams' parameters. Choices of one request share one `Sampling`."""
        # A few slots a step, or thousands: lists are counted without numpy, which costs a microsecond a call.
        columns: dict[str, NDArray[Any]] = {}
        for name, given in replaced.items():
            if given.count(_COLUMN_OF_NAME[name].default) < len(given):
                columns[name] = np.array(given, _COLUMN_OF_NAME[name].dtype)
        distinct = {id(each): each for each in samplings}
        indices: list[int] | None = None
        fields = zip(*map(msgspec.structs.astuple, distinct.values()), strict=True)
        for name, values in zip(Sampling.__struct_fields__, fields, strict=False):
            if name in replaced or values.count(_COLUMN_OF_NAME[name].default) == len(values):
                continue
            if indices is None:
                index_of = dict(zip(distinct, range(len(distinct)), strict=True))
                indices = [index_of[id(each)] for each in samplings]
            columns[name] = np.array(values, _COLUMN_OF_NAME[name].dtype)[indices]
        return cls(np.array(slots, np.int32), columns)

    def __len__(self) -> int:
        return self.slots.size

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Values [a] of the column `name`."""
        column = _COLUMN_OF_NAME[name]
        found = self.columns.get(name)
        return np.full(self.slots.size, column.default, column.dtype) if found is None else found

    def asks_for(self, part: str) -> NDArray[np.bool_]:
        """Return which slots [a] have a parameter of this part of the sampler set."""
        asks = np.zeros(self.slots.size, np.bool_)
        for name, values in self.columns.items():
            column = _COLUMN_OF_NAME[name]
            if column.part == part:
                asks |= values != column.dtype.type(column.default)
        return asks


def _find_set(count: int, columns: Iterable[tuple[str, ArrayLike]]) -> Iterable[tuple[str, NDArray[Any]]]:
    for name, given in columns:
        column = _COLUMN_OF_NAME[name]
        values = np.asarray(given, column.dtype)
        if (values != column.dtype.type(column.default)).any():
            yield name, values if values.ndim else np.full(count, values)


_NO_SLOTS: NDArray[np.int32] = np.empty(0, np.int32)
_NO_SLOTS.setflags(write=False)
