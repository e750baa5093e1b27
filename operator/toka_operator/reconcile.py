"""One pass over one TokaDeployment: observe -> plan -> apply -> status.

Owns: the order of writes and what an API error means. It keeps no state that matters: whatever is
remembered here only saves requests, and a new process converges to the same end without it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from toka_operator.cluster import Cluster
from toka_operator.conditions import Outcome
from toka_operator.differences import find_corrections, find_stale_annotations, is_satisfied
from toka_operator.errors import ApiError, ConflictError, NamespaceEndsError, NotFoundError, TransientError
from toka_operator.events import Recorder, Suspects
from toka_operator.fields import Json
from toka_operator.metrics import WRITES
from toka_operator.observed import Observed, is_owned_by, ready_addresses, view_pod
from toka_operator.plan import Plan, make_plan
from toka_operator.refusals import Refusals
from toka_operator.resources import POD, STATEFUL_SET, Owner
from toka_operator.settings import API_VERSION, KIND, SERVICE_ANNOTATIONS_KEY, Settings
from toka_operator.spec import TokaDeploymentSpec, parse
from toka_operator.status import (
    build_invalid_status,
    build_status,
    find_batching_delay_s,
    find_events,
    find_next_moment_s,
)
from toka_operator.store import Key, Store

logger = logging.getLogger("toka.reconcile")

MAX_CORRECTIONS = 3
"""How often one pass corrects one child: a hand edit may race with each correction."""


@dataclass(slots=True)
class _Memory:
    """What one pass leaves for the next, to save requests."""

    strangers: dict[tuple[str, str], float] = field(default_factory=dict)
    """Names that another's object holds -> when to try again (monotonic)."""
    settled: dict[str, tuple[Json, Json]] = field(default_factory=dict)
    """uid -> (desired, what no write of ours could correct), so that an admission webhook makes no endless
    loop."""
    refusals: Refusals = field(default_factory=Refusals)
    suspects: Suspects = field(default_factory=Suspects)
    status_due: float | None = None
    """When a status that waits for more progress is written (monotonic)."""


