"""The cache of models: its claim, the download that engines tell of, and a claim that only one node can mount."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from toka_operator.asking import Engine
from toka_operator.conditions import Outcome
from toka_operator.downloads import explain_claim_conflicts, parse_download
from toka_operator.loading import LoadingEngines, ask
from toka_operator.observed import Download, Observed, PodView
from toka_operator.podspec import render_pod_template
from toka_operator.reconcile import Reconciler
from toka_operator.settings import Settings
from toka_operator.spec import TokaDeploymentSpec, parse
from toka_operator.status import build_status
from toka_operator.store import Key

from tests.unit.operator.examples import IMAGE, NOW, OWNER, body, child, plan_for, pod, seen, valid
from tests.unit.operator.fakes import World

Json = dict[str, Any]
SHARED = {"type": "SharedPVC", "size": "100Gi"}
HUB = {"source": "hf://org/name"}
CLAIM = "PersistentVolumeClaim"


def shared(**cache: Any) -> TokaDeploymentSpec:
    return valid(model=HUB, replicas=2, cache={**SHARED, **cache})


def status_of(spec: TokaDeploymentSpec, observed: Observed, now: float = NOW) -> Json:
    return build_status(OWNER, spec, observed, plan_for(spec, observed), Outcome(), {}, now)


def condition(status: Json, kind: str) -> Json:
    return next(c for c in status["conditions"] if c["type"] == kind)


def test_a_shared_cache_is_a_claim_that_every_pod_mounts() -> None:
    plan = plan_for(shared(storageClassName="fast"))
    claim = child(plan, CLAIM)
    assert claim["metadata"]["name"] == "chat-cache"
    assert claim["spec"] == {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": "100Gi"}},
        "storageClassName": "fast",
    }
    volumes = child(plan, "StatefulSet")["spec"]["template"]["spec"]["volumes"]
    assert {"name": "cache", "persistentVolumeClaim": {"claimName": "chat-cache"}} in volumes
    order = [c["kind"] for c in plan.desired]
    assert order.index(CLAIM) < order.index("StatefulSet")


def test_a_retained_claim_has_no_owner_and_one_that_is_not_goes_with_it() -> None:
    assert child(plan_for(shared()), CLAIM)["metadata"]["ownerReferences"] == []
    assert child(plan_for(shared(retention="Delete")), CLAIM)["metadata"]["ownerReferences"][0]["uid"] == OWNER.uid


@pytest.mark.parametrize("change", [{"size": "200Gi"}, {"retention": "Delete"}, {"size": "102400Mi"}])
def test_what_only_alters_the_claim_makes_no_revision(change: Json) -> None:
    assert shared(**change).revision == shared().revision


def test_with_a_volume_of_one_node_all_pods_run_there_and_the_access_mode_makes_a_revision() -> None:
    spec = shared(accessMode="ReadWriteOnce")
    assert spec.revision != shared().revision
    affinity = child(plan_for(spec), "StatefulSet")["spec"]["template"]["spec"]["affinity"]["podAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "kubernetes.io/hostname"
    labels = term["labelSelector"]["matchLabels"]
    pods = child(plan_for(spec), "StatefulSet")["spec"]["template"]["metadata"]["labels"]
    assert labels.items() <= pods.items()
    assert "toka.dev/revision" not in labels


WRONG = {
    "spec.cache.size": {"type": "SharedPVC"},
    "spec.cache.claimName": {**SHARED, "claimName": "x"},
    "spec.cache.storageClassName": {"type": "Ephemeral", "storageClassName": "fast"},
    "spec.cache.accessMode": {**SHARED, "accessMode": "ReadOnlyMany"},
    "spec.cache.retention": {"type": "ExistingPVC", "claimName": "x", "retention": "Delete"},
}


@pytest.mark.parametrize("path", WRONG)
def test_a_field_of_the_cache_without_meaning_is_named(path: str) -> None:
    errors = parse(body(cache=WRONG[path]))
    assert isinstance(errors, list)
    assert path in [error.path for error in errors]


def test_a_retained_claim_is_found_again_by_the_next_object_of_that_name() -> None:
    world = World()
    world.put(model=HUB, cache=SHARED)
    world.show()
    world.reconcile()
    claim = world.cluster.objects[CLAIM, "apps", "chat-cache"]
    uid = claim["metadata"]["uid"]
    for address in [a for a in world.cluster.objects if a[0] != CLAIM]:
        del world.cluster.objects[address]
    after = World()
    after.cluster.objects = world.cluster.objects
    after.put(model=HUB, cache={**SHARED, "size": "200Gi"})
    after.show()
    after.reconcile()
    found = after.cluster.objects[CLAIM, "apps", "chat-cache"]
    assert found["metadata"]["uid"] == uid
    assert not found["metadata"].get("ownerReferences")
    assert found["spec"]["resources"]["requests"]["storage"] == "200Gi"
    assert ("StatefulSet", "apps") in {address[:2] for address in after.cluster.objects}


def test_no_pods_are_made_that_would_write_to_a_claim_of_somebody_else() -> None:
    world = World()
    world.put(model=HUB, cache=SHARED)
    world.cluster.store({"kind": CLAIM, "metadata": {"namespace": "apps", "name": "chat-cache"}, "spec": {"theirs": 1}})
    world.show()
    world.reconcile()
    assert world.condition("Degraded")["reason"] == "NameTaken"
    assert not [address for address in world.cluster.objects if address[0] == "StatefulSet"]
    assert world.cluster.objects[CLAIM, "apps", "chat-cache"]["spec"] == {"theirs": 1}


def test_the_download_is_seen_as_bytes_of_bytes_and_a_rate() -> None:
    spec = shared()
    loading = pod(spec.revision, 0)
    said = {loading.name: Download(3_100_000_000, 14_200_000_000, 210_400_000)}
    observed = replace(seen(plan_for(spec), (loading,)), downloads=said)
    status = status_of(spec, observed)
    assert status["cache"] == {
        "claim": "chat-cache",
        "progress": "3.10 of 14.20 GB, 210 MB/s",
        "pod": loading.name,
        "bytes": 3_100_000_000,
        "totalBytes": 14_200_000_000,
        "bytesPerSecond": 210_400_000,
    }
    cached = condition(status, "ModelCached")
    assert (cached["status"], cached["reason"]) == ("False", "Downloading")
    assert "3.10 of 14.20 GB, 210 MB/s" in cached["message"]


@pytest.mark.parametrize(("cache", "is_cached"), [(SHARED, "True"), ({"type": "Ephemeral"}, "False")])
def test_a_shared_cache_has_the_model_once_one_pod_has_it(cache: Json, is_cached: str) -> None:
    spec = valid(model=HUB, replicas=2, cache=cache)
    pods = (pod(spec.revision, 0, is_available=True), pod(spec.revision, 1))
    status = status_of(spec, seen(plan_for(spec), pods))
    assert condition(status, "ModelCached")["status"] == is_cached
    assert status.get("cache", {}).get("progress") == ("done" if is_cached == "True" else None)


def test_a_model_that_is_not_downloaded_has_no_such_condition() -> None:
    spec = valid()
    kinds = {c["type"] for c in status_of(spec, seen(plan_for(spec)))["conditions"]}
    assert "ModelCached" not in kinds


def on_node(view: PodView, node: str, is_creating: bool) -> PodView:
    return replace(view, node=node, is_creating=is_creating, scheduled_at=NOW - 11.0)


@pytest.mark.parametrize(("mode", "is_said"), [("ReadWriteOnce", True), ("ReadWriteMany", False)])
def test_a_claim_that_one_node_can_mount_is_said_at_once(mode: str, is_said: bool) -> None:
    spec = shared(accessMode=mode)
    serving = on_node(pod(spec.revision, 0, is_available=True), "node-1", is_creating=False)
    waiting = on_node(pod(spec.revision, 1), "node-2", is_creating=True)
    observed = explain_claim_conflicts("chat", spec, seen(plan_for(spec), (serving, waiting)))
    degraded = condition(status_of(spec, observed), "Degraded")
    assert (degraded["reason"] == "ClaimOnOneNode") is is_said
    for words in ("chat-cache", "node-1", "node-2", "ReadWriteOnce"):
        assert (words in degraded["message"]) is is_said


def test_pods_on_the_node_that_has_the_claim_are_well() -> None:
    spec = shared(accessMode="ReadWriteOnce")
    pods = tuple(on_node(pod(spec.revision, number), "node-1", is_creating=bool(number)) for number in range(2))
    assert explain_claim_conflicts("chat", spec, seen(plan_for(spec), pods)).pods == pods


def test_an_answer_without_a_download_is_none() -> None:
    for answer in (b"", b"[]", b"null", b'{"ready": true}', b'{"download": {"bytes": "x"}}', b"\xff", b"[" * 4096):
        assert parse_download(answer) is None


@pytest.mark.parametrize("number", ["Infinity", "1e999", "NaN", "-1", "9" * 100])
def test_a_number_that_no_status_may_have_is_none(number: str) -> None:
    assert (
        parse_download(f'{{"download": {{"bytes": 1, "total_bytes": {number}, "bytes_per_second": 1}}}}'.encode())
        is None
    )


class Expectations:
    """In place of LoadingEngines: what it was told to ask."""

    def __init__(self) -> None:
        self.told: list[tuple[Key, tuple[Engine, ...]]] = []

    def expect(self, key: Key, engines: tuple[Engine, ...]) -> dict[str, Download]:
        self.told.append((key, engines))
        return {}


@pytest.mark.parametrize("spec", [{"model": {"source": "builtin://smollm2"}}, {"model": HUB, "replicas": -1}])
def test_nobody_is_asked_any_more_once_nothing_is_downloaded_or_the_spec_is_invalid(spec: Json) -> None:
    world, told = World(), Expectations()
    world.reconciler = Reconciler(
        world.cluster,  # type: ignore[arg-type]
        world.deployments,
        world.stores,
        Settings(engine_image=IMAGE),
        told,  # type: ignore[arg-type]
    )
    world.put(model=HUB)
    world.show()
    world.reconcile()
    told.told.clear()
    world.put(**spec)
    world.show()
    world.reconcile()
    assert told.told == [(("apps", "chat"), ())]


@pytest.fixture
def engine() -> Iterator[tuple[Engine, list[bytes]]]:
    """An engine that answers with the last of the bodies."""
    bodies = [json.dumps({"download": {"bytes": 1, "total_bytes": 4, "bytes_per_second": 2}}).encode()]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503)
            self.end_headers()
            self.wfile.write(bodies[-1])

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield Engine("chat-0", "127.0.0.1", server.server_port), bodies
    server.shutdown()
    thread.join()
    server.server_close()


def test_engines_that_load_are_asked_and_each_news_asks_for_a_pass(engine: tuple[Engine, list[bytes]]) -> None:
    loads, bodies = engine
    news = threading.Semaphore(0)
    key = ("apps", "chat")
    asker = LoadingEngines(lambda changed: news.release(), lambda: True, interval_s=0.01)
    asker.start()
    dead = Engine("chat-1", "127.0.0.1", 1)
    assert asker.expect(key, (loads, dead)) == {}
    assert news.acquire(timeout=60.0)
    assert asker.expect(key, (loads, dead)) == {"chat-0": Download(1, 4, 2)}
    bodies.append(b'{"ready": true}')
    assert news.acquire(timeout=60.0)
    assert asker.expect(key, ()) == {}
    assert asker.is_alive(), "the operator's liveness goes by it"
    asker.stop()
    asker.join(timeout=60.0)
    assert not asker.is_alive()


def test_an_answer_that_comes_byte_by_byte_without_end_is_given_up() -> None:
    is_over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                while not is_over.wait(0.02):
                    connection.sendall(b"x")

        thread = threading.Thread(target=drip)
        thread.start()
        assert ask(Engine("chat-0", "127.0.0.1", listener.getsockname()[1]), timeout_s=0.2) is None
        is_over.set()
        thread.join()


def test_an_existing_claim_is_mounted_and_never_made() -> None:
    spec = valid(model=HUB, cache={"type": "ExistingPVC", "claimName": "models"})
    assert CLAIM not in {c["kind"] for c in plan_for(spec).desired}
    volumes = render_pod_template(spec, IMAGE, {}, "chat")["spec"]["volumes"]
    assert {"name": "cache", "persistentVolumeClaim": {"claimName": "models"}} in volumes
    assert status_of(spec, seen(plan_for(spec)))["cache"] == {"claim": "models"}
