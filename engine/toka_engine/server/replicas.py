"""Which replica (a manager with its model workers) gets a prompt, and the books of what each has still to do. Pure.

The smallest `outstanding + prompt - cached` wins, in tokens; on a tie the one that was used least recently. A token
that waits to be decoded and one that waits to be prefilled cost a replica about the same, so affinity to a cached
prefix is bounded by load, and needs no setting. `outstanding` comes from what this process sent and got back, never
from `Stats`, which lag. When nothing runs, it is exactly zero.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import msgspec

from toka_engine.messages import EngineInfo, Stats, Submit
from toka_engine.server.prefix_index import PrefixIndex

MIN_SPLIT_CHOICES = 64
"""The choices of one prompt are spread only in parts at least as large: each part prefills the prompt once more."""
_PRIOR_ENDS = 16
"""Before streams have ended, each is taken to reach its limit, as if so many had."""
_MAX_ENDS = 256
"""An end counts as one in at most so many, so that the mean follows a change of traffic."""


class Replica:
    """One manager, as the server sees it."""

    def __init__(self, index: int, send: Callable[[msgspec.Struct], None]) -> None:
        """`send` takes a message to the manager; it does not raise when the manager is gone."""
        self.index = index
        self.send = send
        self.info: EngineInfo | None = None
        self.stats: Stats | None = None
        self.prefixes = PrefixIndex()
        self.outstanding = 0
        """Tokens charged and not returned yet. Streams that outlive their prediction may make it negative."""
        self.num_open = 0
        """Choices submitted to it that have not ended."""
        self.last_used = 0
        self.is_lost = False

    @property
    def num_free(self) -> int:
        """Choices that can run at once besides those submitted to it; as many as it likes while it has not said."""
        return sys.maxsize if self.info is None else max(0, self.info.max_streams - self.num_open)


class Submission:
    """One `Submit` in the books of its replica."""

    __slots__ = (
        "blocks",
        "choice_charge",
        "has_moved",
        "is_started",
        "num_cached",
        "num_guessed_blocks",
        "num_open",
        "prompt_charge",
        "replica",
        "submit",
    )

    def __init__(self, submit: Submit, blocks: Sequence[bytes]) -> None:
        self.submit = submit
        self.blocks = blocks
        self.replica: Replica
        self.num_guessed_blocks = 0
        self.prompt_charge = 0
        """Returned when the prompt has been admitted."""
        self.choice_charge = 0
        """Returned token by token as they come, and what is left of it at the choice's end."""
        self.num_open = submit.num_choices
        self.num_cached = 0
        """Tokens of the prompt that were found in the prefix cache; valid once it has been admitted."""
        self.is_started = False
        self.has_moved = False


