"""No change of an object is lost, whatever our own writes, the Lease and the watches do meanwhile."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from toka_operator import lease as lease_module
from toka_operator.cluster import Page
from toka_operator.errors import ApiError, GoneError, NotFoundError, TransientError, WriteFailsError
from toka_operator.lease import LEASE_SILENCE_S, Election
from toka_operator.settings import KIND, Settings
from toka_operator.store import Store
from toka_operator.watches import Watch, own_key
from toka_operator.workqueue import TIMED_APART_S, WorkQueue

from tests.unit.operator.fakes import FakeCluster, World

Json = dict[str, Any]


# ---- the object, and our own writes to it


def test_a_spec_that_changes_while_its_status_is_written_is_worked_on_next() -> None:
    """The user writes between the watch event of our pass and our status write, whose answer would hide that."""
    world = World()
    world.put(suspend=True)
    world.show()
    world.put(suspend=True, service={"port": 8080})
    with pytest.raises(TransientError):
        world.reconcile()
    assert world.status() == {}, "it would tell of a spec that is no more"
    world.reconcile()
    assert world.status()["observedGeneration"] == 2
    assert world.cluster.objects["Service", "apps", "chat"]["spec"]["ports"][0]["port"] == 8080


def test_a_newer_spec_that_our_own_answer_brings_asks_for_another_pass() -> None:
    world = World()
    world.put()
    world.show()
    world.reconcile()  # the children

    def user_writes(verb: str, body: Json) -> None:
        """Right after our patch of a child, the answer to our next read brings a newer spec."""
        world.cluster.after = lambda *_: None
        world.put(replicas=2)
        world.deployments.put(world.cluster.read(KIND, "apps", "chat"))

    world.show()
    world.cluster.objects["Service", "apps", "chat"]["spec"]["ports"] = []
    world.cluster.store(world.cluster.objects["Service", "apps", "chat"])
    world.show()
    world.cluster.after = user_writes
    assert world.reconcile() == 0.0


def test_a_list_of_one_namespace_leaves_the_others_alone() -> None:
    store = Store(own_key)

    def obj(namespace: str, name: str, version: int) -> Json:
        return {"metadata": {"namespace": namespace, "name": name, "uid": name, "resourceVersion": str(version)}}

    store.replace_all([obj("a", "x", 1), obj("a", "y", 2)], 3, "a")
    assert store.replace_all([obj("b", "z", 4)], 5, "b") == {("b", "z")}
    assert store.replace_all([obj("a", "x", 1)], 6, "a") == {("a", "y")}
    assert sorted(store.list_keys()) == [("a", "x"), ("b", "z")]
    assert store.list_keys("b") == [("b", "z")]
    assert store.replace_all([], 9) == {("a", "x"), ("b", "z")}


def test_what_is_listed_anew_is_missing_at_no_moment() -> None:
    """A pod that a pass does not see would be taken for one that never served."""
    store = Store(lambda obj: ("apps", "chat"))
    pods = [{"metadata": {"namespace": "apps", "name": f"p{n}", "resourceVersion": "1"}} for n in range(100)]
    store.replace_all(pods, 1)
    numbers, is_over = set(), threading.Event()

    def look() -> None:
        while not is_over.is_set():
            numbers.add(len(store.members(("apps", "chat"))))

    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(300):
        store.replace_all(pods, 1, is_anew=True)
    is_over.set()
    reader.join()
    assert numbers <= {100}


# ---- the Lease


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The Lease's clock, which stands still."""
    found = Clock()
    monkeypatch.setattr(lease_module.time, "monotonic", found.monotonic)
    return found


class LeaseServer(FakeCluster):
    """Holds one Lease; each request takes `delay_s` on the clock and fails if `is_broken`."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock, self.delay_s, self.is_broken = clock, 0.0, False

    def read(self, kind: str, namespace: str, name: str) -> Json:
        self._pass_time()
        return super().read(kind, namespace, name)

    def replace(self, manifest: Json) -> Json:
        self._pass_time()
        return self.store(manifest)

    def _pass_time(self) -> None:
        self._clock.now += self.delay_s
        if self.is_broken:
            raise TransientError("no answer")


def make_election(server: LeaseServer, terms: list[float], identity: str = "a") -> Election:
    settings = Settings(engine_image="e", identity=identity)
    election = Election(settings, lambda: terms.append(server._clock.now))
    election.connect(server)  # type: ignore[arg-type]
    return election


def try_once(election: Election) -> None:
    """One turn of the thread's loop."""
    turns = iter((False, True))
    election._stop_event.is_set = lambda: next(turns)  # type: ignore[method-assign]
    election._stop_event.wait = lambda timeout=None: True  # type: ignore[method-assign]
    election._release = lambda: None  # type: ignore[method-assign]
    election.run()


