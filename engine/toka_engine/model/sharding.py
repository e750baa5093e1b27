"""Which part of a model each tensor-parallel rank holds. Pure arithmetic, and the only place that divides by ranks.

Linear layers that read the residual stream are split by outputs, those that add to it by inputs (Shoeybi et al. 2019),
attention by heads, embedding and LM head by vocabulary. Every rank holds the whole residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass

from toka_engine.errors import ConfigError

VOCABULARY_MULTIPLE = 16
"""A rank's first token id is a multiple of this: seeded sampling hashes several tokens at once."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The indices [begin, end) of a tensor's dimension `dim`, which one rank holds."""

    dim: int
    begin: int
    end: int

    @property
    def index(self) -> tuple[slice, ...]:
        """The index of this part in a whole tensor."""
        return (*(slice(None),) * self.dim, slice(self.begin, self.end))

    def cut(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of this part of a tensor of `shape`."""
        return (*shape[: self.dim], self.end - self.begin, *shape[self.dim + 1 :])


@dataclass(frozen=True, slots=True)
class HeadRange:
    """The query heads [begin, end) and KV heads [kv_begin, kv_end) of one rank."""

    begin: int
    end: int
    kv_begin: int
    kv_end: int

    @property
    def num_heads(self) -> int:
        return self.end - self.begin

    @property
    def num_kv_heads(self) -> int:
        return self.kv_end - self.kv_begin


@dataclass(frozen=True, slots=True)
class Sharding:
    """Says which part rank `rank` of `size` tensor-parallel ranks holds."""

    rank: int
    size: int

    def check(self, num_heads: int, num_kv_heads: int, intermediate_size: int, vocab_size: int) -> None:
        """Raise ConfigError where these sizes of config.json cannot be split, with the field and both numbers."""
        self.split_heads(num_heads, num_kv_heads)
        self.split("intermediate_size", intermediate_size)
        self.split_vocabulary(vocab_size)

    def split(self, name: str, total: int) -> tuple[int, int]:
        """This rank's equal part [begin, end) of `total`. Raises ConfigError, with `name` and both numbers."""
        if total % self.size:
            raise ConfigError(f"{name}={total} cannot be split over tp_size={self.size}")
        part = total // self.size
        return self.rank * part, (self.rank + 1) * part

    def split_heads(self, num_heads: int, num_kv_heads: int) -> HeadRange:
        """This rank's heads. With more ranks than KV heads, several ranks hold the same one.

        Raises ConfigError where query heads do not divide, or KV heads are neither a multiple of the ranks nor a
        divisor.
        """
        begin, end = self.split("num_attention_heads", num_heads)
        if num_kv_heads % self.size == 0 or self.size % num_kv_heads:
            return HeadRange(begin, end, *self.split("num_key_value_heads", num_kv_heads))
        kv_head = self.rank * num_kv_heads // self.size
        return HeadRange(begin, end, kv_head, kv_head + 1)

    def split_vocabulary(self, vocab_size: int) -> tuple[int, int]:
        """This rank's token ids [begin, end): equal parts, the last one shorter. Raises ConfigError if it is empty."""
        if self.size == 1:
            return 0, vocab_size
        part = -(-vocab_size // (self.size * VOCABULARY_MULTIPLE)) * VOCABULARY_MULTIPLE
        if part * (self.size - 1) >= vocab_size:
            raise ConfigError(f"vocab_size={vocab_size} cannot be split over tp_size={self.size}")
        return self.rank * part, min(vocab_size, (self.rank + 1) * part)