class Reconciler:
    """Works on any key in any thread, but on each key in one at a time."""

    def __init__(self, cluster: Cluster, deployments: Store, stores: Mapping[str, Store], settings: Settings) -> None:
        self._cluster, self._settings = cluster, settings
        self._deployments, self._stores = deployments, stores
        self._memories: dict[Key, _Memory] = {}
        self._recorder = Recorder(cluster, settings.identity)

    def reconcile(self, key: Key) -> float | None:
        """One pass; returns in how many seconds time alone may call for another.

        Raises TransientError (try again), NotLeaderError (another replica's task), ApiError (not expected
        here).
        """
        deployment = self._deployments.get(key)
        if deployment is None or deployment["metadata"].get("deletionTimestamp"):
            self._memories.pop(key, None)
            return None
        metadata = deployment["metadata"]
        owner = Owner(metadata["namespace"], metadata["name"], metadata["uid"], int(metadata.get("generation", 1)))
        spec = parse(deployment)
        requeue_s: float | None = None
        if isinstance(spec, list):
            previous = deployment.get("status") or {}
            self._write_status(owner, deployment, build_invalid_status(owner, spec, previous, time.time()))
        else:
            requeue_s = self._converge(owner, spec, deployment)
        return 0.0 if self._has_changed(key, owner) else requeue_s

    def _has_changed(self, key: Key, owner: Owner) -> bool:
        """Whether the object has another spec by now than this pass worked on.

        The answer to our own write may bring it before the watch does, whose event is then no news.
        """
        newest = self._deployments.get(key)
        if newest is None:
            return False
        metadata = newest["metadata"]
        return (metadata["uid"], int(metadata.get("generation", 1))) != (owner.uid, owner.generation)

    def _converge(self, owner: Owner, spec: TokaDeploymentSpec, deployment: Json) -> float | None:
        previous = deployment.get("status") or {}
        memory = self._memories.setdefault((owner.namespace, owner.name), _Memory())
        observed = self._observe(owner, memory)
        plan = make_plan(owner, spec, observed, self._settings.engine_image, time.time())
        self._confirm_owner(owner, plan, observed, previous)
        try:
            outcome = self._write_children(owner, plan, observed, memory)
        except NamespaceEndsError:
            return None
        observed = replace(observed, strangers=frozenset(memory.strangers))
        now = time.time()
        status = build_status(owner, spec, observed, plan, outcome, previous, now)
        delays = [
            plan.requeue_s,
            find_next_moment_s(spec, observed, status, now),
            _delay_status(memory, previous, status),
        ]
        if memory.status_due is None:
            self._write_status(owner, deployment, status)
        if memory.strangers:
            delays.append(max(0.1, min(memory.strangers.values()) - time.monotonic()))
        delays += [memory.refusals.next_try_s(), memory.suspects.next_ask_s()]
        return min((delay for delay in delays if delay is not None), default=None)

    def _observe(self, owner: Owner, memory: _Memory) -> Observed:
        """The state of the watches' caches, and of events where a pod does not come; else no requests."""
        key = (owner.namespace, owner.name)
        now = time.monotonic()
        for name in [name for name, until in memory.strangers.items() if until <= now]:
            del memory.strangers[name]
        children: dict[tuple[str, str], Json] = {}
        for kind, store in self._stores.items():
            if kind not in ("Pod", "EndpointSlice"):
                owned = (child for child in store.members(key) if is_owned_by(child, owner.uid))
                children.update(((kind, child["metadata"]["name"]), child) for child in owned)
        sets = {c["metadata"]["uid"] for (kind, _), c in children.items() if kind == STATEFUL_SET}
        endpoints = ready_addresses(
            s
            for s in self._stores["EndpointSlice"].members(key)
            if (s["metadata"].get("labels") or {}).get("kubernetes.io/service-name") == owner.name
        )
        ours: list[Json] = []
        others: list[Json] = []
        for pod in self._stores["Pod"].members(key):
            (ours if any(is_owned_by(pod, uid) for uid in sets) else others).append(pod)
        views = tuple(view_pod(pod, endpoints) for pod in ours)
        names = frozenset(pod["metadata"]["name"] for pod in others)
        observed = Observed(children, views, frozenset(memory.strangers), names)
        return memory.suspects.explain(self._cluster, owner, observed, {p["metadata"]["name"]: p for p in ours})

    def _confirm_owner(self, owner: Owner, plan: Plan, observed: Observed, previous: Json) -> None:
        """Before children are made *again*: the object itself may be gone, and another watch saw that of them first.

        Costs one read, and only when a child is missing from an object that was reconciled before.
        """
        missing = [c for c in plan.desired if (c["kind"], c["metadata"]["name"]) not in observed.children]
        if not missing or previous.get("observedGeneration") != owner.generation:
            return
        found = self._refresh(owner)
        if found["metadata"]["uid"] != owner.uid or found["metadata"].get("deletionTimestamp"):
            raise TransientError(f"{KIND} {owner.namespace}/{owner.name} is being replaced")

    def _refresh(self, owner: Owner) -> Json:
        """Reads the TokaDeployment itself, which its watch shows otherwise."""
        key = (owner.namespace, owner.name)
        try:
            found = self._cluster.read(KIND, *key)
        except NotFoundError as error:
            self._deployments.forget(key)
            raise TransientError(f"{KIND} {owner.namespace}/{owner.name} is gone") from error
        self._deployments.put(found)
        return found

    def _write_children(self, owner: Owner, plan: Plan, observed: Observed, memory: _Memory) -> Outcome:
        """Makes every write of the plan. What the API server refuses is reported and backs off; the rest is written."""
        rejected: dict[str, str] = {}

        def attempt(target: str, wish: object, write: Callable[[], None]) -> None:
            rejected[target] = memory.refusals.find(target, wish) or self._attempt(owner, memory, target, wish, write)

        for desired in plan.desired:
            kind, name = desired["kind"], desired["metadata"]["name"]
            live = observed.children.get((kind, name))
            attempt(f"{kind} {name}", desired, partial(self._write_child, owner, desired, live, memory))
        for kind, name, uid in plan.deletions:
            attempt(f"deletion of {kind} {name}", uid, partial(self._delete_child, owner, kind, name, uid))
        for name, uid in plan.dead_pods:
            logger.info("object=%s/%s pod=%s event=deleted_for_good", owner.namespace, owner.name, name)
            attempt(f"deletion of {POD} {name}", uid, partial(self._delete_child, owner, POD, name, uid, grace_s=0))
        rejected = {target: why for target, why in rejected.items() if why}
        memory.refusals.keep_only(set(rejected))
        return Outcome(rejected)

    def _attempt(self, owner: Owner, memory: _Memory, target: str, wish: object, write: Callable[[], None]) -> str:
        """Makes one write. Returns why the API server refused it, or nothing."""
        try:
            write()
        except ApiError as error:
            if error.status not in (400, 403, 422) or isinstance(error, NamespaceEndsError):
                raise
            why = error.message[:1024] or f"{error.status} {error.reason}"
            if memory.refusals.note(target, wish, why):
                logger.warning("object=%s/%s child=%r rejected=%r", owner.namespace, owner.name, target, why)
            return why
        return ""

    def _write_child(self, owner: Owner, desired: Json, live: Json | None, memory: _Memory) -> None:
        kind, name = desired["kind"], desired["metadata"]["name"]
        if live is None:
            live = self._create_child(owner, desired, memory)
            if live is None:
                return
        if live["metadata"].get("deletionTimestamp"):
            return
        uid = live["metadata"]["uid"]
        for _ in range(MAX_CORRECTIONS):
            corrections = find_corrections(desired, live)
            stale = find_stale_annotations(desired, live, SERVICE_ANNOTATIONS_KEY)
            if not stale and (not corrections or memory.settled.get(uid) == (desired, corrections)):
                return
            live = self._correct_child(desired, live, _merge(corrections, stale))
            left = find_corrections(desired, live)
            stubborn = _intersect(left, corrections)
            if stubborn:
                where = (owner.namespace, owner.name, kind, name)
                logger.warning("object=%s/%s child=%s/%s not_corrected=%s", *where, sorted(stubborn))
                memory.settled[uid] = (desired, stubborn)

    def _create_child(self, owner: Owner, desired: Json, memory: _Memory) -> Json | None:
        """The new child; None if a stranger holds the name."""
        kind, name = desired["kind"], desired["metadata"]["name"]
        try:
            created = self._cluster.create(desired)
        except NotFoundError as error:
            raise TransientError(f"namespace {owner.namespace} is gone") from error
        except ConflictError:
            self._meet_holder(owner, desired, memory)
            return None
        WRITES.labels(kind=kind, verb="create").inc()
        created.setdefault("kind", kind)
        self._stores[kind].put(created)
        logger.debug("object=%s/%s child=%s/%s event=created", owner.namespace, owner.name, kind, name)
        return created

    def _meet_holder(self, owner: Owner, desired: Json, memory: _Memory) -> None:
        """Whoever holds the name of a child that no watch showed: a stranger, or a child of ours without
        its labels.

        Ours gets its labels back and the pass begins anew, because it was planned without this child.
        """
        kind, name = desired["kind"], desired["metadata"]["name"]
        try:
            holder = self._cluster.read(kind, owner.namespace, name)
        except NotFoundError as error:
            raise TransientError(f"{kind} {owner.namespace}/{name} came and went") from error
        if not is_owned_by(holder, owner.uid):
            logger.warning("object=%s/%s child=%s/%s event=name_taken", owner.namespace, owner.name, kind, name)
            memory.strangers[(kind, name)] = time.monotonic() + self._settings.stranger_retry_s
            return
        holder.setdefault("kind", kind)
        labels = {"metadata": {"labels": desired["metadata"]["labels"]}}
        if is_satisfied(labels, holder):
            self._stores[kind].put(holder)
        else:
            self._correct_child(desired, holder, labels)
        raise TransientError(f"{kind} {owner.namespace}/{name} is there already")

    def _correct_child(self, desired: Json, live: Json, patch: Json) -> Json:
        """One merge patch of just what differs.

        Not a server-side apply: of a child that was created by POST, an apply removes nothing (a changed
        Service port stays beside the new one), and created by apply, a stranger's child would be taken
        over.
        """
        kind, metadata = desired["kind"], live["metadata"]
        name, namespace = metadata["name"], metadata["namespace"]
        try:
            live = self._cluster.merge(kind, live, patch)
        except (ConflictError, NotFoundError) as error:
            self._look_again(kind, namespace, name)
            raise TransientError(f"{kind} {namespace}/{name} changed meanwhile: {error.message}") from error
        WRITES.labels(kind=kind, verb="patch").inc()
        live.setdefault("kind", kind)
        self._stores[kind].put(live)
        return live

    def _look_again(self, kind: str, namespace: str, name: str) -> None:
        """Reads a child that is another than we knew."""
        try:
            found = self._cluster.read(kind, namespace, name)
        except NotFoundError:
            self._stores[kind].forget((namespace, name))
            return
        found.setdefault("kind", kind)
        self._stores[kind].put(found)

    def _delete_child(self, owner: Owner, kind: str, name: str, uid: str, grace_s: int | None = None) -> None:
        try:
            self._cluster.delete(kind, owner.namespace, name, uid, grace_s)
            WRITES.labels(kind=kind, verb="delete").inc()
        except (NotFoundError, ConflictError):
            self._stores[kind].forget((owner.namespace, name))

    def _write_status(self, owner: Owner, deployment: Json, status: Json) -> None:
        """Writes the status of the object as it was when the pass began: what a newer spec needs, this may not say."""
        previous = deployment.get("status") or {}
        if status == previous:
            return
        metadata = {"name": owner.name, "namespace": owner.namespace, "uid": owner.uid}
        metadata["resourceVersion"] = deployment["metadata"]["resourceVersion"]
        manifest = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "status": status}
        try:
            updated = self._cluster.apply_status(manifest)
        except NotFoundError:
            self._deployments.forget((owner.namespace, owner.name))
            return
        except ConflictError as error:
            self._refresh(owner)
            raise TransientError(f"{KIND} {owner.namespace}/{owner.name} changed meanwhile") from error
        WRITES.labels(kind=KIND, verb="status").inc()
        self._deployments.put(updated)
        for event in find_events(previous, status):
            self._recorder.post(owner, event)


def _delay_status(memory: _Memory, previous: Json, status: Json) -> float | None:
    """Seconds until this status is due, which `memory` keeps over passes; None if it is due now, or no news."""
    delay_s = 0.0 if status == previous else find_batching_delay_s(previous, status)
    now = time.monotonic()
    due = min(now + delay_s, memory.status_due or math.inf)
    memory.status_due = due if delay_s and due > now else None
    return due - now if memory.status_due else None


def _intersect(left: Json, corrections: Json) -> Json:
    """What of `left` was corrected just now in vain. The rest is another's edit meanwhile, which is corrected next."""
    common: Json = {}
    for key in left.keys() & corrections.keys():
        a, b = left[key], corrections[key]
        if isinstance(a, dict) and isinstance(b, dict):
            inner = _intersect(a, b)
            if inner:
                common[key] = inner
        else:
            common[key] = a
    return common


def _merge(a: Json, b: Json) -> Json:
    """Two merge patches as one."""
    both = {**a, **b}
    for key in a.keys() & b.keys():
        if isinstance(a[key], dict) and isinstance(b[key], dict):
            both[key] = _merge(a[key], b[key])
    return both