def test_a_lease_that_lapsed_while_nobody_looked_begins_a_new_term(clock: Clock) -> None:
    """A renewal hangs for 7 s and fails, the next succeeds: for a second nothing was held, and keys were dropped."""
    server, terms = LeaseServer(clock), []  # type: tuple[LeaseServer, list[float]]
    election = make_election(server, terms)
    try_once(election)
    assert len(terms) == 1
    clock.now += 2
    server.delay_s, server.is_broken = 7.0, True
    try_once(election)
    clock.now += 2
    assert not election.is_held()
    server.delay_s, server.is_broken = 0.0, False
    try_once(election)
    assert election.is_held()
    assert len(terms) == 2, "whatever was dropped meanwhile is worked on"
    clock.now += 2
    try_once(election)
    assert len(terms) == 2, "a renewal in time begins no term"


def test_a_write_ends_before_another_replica_may_lead(clock: Clock) -> None:
    server, terms = LeaseServer(clock), []  # type: tuple[LeaseServer, list[float]]
    election = make_election(server, terms)
    assert election.write_window_s() == 0.0
    try_once(election)
    taken_by_another = clock.now + 10.0
    for passed_s in (0.0, 3.0, 3.9):
        clock.now += passed_s
        assert clock.now + election.write_window_s() <= taken_by_another
        assert election.write_window_s() >= 3.0
    clock.now += 0.2
    assert election.write_window_s() == 0.0


def test_a_replica_is_not_ready_while_it_sees_no_living_leader(clock: Clock) -> None:
    """A Lease that somebody left behind makes it no more ready: nothing would be done for a while."""
    server = LeaseServer(clock)
    leader, follower = make_election(server, [], "a"), make_election(server, [], "b")
    try_once(leader)
    assert leader.describe_silence() == ""
    try_once(follower)
    assert "no living holder" in follower.describe_silence()
    clock.now += 2
    try_once(leader)
    try_once(follower)
    assert follower.describe_silence() == ""
    server.is_broken = True
    clock.now += LEASE_SILENCE_S + 1
    try_once(follower)
    assert "not seen renewed for 61 s" in follower.describe_silence()
    assert "not seen renewed" in leader.describe_silence()


# ---- the watches


class Stream:
    """The API server's answers to each list and each watch, in turn: objects and events, or an error."""

    def __init__(self, lists: list[Any], watches: list[Any]) -> None:
        self.lists, self.watches = lists, watches
        self.asked: list[str] = []
        self.is_over = threading.Event()

    def list_all(self, kind: str, namespace: str | None, selector: str = "", field_selector: str = "") -> Page:
        self.asked.append("list")
        found = self.lists.pop(0) if self.lists else []
        if isinstance(found, Exception):
            raise found
        return Page(found, "5")

    def watch(self, kind: str, namespace: str | None, resource_version: str, *selectors: str) -> Iterator[Json]:
        self.asked.append(f"watch {resource_version}")
        if not self.watches:
            self.is_over.set()
            threading.Event().wait(3600)
        for event in self.watches.pop(0):
            if isinstance(event, Exception):
                raise event
            yield event


def deployment(name: str, version: int) -> Json:
    return {"metadata": {"namespace": "n", "name": name, "uid": name, "resourceVersion": str(version)}}


def added(name: str, version: int) -> Json:
    return {"type": "ADDED", "object": deployment(name, version)}