class Replicas:
    """All replicas of this engine: chooses among them and keeps their books."""

    def __init__(self, senders: Sequence[Callable[[msgspec.Struct], None]], block_tokens: int) -> None:
        self.all = [Replica(index, send) for index, send in enumerate(senders)]
        self.guessed_tokens = 0
        """Prompt tokens that were taken to be in the chosen replica's cache, of prompts admitted so far."""
        self.cached_tokens = 0
        """Prompt tokens that were found there."""
        self.num_retries = 0
        """Submissions refused by one replica and sent to another."""
        self._block_tokens = block_tokens
        self._num_uses = 0
        self._num_ends = _PRIOR_ENDS
        self._mean_share = 1.0
        """Output tokens of ended streams, as a share of their limit."""

    @property
    def live(self) -> list[Replica]:
        return [replica for replica in self.all if not replica.is_lost]

    # ------------------------------------------------------------ choice

    def place(self, submit: Submit, blocks: Sequence[bytes]) -> list[Submission]:
        """Decide who gets `submit`, and charge them. Return what to send, in parts if several replicas share it.

        `blocks` are the prompt's hashes; none where there is nothing to choose.
        """
        if len(self.all) == 1:
            submission = Submission(submit, blocks)
            self._charge(submission, self.all[0])
            return [submission]
        live = self.live
        idle = [replica for replica in live if not replica.num_open]
        is_whole = submit.prompt_logprobs >= 0  # they come from one manager, before its tokens
        if not is_whole and len(idle) > 1 and submit.num_choices >= MIN_SPLIT_CHOICES * len(idle):
            count, rest = divmod(submit.num_choices, len(idle))
            shares = [count + (index < rest) for index in range(len(idle))]
            return self._split(submit, blocks, list(zip(idle, shares, strict=True)))
        submission = Submission(submit, blocks)
        chosen = self._choose(submission, live)
        if not is_whole and len(parts := _find_room(chosen, live, submit.num_choices)) > 1:
            return self._split(submit, blocks, parts)
        self._charge(submission, chosen)
        return [submission]

    def move(self, submission: Submission) -> bool:
        """`submission` was refused by its replica: charge another. False if there is none, or at the second time."""
        others = [replica for replica in self.live if replica is not submission.replica]
        if submission.has_moved or not others:
            return False
        self._discharge(submission)
        submission.has_moved = True
        self.num_retries += 1
        self._charge(submission, self._choose(submission, others))
        return True

    def _choose(self, submission: Submission, candidates: list[Replica]) -> Replica:
        blocks, num_tokens = submission.blocks, self._block_tokens
        return min(
            candidates,
            key=lambda replica: (
                replica.outstanding - replica.prefixes.count_known(blocks) * num_tokens,
                replica.last_used,
            ),
        )

    def _split(self, submit: Submit, blocks: Sequence[bytes], parts: Sequence[tuple[Replica, int]]) -> list[Submission]:
        """`parts`: who gets how many choices, in order."""
        begin, submissions = 0, []
        for replica, num_choices in parts:
            part = msgspec.structs.replace(
                submit,
                first_stream=submit.first_stream + begin,
                num_choices=num_choices,
                first_choice=submit.first_choice + begin,
            )
            begin += num_choices
            submissions.append(Submission(part, blocks))
            self._charge(submissions[-1], replica)
        return submissions

    # ------------------------------------------------------------ books

    def start(self, submission: Submission, num_cached: int) -> None:
        """The prompt has been admitted, `num_cached` of its tokens being in the cache. Only the first call counts."""
        if submission.is_started:
            return
        submission.is_started = True
        submission.num_cached = num_cached
        self._return_prompt(submission)
        num_guessed = submission.num_guessed_blocks * self._block_tokens
        self.guessed_tokens += num_guessed
        self.cached_tokens += num_cached
        if num_cached < num_guessed:
            num_evicted = submission.num_guessed_blocks - num_cached // self._block_tokens
            submission.replica.prefixes.note_evicted(num_evicted, submission.blocks)

    def close_choice(self, submission: Submission, num_delivered: int) -> None:
        """A choice has ended or was cancelled, after `num_delivered` tokens that were taken off the books."""
        replica = submission.replica
        replica.outstanding -= submission.choice_charge - num_delivered
        replica.num_open -= 1
        submission.num_open -= 1
        if not submission.num_open:
            self._forget_unstarted(submission)

    def learn_end(self, num_tokens: int, max_tokens: int) -> None:
        """A stream came to its end by itself: those to come are expected to use as much of their limit."""
        self._num_ends = min(self._num_ends + 1, _MAX_ENDS)
        self._mean_share += (num_tokens / max_tokens - self._mean_share) / self._num_ends

    def _charge(self, submission: Submission, replica: Replica) -> None:
        submit, blocks = submission.submit, submission.blocks
        num_known = replica.prefixes.count_known(blocks)
        submission.replica = replica
        submission.num_guessed_blocks = num_known
        submission.prompt_charge = submit.prompt_ids.size - num_known * self._block_tokens
        submission.choice_charge = max(1, round(submit.max_tokens * self._mean_share))
        replica.outstanding += submission.prompt_charge + submission.num_open * submission.choice_charge
        replica.num_open += submission.num_open
        replica.prefixes.add(blocks)
        self._num_uses += 1
        replica.last_used = self._num_uses

    def _discharge(self, submission: Submission) -> None:
        """Take a refused submission off the books: nothing of it was delivered."""
        replica = submission.replica
        replica.outstanding -= submission.num_open * submission.choice_charge
        replica.num_open -= submission.num_open
        self._forget_unstarted(submission)

    def _forget_unstarted(self, submission: Submission) -> None:
        if not submission.is_started:
            self._return_prompt(submission)
            submission.replica.prefixes.forget(submission.blocks[submission.num_guessed_blocks :])

    def _return_prompt(self, submission: Submission) -> None:
        submission.replica.outstanding -= submission.prompt_charge
        submission.prompt_charge = 0


def _find_room(chosen: Replica, live: Sequence[Replica], num_choices: int) -> list[tuple[Replica, int]]:
    """Return who runs how many of a prompt's choices: those that would wait for a slot go where slots are free.

    Parts are large, or what they save is not worth computing the prompt once more.
    """
    parts, left = [(chosen, chosen.num_free)], num_choices - chosen.num_free
    if chosen.num_free < MIN_SPLIT_CHOICES:
        return [(chosen, num_choices)]
    for other in sorted(live, key=lambda replica: replica.num_free, reverse=True):
        if other is not chosen and min(left, other.num_free) >= MIN_SPLIT_CHOICES:
            parts.append((other, min(left, other.num_free)))
            left -= parts[-1][1]
    return [(chosen, chosen.num_free + left), *parts[1:]]
