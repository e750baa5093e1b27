"""Allocator and prefix tree against a model made of dictionaries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toka_engine.manager import prefix_tree
from toka_engine.manager.allocator import Allocator
from toka_engine.manager.prefix_tree import PrefixTree
from toka_engine.messages import Int32s

PAGE = 2


class PagesModel:
    """Sequences as lists of pages, and which prefixes are cached, in plain Python beside the real objects."""

    def __init__(self, num_pages: int) -> None:
        self.allocator = Allocator(num_pages)
        self.tokens = np.zeros((num_pages, PAGE), np.int32)
        self.tree = PrefixTree(self.allocator, self.tokens)
        self.sequences: list[tuple[list[int], list[int]]] = []  # tokens, pages
        self.known: list[int] = []  # per sequence: its leading columns in the tree
        self.cached: dict[tuple[int, ...], int] = {}  # prefix -> page
        self.tick = 0

    def prefix(self, tokens: list[int], column: int) -> tuple[int, ...]:
        return tuple(tokens[: (column + 1) * PAGE])

    def refs(self) -> list[int]:
        counts = [0] * self.allocator.num_pages
        for _, pages in self.sequences:
            for page in pages:
                counts[page] += 1
        return counts

    def start(self, tokens: list[int]) -> None:
        """Match what is cached, take pages for the rest; refuse what does not fit."""
        self.tick += 1
        matched, missing = self.tree.match(np.asarray(tokens, np.int32))
        most = (len(tokens) - 1) // PAGE
        expected: list[int] = []
        while len(expected) < most and self.prefix(tokens, len(expected)) in self.cached:
            expected.append(self.cached[self.prefix(tokens, len(expected))])
        assert matched.tolist() == expected
        assert (missing is None) == (len(matched) == most)
        num_new = -(-len(tokens) // PAGE) - len(matched)
        self.allocator.retain(matched)
        if num_new > self.allocator.num_available:
            self.allocator.release(matched)
            return
        self.tree.touch(matched, self.tick)
        new = self.take(num_new)
        for index, page in enumerate(new.tolist()):
            content = tokens[(len(matched) + index) * PAGE :][:PAGE]
            self.tokens[page] = content + [0] * (PAGE - len(content))
        self.sequences.append((list(tokens), [*expected, *new.tolist()]))
        self.known.append(len(expected))

    def grow(self, index: int, added: list[int]) -> None:
        """Tokens come in, as those of a decoding sequence do; what does not fit is left out."""
        tokens, pages = self.sequences[index]
        for token in added:
            column, offset = divmod(len(tokens), PAGE)
            if column == len(pages):
                if self.allocator.num_available == 0:
                    return
                pages += self.take(1).tolist()
            self.tokens[pages[column], offset] = token
            tokens.append(token)

    def fork(self, index: int) -> None:
        """Another choice of the same prompt: it shares the full pages."""
        tokens, pages = self.sequences[index]
        full = len(tokens) // PAGE
        self.allocator.retain(np.asarray(pages[:full], np.int32))
        self.sequences.append((tokens[: full * PAGE], pages[:full]))
        self.known.append(self.known[index])

    def take(self, count: int) -> Int32s:
        if count > self.allocator.num_free:
            before = dict(self.cached)
            self.tree.evict(count - self.allocator.num_free)
            self.cached = {key: page for key, page in before.items() if self.allocator.is_cached[page]}
            refs = self.refs()
            for key, page in before.items():
                assert key in self.cached or refs[page] == 0, "a held page was evicted"
            for key in self.cached:
                assert len(key) == PAGE or key[:-PAGE] in self.cached, "a parent was evicted before its child"
        return self.allocator.allocate(count)

    def insert(self, index: int) -> None:
        """The full pages of a running sequence enter the tree."""
        self.tick += 1
        tokens, pages = self.sequences[index]
        full = len(tokens) // PAGE
        num_in = self.tree.insert_path(np.asarray(pages[:full], np.int32), self.known[index], self.tick)
        self.known[index] = num_in
        for column in range(full):
            page = self.cached.setdefault(self.prefix(tokens, column), pages[column])
            if page != pages[column]:
                assert num_in == column
                return
        assert num_in == full

    def end(self, index: int) -> None:
        """A sequence ends: its pages enter the tree where nobody else's stand, and are released."""
        self.tick += 1
        refs = self.refs()
        tokens, pages = self.sequences.pop(index)
        full = len(tokens) // PAGE
        self.tree.insert_released(np.asarray(pages[:full], np.int32), self.known.pop(index), self.tick)
        column = 0
        while column < full and self.cached.setdefault(self.prefix(tokens, column), pages[column]) == pages[column]:
            column += 1
        if all(refs[page] == 1 for page in pages[column:full]):
            for deeper in range(column, full):
                self.cached.setdefault(self.prefix(tokens, deeper), pages[deeper])
        self.allocator.release(np.asarray(pages, np.int32))

    def check(self) -> None:
        allocator, refs = self.allocator, self.refs()
        assert allocator.refs.tolist() == refs
        cached = set(self.cached.values())
        assert len(cached) == len(self.cached) == len(self.tree)
        assert set(np.flatnonzero(allocator.is_cached).tolist()) == cached
        only = {page for page in cached if refs[page] == 0}
        assert allocator.num_cached_only == len(only)
        for prefix in self.cached:
            expected = [self.cached[prefix[:end]] for end in range(PAGE, len(prefix) + 1, PAGE)]
            assert self.tree.match(np.asarray([*prefix, 9], np.int32))[0].tolist() == expected
        used = sum(count > 0 for count in refs)
        assert allocator.num_used == used
        assert allocator.num_free == allocator.num_pages - used - len(only)


