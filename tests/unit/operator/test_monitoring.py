"""A kind that the cluster need not have: while it is away, or may not be seen, everything else goes on."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from toka_operator.cluster import Page
from toka_operator.errors import ApiError, NotFoundError, TransientError
from toka_operator.monitoring import explain_monitored, wants_pod_monitor
from toka_operator.sight import KNOWN, NOT_ALLOWED, UNKNOWN
from toka_operator.watches import OptionalWatch, make_stores

Json = dict[str, Any]
AWAY = NotFoundError(404, "NotFound", "the server could not find the requested resource")
FORBIDDEN = ApiError(403, "Forbidden", "no Role")
BROKEN = TransientError("the connection broke")
RETRY_S = 8.0


class Server:
    """An API server whose answers to lists are given; each stream ends at once, and the last answer is the end."""

    def __init__(self, answers: list[Exception | list[Json]]) -> None:
        self._answers, self._versions = answers, itertools.count(10)
        self.is_over = threading.Event()

    def list_all(self, *_: Any) -> Page:
        if not self._answers:
            self.is_over.set()
            threading.Event().wait(3600)
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return Page(answer, str(next(self._versions)))

    def watch(self, *_: Any) -> Iterator[Json]:
        raise AWAY  # the kind goes as soon as it was listed
        yield


def monitor(version: int) -> Json:
    labels = {"app.kubernetes.io/instance": "chat"}
    return {
        "metadata": {"namespace": "n", "name": "chat", "uid": "u", "resourceVersion": str(version), "labels": labels}
    }


def follow(*answers: Exception | list[Json]) -> tuple[OptionalWatch, list[tuple[bool, bool, int]]]:
    """Runs a watch through these answers. Returns it, and what it was when it called for passes of everything: whether
    the kind was seen, whether it was refused, and how many objects were known."""
    server, told = Server(list(answers)), []
    store = make_stores()["PodMonitor"]

    def note() -> None:
        assert watch.is_answered
        told.append((watch.is_synced.is_set(), watch.is_refused, len(store.list_keys())))

    watch = OptionalWatch(server, "PodMonitor", None, store, lambda *_: None, note, RETRY_S)  # type: ignore[arg-type]
    watch._stop_event.wait = lambda timeout=None: False  # type: ignore[method-assign]
    assert not watch.is_answered
    watch.start()
    assert server.is_over.wait(timeout=60)
    watch.stop()
    return watch, told


def test_a_kind_that_is_away_is_told_once_and_is_no_trouble() -> None:
    watch, told = follow(BROKEN, AWAY, AWAY, AWAY)
    assert told == [(False, False, 0)]
    assert watch.trouble == ""


def test_a_kind_that_is_away_is_looked_for_again_after_the_time_that_is_set() -> None:
    watch, _ = follow(AWAY)
    waits_s = [watch._fail(AWAY) for _ in range(20)]
    assert 0.75 * RETRY_S <= min(waits_s) < max(waits_s) <= RETRY_S


def test_a_kind_that_comes_and_goes_is_told_each_time_and_leaves_nothing_behind() -> None:
    _, told = follow(AWAY, [monitor(1)], [monitor(2)])
    assert told == [(False, False, 0), (True, False, 1), (False, False, 0), (True, False, 1), (False, False, 0)]


def test_a_kind_that_may_not_be_seen_is_told_and_named() -> None:
    watch, told = follow(FORBIDDEN, FORBIDDEN)
    assert told == [(False, True, 0)]
    assert "no Role" in watch.trouble


@pytest.mark.parametrize("choice", ["Auto", "On", "Off"])
@pytest.mark.parametrize("sight", [KNOWN, UNKNOWN, NOT_ALLOWED])
def test_a_monitor_is_made_where_it_can_be_seen_and_is_not_switched_off(choice: str, sight: str) -> None:
    assert wants_pod_monitor(choice, sight) is (choice != "Off" and sight == KNOWN)
    is_monitored, reason, message = explain_monitored(sight)
    assert is_monitored is (sight == KNOWN)
    assert reason in ("PodMonitorMade", "NoPodMonitors", "PodMonitorsNotAllowed")
    assert message.endswith(".") is not is_monitored, "advice is a sentence of its own"
