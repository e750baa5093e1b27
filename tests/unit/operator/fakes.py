"""An API server in memory, as far as a Reconciler, a Watch and an Election see it through a `Cluster`."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from toka_operator.cluster import Page
from toka_operator.errors import ConflictError, NotFoundError, OperatorError
from toka_operator.reconcile import Reconciler
from toka_operator.settings import KIND, Settings
from toka_operator.store import Store
from toka_operator.watches import make_stores, own_key

Json = dict[str, Any]
Address = tuple[str, str, str]
"""(kind, namespace, name)"""


class FakeCluster:
    """Objects by address. Each write gets a new version; `refuse` says which writes are refused, `after` is called
    when one was made."""

    def __init__(self) -> None:
        self.objects: dict[Address, Json] = {}
        self.writes: list[tuple[str, str]] = []
        self.asked: list[str] = []
        """The field selector of each list of events."""
        self.refuse: Callable[[str, Json], OperatorError | None] = lambda verb, body: None
        self.after: Callable[[str, Json], None] = lambda verb, body: None
        self.drops_image_volumes = False
        """Whether it has the feature gate ImageVolume off."""
        self.trials: list[str] = []
        """The kind of each object that was only tried."""
        self._versions = itertools.count(1)

    def store(self, obj: Json) -> Json:
        """Takes an object over, as whoever wrote it, with a version and, if the spec differs, a generation."""
        metadata = obj["metadata"]
        address = (obj["kind"], metadata["namespace"], metadata["name"])
        before = self.objects.get(address)
        metadata["resourceVersion"] = str(next(self._versions))
        metadata.setdefault("uid", f"uid-{address}")
        generation = before["metadata"]["generation"] if before else 0
        is_changed = before is None or before.get("spec") != obj.get("spec")
        metadata["generation"] = generation + 1 if is_changed else generation
        self.objects[address] = copy.deepcopy(obj)
        return copy.deepcopy(obj)

    def read(self, kind: str, namespace: str, name: str) -> Json:
        if (kind, namespace, name) not in self.objects:
            raise NotFoundError(404, "NotFound", name)
        return copy.deepcopy(self.objects[kind, namespace, name])

    def list_all(self, kind: str, namespace: str | None, selector: str = "", field_selector: str = "") -> Page:
        found = [copy.deepcopy(o) for (k, n, _), o in self.objects.items() if k == kind and namespace in (None, n)]
        if kind == "Event":
            self.asked.append(field_selector)
            found = [e for e in found if f"involvedObject.uid={e['involvedObject']['uid']}," in field_selector]
        return Page(found, str(next(self._versions)))

    def create(self, manifest: Json, is_trial: bool = False) -> Json:
        metadata = manifest["metadata"]
        self._ask("create", manifest)
        if (manifest["kind"], metadata["namespace"], metadata["name"]) in self.objects:
            raise ConflictError(409, "AlreadyExists", metadata["name"])
        made = copy.deepcopy(manifest)
        if self.drops_image_volumes and made["kind"] == "StatefulSet":
            pod = made["spec"]["template"]["spec"]
            pod["volumes"] = [volume for volume in pod["volumes"] if "image" not in volume]
        if is_trial:
            self.trials.append(made["kind"])
            return made
        return self._finish("create", made)

    def merge(self, kind: str, live: Json, patch: Json) -> Json:
        self._ask("patch", live)
        found = self.read(kind, live["metadata"]["namespace"], live["metadata"]["name"])
        if found["metadata"]["resourceVersion"] != live["metadata"]["resourceVersion"]:
            raise ConflictError(409, "Conflict", "the object has been modified")
        return self._finish("patch", _merged(found, patch))

    def apply_status(self, manifest: Json) -> Json:
        self._ask("status", manifest)
        found = self.read(manifest["kind"], manifest["metadata"]["namespace"], manifest["metadata"]["name"])
        if found["metadata"]["resourceVersion"] != manifest["metadata"]["resourceVersion"]:
            raise ConflictError(409, "Conflict", "the object has been modified")
        return self._finish("status", {**found, "status": copy.deepcopy(manifest["status"])})

    def delete(self, kind: str, namespace: str, name: str, uid: str, grace_s: int | None = None) -> None:
        found = self.read(kind, namespace, name)
        self._ask("delete", found)
        del self.objects[kind, namespace, name]
        self.writes.append(("delete", kind))

    def read_version(self, kind: str, namespace: str | None) -> str:
        return str(next(self._versions))

    def watch(
        self, kind: str, namespace: str | None, resource_version: str, selector: str = "", field_selector: str = ""
    ) -> Iterator[Json]:
        yield from ()

    def _ask(self, verb: str, body: Json) -> None:
        refusal = self.refuse(verb, body)
        if refusal is not None:
            self.writes.append((f"refused {verb}", body["kind"]))
            raise refusal

    def _finish(self, verb: str, obj: Json) -> Json:
        stored = self.store(obj)
        self.writes.append((verb, obj["kind"]))
        self.after(verb, stored)
        return stored


class World:
    """A Reconciler with its stores on a FakeCluster. `show` tells the stores of everything, as the watches would."""

    def __init__(self, **settings: Any) -> None:
        self.cluster = FakeCluster()
        self.deployments = Store(own_key)
        self.stores = make_stores()
        wanted = Settings(engine_image="engine:1", **settings)
        self.reconciler = Reconciler(self.cluster, self.deployments, self.stores, wanted)  # type: ignore[arg-type]

    def put(self, **spec: Any) -> Json:
        """Writes the TokaDeployment apps/chat."""
        full = {"model": {"source": "builtin://smollm2"}, "resources": {"device": "cpu"}, **spec}
        before = self.cluster.objects.get((KIND, "apps", "chat"), {"metadata": {"namespace": "apps", "name": "chat"}})
        return self.cluster.store({**copy.deepcopy(before), "kind": KIND, "spec": full})

    def show(self) -> None:
        for (kind, _, _), obj in self.cluster.objects.items():
            if kind == KIND:
                self.deployments.put(copy.deepcopy(obj))
            elif kind in self.stores:
                self.stores[kind].put(copy.deepcopy(obj))

    def reconcile(self) -> float | None:
        return self.reconciler.reconcile(("apps", "chat"))

    def status(self) -> Json:
        found: Json = self.cluster.objects[KIND, "apps", "chat"].get("status", {})
        return found

    def condition(self, kind: str) -> Json:
        return next(c for c in self.status()["conditions"] if c["type"] == kind)


def _merged(target: Json, patch: Json) -> Json:
    """RFC 7386."""
    merged = dict(target)
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merged(merged[key], value)
        else:
            merged[key] = value
    return merged