@pytest.mark.parametrize(
    "error",
    [
        GoneError(410, "Expired", "too old"),
        NotFoundError(404, "NotFound", "the CRD is gone"),
        ApiError(403, "Forbidden", "no Role"),
        ApiError(400, "BadRequest", "odd"),
        TransientError("401 Unauthorized"),
        TransientError("429 TooManyRequests"),
        TransientError("500 InternalError"),
        TransientError("the connection broke"),
    ],
)
@pytest.mark.parametrize("where", ["list", "watch"])
def test_a_watch_outlives_every_error(error: Exception, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toka_operator.watch_stream.BACKOFF_FIRST_S", 0.001)
    broken: list[Any] = [error] if where == "list" else []
    stream = Stream([*broken, [deployment("a", 1)], [deployment("a", 1)]], [[added("b", 6), error], [added("c", 7)]])
    store, seen = Store(own_key), set()
    watch = Watch(stream, KIND, None, store, lambda key, _: seen.add(key), lambda: None)  # type: ignore[arg-type]
    watch.start()
    assert stream.is_over.wait(timeout=60)
    watch.stop()
    assert {("n", "b"), ("n", "c")} <= seen
    assert watch.trouble == ""
    assert watch.is_alive()


def test_streams_that_end_at_once_make_no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    stream = Stream([], [[] for _ in range(8)])
    watch = Watch(stream, KIND, None, Store(own_key), lambda *_: None, lambda: None)  # type: ignore[arg-type]
    monkeypatch.setattr(watch._stop_event, "wait", lambda delay_s: waits.append(delay_s))
    watch.start()
    assert stream.is_over.wait(timeout=60)
    watch.stop()
    assert waits[0] == 0.0, "a stream may end"
    assert all(delay_s > 0.2 for delay_s in waits[1:])


def test_an_error_that_comes_again_with_a_version_ends_with_a_list() -> None:
    stream = Stream([], [[TransientError("504 too large a version")] for _ in range(3)])
    watch = Watch(stream, KIND, None, Store(own_key), lambda *_: None, lambda: None)  # type: ignore[arg-type]
    watch._stop_event.wait = lambda timeout=None: False  # type: ignore[method-assign]
    watch.start()
    assert stream.is_over.wait(timeout=60)
    watch.stop()
    assert stream.asked == ["list", "watch 5", "watch 5", "watch 5", "list", "watch 5"]


def test_what_was_dropped_while_a_watch_was_refused_is_asked_for_whatever_error_came_last() -> None:
    """An API server that starts refuses everybody, is gone for a moment, and answers: keys were dropped meanwhile."""
    refusal, broken, gone = ApiError(403, "Forbidden", "no Role"), TransientError("refused"), GoneError(410, "", "")
    stream = Stream([[deployment("a", 1)], broken, gone, [deployment("a", 1)]], [[refusal]])
    synced: list[str] = []
    watch = Watch(stream, KIND, None, Store(own_key), lambda *_: None, lambda: synced.append("all"))  # type: ignore[arg-type]
    watch._stop_event.wait = lambda timeout=None: False  # type: ignore[method-assign]
    refused: list[bool] = []
    original = stream.list_all

    def list_all(*arguments: Any) -> Page:
        refused.append(watch.is_refused)
        return original(*arguments)

    stream.list_all = list_all  # type: ignore[method-assign]
    watch.start()
    assert stream.is_over.wait(timeout=60)
    watch.stop()
    assert refused == [False, True, True, True], "until it is allowed, not until another error"
    assert synced == ["all", "all"]
    assert not watch.is_refused


# ---- the queue


def test_time_alone_calls_for_no_more_than_one_pass_a_second() -> None:
    queue: WorkQueue[str] = WorkQueue(max_bulk_workers=4)
    queue.add_after("a", 0.0)
    passes = []
    for _ in range(3):
        assert queue.get() == "a"
        passes.append(time.monotonic())
        queue.done("a")
        queue.add_timed("a", 0.01)
    gaps = [b - a for a, b in itertools.pairwise(passes)]
    assert min(gaps) > TIMED_APART_S * 0.9
    queue.add("a")
    assert queue.get() == "a", "a change does not wait"


def test_a_far_moment_does_not_hold_up_a_near_one() -> None:
    queue: WorkQueue[str] = WorkQueue(max_bulk_workers=4)
    queue.add_timed("a", 3600.0)
    queue.add_timed("a", 0.0)
    assert queue.get() == "a"


# ---- the children


def settled_world() -> World:
    """A TokaDeployment whose children are made and known."""
    world = World()
    world.put(replicas=2)
    world.show()
    world.reconcile()
    world.show()
    return world


def test_an_edit_that_races_with_our_correction_is_put_back_too() -> None:
    """Somebody edits a label; while that is put back, somebody sets the replicas."""
    world = settled_world()
    (name,) = [n for kind, _, n in world.cluster.objects if kind == "StatefulSet"]
    address = ("StatefulSet", "apps", name)

    def edit(change: Json) -> None:
        found = world.cluster.read(*address)
        world.cluster.store({**found, "spec": {**found["spec"], **change}})

    found = world.cluster.read(*address)
    found["metadata"]["labels"]["app.kubernetes.io/part-of"] = "other"
    world.cluster.store(found)
    world.show()
    original = world.cluster.merge

    def merge(kind: str, live: Json, patch: Json) -> Json:
        """Our patch is made after the other edit, and its answer shows both."""
        if world.cluster.merge is merge:
            world.cluster.merge = original  # type: ignore[method-assign]
            edit({"replicas": 7})
            return original(kind, world.cluster.read(*address), patch)
        return original(kind, live, patch)

    world.cluster.merge = merge  # type: ignore[method-assign]
    world.reconcile()
    assert world.cluster.read(*address)["spec"]["replicas"] == 2
    assert world.cluster.read(*address)["metadata"]["labels"]["app.kubernetes.io/part-of"] == "toka"


def test_what_a_webhook_insists_on_is_corrected_once() -> None:
    world = settled_world()
    original = world.cluster.merge

    def merge(kind: str, live: Json, patch: Json) -> Json:
        return original(kind, live, {**patch, "spec": {"type": "NodePort"}})

    world.cluster.merge = merge  # type: ignore[method-assign]
    world.cluster.store({**world.cluster.read("Service", "apps", "chat"), "spec": {"type": "NodePort"}})
    world.show()
    world.reconcile()
    num_writes = len(world.cluster.writes)
    world.reconcile()
    assert len(world.cluster.writes) == num_writes


def test_a_refused_child_backs_off_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("toka_operator.refusals.time.monotonic", lambda: now)
    world = World()
    world.put()
    world.show()
    world.cluster.refuse = lambda verb, body: (
        ApiError(403, "Forbidden", "exceeded quota") if body["kind"] == "StatefulSet" else None
    )
    tried = []
    for _ in range(8):
        before = world.cluster.writes.count(("refused create", "StatefulSet"))
        delay_s = world.reconcile()
        world.show()
        world.reconcile()  # whatever else calls for a pass
        world.show()
        tried.append(world.cluster.writes.count(("refused create", "StatefulSet")) - before)
        assert world.condition("Degraded")["reason"] == "QuotaExceeded"
        assert "exceeded quota" in world.condition("Degraded")["message"]
        assert delay_s is not None
        now += delay_s
    assert tried == [1] * 8
    assert delay_s == 120.0
    world.put(engine={"pageSize": 32})
    world.cluster.refuse = lambda verb, body: None
    world.show()
    world.reconcile()
    assert [kind for kind, *_ in world.cluster.objects].count("StatefulSet") == 1, "another wish does not wait"


def test_a_deletion_that_is_refused_is_told_and_holds_up_no_status() -> None:
    world = settled_world()
    world.cluster.refuse = lambda verb, body: ApiError(403, "Forbidden", "no delete") if verb == "delete" else None
    world.put(replicas=1)
    world.show()
    world.reconcile()
    assert world.status()["observedGeneration"] == 2
    degraded = world.condition("Degraded")
    assert degraded["reason"] == "ChildRejected"
    assert degraded["message"].startswith("deletion of PodDisruptionBudget chat: no delete.")


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("WebhookFailed", 'Internal error occurred: failed calling webhook "policy.example.com": EOF'),
        ("ChildFailed", "Internal error occurred: failed to allocate a serviceIP: range is full"),
        ("ChildFailed", "Internal error occurred: failed to allocate a nodePort: range is full"),
    ],
)
def test_what_the_api_server_cannot_do_is_told_and_blames_no_spec(
    reason: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("toka_operator.refusals.time.monotonic", lambda: now)
    world = World()
    world.put()
    world.show()
    world.cluster.refuse = lambda verb, body: WriteFailsError(words) if body["kind"] == "StatefulSet" else None
    for _ in range(7):
        delay_s = world.reconcile()
        world.show()
        degraded = world.condition("Degraded")
        assert degraded["reason"] == reason
        assert degraded["message"].startswith(f"StatefulSet chat-{world.status()['currentRevision']}: {words}. ")
        assert world.condition("ConfigValid")["status"] == "True"
        assert delay_s is not None
        now += delay_s
    assert delay_s == 20.0
    world.cluster.refuse = lambda verb, body: None
    world.reconcile()
    assert [kind for kind, *_ in world.cluster.objects].count("StatefulSet") == 1


# ---- etcd restored from a backup


def test_leader_and_follower_notice_that_the_lease_went_back(clock: Clock) -> None:
    """Nothing else tells of it: a watch from a version that is yet to come is answered, and says nothing."""
    server, noticed = LeaseServer(clock), []  # type: tuple[LeaseServer, list[str]]
    leader, follower = make_election(server, [], "leader"), make_election(server, [], "follower")
    leader._on_restored = lambda: noticed.append("leader")
    follower._on_restored = lambda: noticed.append("follower")

    def renew() -> None:
        clock.now += 2
        try_once(leader)
        try_once(follower)

    server._versions = itertools.count(100)
    renew()
    renew()
    assert noticed == []
    server._versions = itertools.count(50)
    renew()
    assert noticed == ["leader", "follower"]
    renew()
    assert noticed == ["leader", "follower"], "once"


def test_after_a_restore_everything_is_seen_as_it_is_now_though_its_versions_are_older(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    later = [deployment("changed", 800), deployment("gone", 900)]
    restored = [deployment("changed", 3), deployment("back", 4)]
    stream = Stream([later, restored], [[{"type": "DELETED", "object": deployment("back", 950)}]])
    store, seen = Store(own_key), []  # type: tuple[Store, list[str]]
    watch = Watch(stream, KIND, None, store, lambda key, _: seen.append(key[1]), lambda: None)  # type: ignore[arg-type]
    original = stream.watch

    def restore_during_the_stream(*arguments: Any) -> Iterator[Json]:
        seen.clear()
        watch.begin_anew()
        monkeypatch.setattr(stream, "watch", original)
        return original(*arguments)

    monkeypatch.setattr(stream, "watch", restore_during_the_stream)
    watch.start()
    assert stream.is_over.wait(timeout=60)
    watch.stop()
    assert stream.asked == ["list", "watch 5", "list", "watch 5"]
    assert sorted(seen) == ["back", "changed", "gone"]
    assert store.get(("n", "gone")) is None
    found = {name: store.get(("n", name)) for name in ("changed", "back")}
    assert {name: obj["metadata"]["resourceVersion"] for name, obj in found.items() if obj} == {
        "changed": "3",
        "back": "4",
    }


def test_a_list_that_fails_after_a_restore_is_made_again() -> None:
    stream = Stream([[deployment("a", 800)], TransientError("503"), [deployment("a", 3)]], [[]])
    store = Store(own_key)
    watch = Watch(stream, KIND, None, store, lambda *_: None, lambda: None)  # type: ignore[arg-type]
    watch._stop_event.wait = lambda timeout=None: False  # type: ignore[method-assign]
    original = stream.list_all

    def list_all(*arguments: Any) -> Page:
        page = original(*arguments)
        if len(stream.asked) == 1:
            watch.begin_anew()
        return page

    stream.list_all = list_all  # type: ignore[method-assign]
    watch.start()
    assert stream.is_over.wait(timeout=60)
    watch.stop()
    found = store.get(("n", "a"))
    assert found is not None
    assert found["metadata"]["resourceVersion"] == "3"


def test_errors_between_two_looks_at_the_lease_do_not_put_off_its_end(clock: Clock) -> None:
    """The API server answers every other time: the Lease of a dead leader lapses when it would have lapsed."""
    server = LeaseServer(clock)
    leader, follower = make_election(server, [], "leader"), make_election(server, [], "follower")
    try_once(leader)
    try_once(follower)
    for turn in range(6):
        clock.now += 2
        server.is_broken = turn % 2 == 0
        try_once(follower)
    assert follower.is_held(), "12 s without a renewal"
