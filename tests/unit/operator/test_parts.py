"""The small parts: the store, the queue, the encoding, the settings."""

from __future__ import annotations

import itertools
import json
import threading
from typing import Any

import kopf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toka_operator.cluster import encode_canonically
from toka_operator.errors import SettingsError
from toka_operator.handlers import EndlessBackoffs, configure
from toka_operator.settings import read_settings
from toka_operator.store import Store
from toka_operator.workqueue import WorkQueue


def obj(version: int, name: str = "x", key: str | None = "k", uid: str = "u") -> dict[str, Any]:
    return {"metadata": {"namespace": "n", "name": name, "uid": uid, "resourceVersion": str(version), "key": key}}


def store() -> Store:
    return Store(lambda o: ("n", o["metadata"]["key"]) if o["metadata"]["key"] else None)


def test_an_older_version_never_hides_a_newer_one() -> None:
    kept = store()
    assert kept.put(obj(2)) == {("n", "k")}
    assert kept.put(obj(1)) == set()
    assert kept.put(obj(2)) == set()
    assert kept.members(("n", "k")) == [obj(2)]


def test_an_answer_that_comes_after_the_deletion_brings_nothing_back() -> None:
    kept = store()
    kept.put(obj(1))
    assert kept.remove(obj(3)) == {("n", "k")}
    assert kept.put(obj(2)) == set()
    assert kept.members(("n", "k")) == []
    assert kept.put(obj(4, uid="v")) == {("n", "k")}


def test_the_end_of_an_older_object_does_not_hide_its_successor() -> None:
    kept = store()
    kept.put(obj(5, uid="new"))
    assert kept.remove(obj(3, uid="old")) == set()
    assert kept.members(("n", "k")) == [obj(5, uid="new")]


def test_an_object_that_changes_its_parent_concerns_both() -> None:
    kept = store()
    kept.put(obj(1, key="a"))
    assert kept.put(obj(2, key="b")) == {("n", "a"), ("n", "b")}
    assert kept.members(("n", "a")) == []


def test_a_list_takes_away_what_it_does_not_hold_unless_that_is_newer() -> None:
    kept = store()
    kept.put(obj(1, "old"))
    kept.put(obj(9, "new", key="other"))
    assert kept.replace_all([obj(2, "listed", key="third")], 5) == {("n", "k"), ("n", "third")}
    assert kept.get(("n", "new")) is not None


def test_kopf_is_told_to_try_for_ever_and_not_to_wait_long() -> None:
    configured = kopf.OperatorSettings()
    configure(configured)
    for _ in range(2):
        backoffs = configured.networking.error_backoffs
        assert isinstance(backoffs, EndlessBackoffs)
        first = list(itertools.islice(backoffs, 1000))
        assert len(first) == 1000
        assert max(first) <= 5.0


def test_a_key_waits_once_however_often_it_is_added() -> None:
    queue: WorkQueue[str] = WorkQueue(max_bulk_workers=4)
    for key in ("a", "b", "a", "a"):
        queue.add(key)
    assert [queue.get(), queue.get()] == ["a", "b"]
    assert queue.measure()[0] == 2


def test_keys_that_came_in_bulk_take_turns_with_the_others() -> None:
    queue: WorkQueue[str] = WorkQueue(max_bulk_workers=4)
    for n in range(3):
        queue.add(f"bulk-{n}", is_bulk=True)
    for n in range(4):
        queue.add(f"single-{n}")
    taken = [queue.get() for _ in range(queue.measure()[0])]
    assert taken == ["single-0", "bulk-0", "single-1", "bulk-1", "single-2", "bulk-2", "single-3"]


def test_keys_that_came_in_bulk_leave_workers_to_the_others() -> None:
    queue: WorkQueue[str] = WorkQueue(max_bulk_workers=2)
    for key in ("a", "b", "c"):
        queue.add(key, is_bulk=True)
    assert [queue.get(), queue.get()] == ["a", "b"]
    taken: list[str | None] = []
    has_one = threading.Event()

    def work() -> None:
        taken.append(queue.get())
        has_one.set()
        taken.append(queue.get())

    worker = threading.Thread(target=work)
    worker.start()
    queue.add("single")
    assert has_one.wait(timeout=60)
    assert taken == ["single"]
    queue.done("a")
    worker.join(timeout=60)
    assert taken == ["single", "c"]


def test_a_key_of_many_that_is_asked_for_alone_is_prompt() -> None:
    queue: WorkQueue[str] = WorkQueue(max_bulk_workers=4)
    for key in ("a", "b"):
        queue.add(key, is_bulk=True)
    queue.add("b")
    queue.add("b", is_bulk=True)
    assert [queue.get(), queue.get()] == ["b", "a"]
    assert queue.measure()[0] == 2


def test_a_key_added_during_its_work_is_worked_on_once_more() -> None:
    queue: WorkQueue[str] = WorkQueue(max_bulk_workers=4)
    queue.add("a")
    assert queue.get() == "a"
    queue.add("a")
    queue.add("a")
    queue.add("b")
    assert queue.get() == "b", "one key is never worked on twice at a time"
    queue.done("a")
    assert queue.get() == "a"
    queue.done("a")
    queue.done("b")
    assert queue.measure()[0] == 0


def test_a_failed_key_comes_back_later_each_time() -> None:
    queue: WorkQueue[str] = WorkQueue(max_bulk_workers=4)
    delays = []
    for _ in range(4):
        queue.add("a")
        assert queue.get() == "a"
        delays.append(queue.retry("a"))
    assert delays == sorted(delays)
    assert queue.retry("a", 100.0) == 100.0


def test_a_delayed_key_comes_at_the_earliest_time_asked_for() -> None:
    queue: WorkQueue[str] = WorkQueue(max_bulk_workers=4)
    queue.add_after("a", 3600)
    queue.add_after("a", 0.0)
    assert queue.get() == "a"


def test_closing_the_queue_wakes_every_worker() -> None:
    queue: WorkQueue[str] = WorkQueue(max_bulk_workers=4)
    seen: list[str | None] = []
    threads = [threading.Thread(target=lambda: seen.append(queue.get())) for _ in range(3)]
    for thread in threads:
        thread.start()
    queue.close()
    for thread in threads:
        thread.join(timeout=60)
    assert seen == [None, None, None]


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.integers() | st.booleans(), max_size=5))
def test_the_canonical_encoding_is_json_of_the_same_value(value: dict[str, Any]) -> None:
    encoded = encode_canonically(value)
    assert json.loads(encoded) == value
    assert not set(b"<>&") & set(encoded)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKA_WORKERS", "0"),
        ("TOKA_WORKERS", "many"),
        ("TOKA_ABSENT_KIND_RETRY_SECONDS", "0"),
        ("TOKA_LOG_LEVEL", "LOUD"),
        ("TOKA_ENGINE_IMAGE", ""),
        ("TOKA_LEASE_RENEW_DEADLINE_SECONDS", "10"),
        ("TOKA_LEASE_DURATION_SECONDS", "7"),
        ("TOKA_LEASE_RETRY_SECONDS", "10"),
    ],
)
def test_a_bad_setting_is_named(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name):
        read_settings({"TOKA_ENGINE_IMAGE": "e", name: value})
