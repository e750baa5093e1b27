"""Allocator and prefix tree against a model made of dictionaries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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
        assert matched == expected
        assert (missing is None) == (len(matched) == most)
        num_new = -(-len(tokens) // PAGE) - len(matched)
        pages = np.asarray(matched, np.int32)
        self.allocator.retain(pages)
        if num_new > self.allocator.num_available:
            self.allocator.release(pages)
            return
        self.tree.touch(pages, self.tick)
        new = self.take(num_new)
        for index, page in enumerate(new.tolist()):
            content = tokens[(len(matched) + index) * PAGE :][:PAGE]
            self.tokens[page] = content + [0] * (PAGE - len(content))
        self.sequences.append((tokens, [*matched, *new.tolist()]))

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
        num_in = self.tree.insert_path(np.asarray(pages[:full], np.int32), 0, self.tick)
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
        self.tree.insert_released(np.asarray(pages[:full], np.int32), 0, self.tick)
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
        used = sum(count > 0 for count in refs)
        assert allocator.num_used == used
        assert allocator.num_free == allocator.num_pages - used - len(only)


operations = st.lists(
    st.tuples(
        st.sampled_from(["start", "start", "insert", "end"]),
        st.integers(0, 7),
        st.lists(st.integers(0, 1), min_size=1, max_size=9),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(operations, st.integers(5, 24))
def test_pages_are_held_found_and_evicted_as_in_the_model(
    steps: list[tuple[str, int, list[int]]], num_pages: int
) -> None:
    model = PagesModel(num_pages)
    for operation, index, tokens in steps:
        if operation == "start":
            model.start(tokens)
        elif model.sequences:
            index %= len(model.sequences)
            if operation == "insert":
                model.insert(index)
            else:
                model.end(index)
        model.check()
    while model.sequences:
        model.end(0)
        model.check()


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
    assert not model.tree.match(np.asarray([1, 1, 0], np.int32))[0]
    assert len(model.tree.match(np.asarray([299, 299, 0], np.int32))[0]) == 1


def test_more_pages_than_are_free_are_an_error_of_the_caller() -> None:
    with pytest.raises(AssertionError):
        Allocator(2).allocate(3)