operations = st.lists(
    st.tuples(
        st.sampled_from(["start", "start", "grow", "fork", "insert", "end"]),
        st.integers(0, 7),
        st.lists(st.integers(0, 1), min_size=1, max_size=13),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(operations, st.integers(5, 24))
def test_pages_are_held_found_and_evicted_as_in_the_model(
    steps: list[tuple[str, int, list[int]]], num_pages: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_tree, "EVICT_LEAST", 1)  # so that some of what could be evicted stays
        play(PagesModel(num_pages), steps)


def play(model: PagesModel, steps: list[tuple[str, int, list[int]]]) -> None:
    for operation, index, tokens in steps:
        if operation == "start":
            model.start(tokens)
        elif model.sequences:
            index %= len(model.sequences)
            if operation == "insert":
                model.insert(index)
            elif operation == "grow":
                model.grow(index, tokens)
            elif operation == "fork":
                model.fork(index)
            else:
                model.end(index)
        model.check()
    while model.sequences:
        model.end(0)
        model.check()


def test_a_fork_in_the_middle_of_pages_entered_together_is_found_and_not_entered_twice() -> None:
    model = PagesModel(32)
    for tokens in ([1, 1, 2, 2, 0], [1, 1, 3, 3, 4, 4, 0]):  # the second's own pages hang below the first's first
        model.start(tokens)
        model.insert(len(model.sequences) - 1)
    for _ in range(2):
        model.start([1, 1, 3, 3, 5, 5, 6, 6, 0])
    for index in (2, 3):
        model.insert(index)
        model.check()
    assert model.known == [2, 3, 4, 2]
    while model.sequences:
        model.end(0)
        model.check()
    assert len(model.tree) == 6


def test_the_last_prompt_token_is_never_part_of_a_match() -> None:
    model = PagesModel(16)
    model.start([1, 2, 3, 4])
    model.insert(0)
    assert len(model.tree.match(np.asarray([1, 2, 3, 4], np.int32))[0]) == 1
    assert len(model.tree.match(np.asarray([1, 2, 3, 4, 5], np.int32))[0]) == 2


def test_the_least_recently_used_prefix_goes_first() -> None:
    model = PagesModel(600)
    for first in range(300):
        model.start([first, first, 0])
        model.end(0)
    model.start([0, 0, 0])  # used again
    model.end(0)
    model.tree.evict(10)
    assert len(model.tree.match(np.asarray([0, 0, 0], np.int32))[0]) == 1
    assert len(model.tree.match(np.asarray([1, 1, 0], np.int32))[0]) == 0
    assert len(model.tree.match(np.asarray([299, 299, 0], np.int32))[0]) == 1


def test_more_pages_than_are_free_are_an_error_of_the_caller() -> None:
    with pytest.raises(AssertionError):
        Allocator(2).allocate(3)
