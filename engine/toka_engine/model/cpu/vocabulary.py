"""Joins what the ranks find in their parts of the vocabulary, for the CPU sampler. Exact for every parameter.

Each rank has the logits of its own tokens. A maximum, a sum and the best k are joined from those of the ranks. To draw
a token, a rank is drawn by its mass; the token is the one that this rank has drawn from its own. Only rows with top_k,
top_p or min_p are gathered whole. What is joined is equal on all ranks, so they sample equal tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import torch

from toka_engine.model.ranks import Ranks
from toka_engine.model.sharding import Sharding

Pick: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""Weights [n, k] float64 -> a random index [n] by weight, the same on all ranks."""

_NEGATIVE = float("-inf")


class Vocabulary(Protocol):
    """The part of the vocabulary whose logits a sampler is given: tokens [first, first + width).

    Token ids that go in are counted from `first`; those that come out are the model's.
    """

    @property
    def first(self) -> int: ...

    def join_maxima(self, maxima: torch.Tensor) -> torch.Tensor:
        """[n] -> [n]."""
        ...

    def join_all(self, flags: torch.Tensor) -> torch.Tensor:
        """[n] bool -> [n], whether all are true."""
        ...

    def join_log_sums(self, log_sums: torch.Tensor) -> torch.Tensor:
        """Logarithms [n] of sums -> those of the sums over all ranks."""
        ...

    def join_counts(self, counts: torch.Tensor) -> torch.Tensor:
        """Counts [n] in the parts -> those in the whole vocabulary."""
        ...

    def join_best(self, scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Scores [n] of tokens [n] -> the token with the best score; the lowest one of equals."""
        ...

    def join_drawn(self, masses: torch.Tensor, tokens: torch.Tensor, pick: Pick) -> torch.Tensor:
        """Tokens [n] that were drawn from parts of these masses [n] float64 -> those that are drawn from the whole."""
        ...

    def join_top(self, values: torch.Tensor, tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The best values and tokens [n, k] -> the best `count` of all, in descending order."""
        ...

    def widen(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [n, width] of the part -> those of the whole vocabulary."""
        ...

    def narrow(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [n, vocab] -> those of the part."""
        ...

    def find_logits(self, x: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits [n, width], row indices and model's token ids [R] -> the logits [R] of these."""
        ...


class WholeVocabulary:
    """A Vocabulary that is not split."""

    first = 0

    def join_maxima(self, maxima: torch.Tensor) -> torch.Tensor:
        return maxima

    def join_all(self, flags: torch.Tensor) -> torch.Tensor:
        return flags

    def join_log_sums(self, log_sums: torch.Tensor) -> torch.Tensor:
        return log_sums

    def join_counts(self, counts: torch.Tensor) -> torch.Tensor:
        return counts

    def join_best(self, scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return tokens

    def join_drawn(self, masses: torch.Tensor, tokens: torch.Tensor, pick: Pick) -> torch.Tensor:
        return tokens

    def join_top(self, values: torch.Tensor, tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return values, tokens

    def widen(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def narrow(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def find_logits(self, x: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return x[rows, ids]


class ShardedVocabulary:
    """A Vocabulary over tensor-parallel ranks. Each method is one exchange, which all ranks must take part in."""

    def __init__(self, ranks: Ranks, vocab_size: int) -> None:
        parts = [Sharding(rank, ranks.size).split_vocabulary(vocab_size) for rank in range(ranks.size)]
        self._ranks, self._vocab_size = ranks, vocab_size
        self.first, self._end = parts[ranks.rank]
        self._largest = parts[0][1]

    def join_maxima(self, maxima: torch.Tensor) -> torch.Tensor:
        return self._ranks.all_gather(maxima).amax(dim=0)

    def join_all(self, flags: torch.Tensor) -> torch.Tensor:
        return self._ranks.all_gather(flags).all(dim=0)

    def join_log_sums(self, log_sums: torch.Tensor) -> torch.Tensor:
        return torch.logsumexp(self._ranks.all_gather(log_sums), dim=0)

    def join_counts(self, counts: torch.Tensor) -> torch.Tensor:
        return self._ranks.all_gather(counts).sum(dim=0)

    def join_best(self, scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        # Float64 holds float32 scores and token ids exactly. Of equal scores argmax finds the lowest rank's.
        found = self._ranks.all_gather(torch.stack((scores.double(), (tokens + self.first).double())))
        return _take(found[:, 1].long(), found[:, 0].argmax(dim=0))

    def join_drawn(self, masses: torch.Tensor, tokens: torch.Tensor, pick: Pick) -> torch.Tensor:
        found = self._ranks.all_gather(torch.stack((masses, (tokens + self.first).double())))
        return _take(found[:, 1].long(), pick(found[:, 0].t().contiguous()))

    def join_top(self, values: torch.Tensor, tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        missing = (0, count - values.shape[1])
        values = torch.nn.functional.pad(values, missing, value=_NEGATIVE)
        tokens = torch.nn.functional.pad(tokens + self.first, missing)
        found = self._ranks.all_gather(torch.stack((values.double(), tokens.double())))
        every_value, every_token = (found[:, part].permute(1, 0, 2).flatten(1) for part in (0, 1))
        best = torch.topk(every_value, count, dim=1)
        return best.values.to(values.dtype), every_token.gather(1, best.indices).long()

    def widen(self, x: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(x, (0, self._largest - x.shape[1]), value=_NEGATIVE)
        whole = self._ranks.all_gather(padded).permute(1, 0, 2).flatten(1)
        return whole[:, : self._vocab_size].contiguous()

    def narrow(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, self.first : self._end]

    def find_logits(self, x: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        local = ids - self.first
        is_here = (local >= 0) & (local < x.shape[1])
        found = x[rows, local.clamp(0, x.shape[1] - 1)].masked_fill(~is_here, _NEGATIVE)
        return self.join_maxima(found)


def _take(by_rank: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """Values [size, n], ranks [n] -> [n]."""
    return by_rank.gather(0, rank[None]).squeeze(0)
