"""One pass over one TokaDeployment: observe -> plan -> apply -> status.

Owns: the order of writes and what an API error means. It keeps no state that matters: whatever is
remembered here only saves requests, and a new process converges to the same end without it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from toka_operator.asking import Engine
from toka_operator.canary import Canary, find_canary, find_measured, read_canary
from toka_operator.children import ChildWriter, Memory
from toka_operator.cluster import Cluster
from toka_operator.downloads import downloads_from_hub, explain_claim_conflicts
from toka_operator.errors import ConflictError, FieldError, NamespaceEndsError, NotFoundError, TransientError
from toka_operator.escapes import find_escapes
from toka_operator.events import Recorder, Warnings
from toka_operator.fields import Json
from toka_operator.loading import LoadingEngines
from toka_operator.measuring import MeasuredEngines
from toka_operator.metrics import WRITES
from toka_operator.observed import (
    Observed,
    find_engine_port,
    is_adoptable,
    is_kept_claim,
    is_owned_by,
    ready_addresses,
    view_pod,
)
from toka_operator.plan import Plan, make_plan
from toka_operator.resources import INFERENCE_POOL, STATEFUL_SET, Owner, set_name
from toka_operator.revisions import with_stored_revision
from toka_operator.rollback import Resort, describe_wish, find_resort
from toka_operator.settings import API_VERSION, KIND, Settings
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


class Reconciler:
    """Works on any key in any thread, but on each key in one at a time."""

    def __init__(
        self,
        cluster: Cluster,
        deployments: Store,
        stores: Mapping[str, Store],
        settings: Settings,
        loading: LoadingEngines | None = None,
        see_kinds: Callable[[str], Mapping[str, str]] = lambda namespace: {},
        find_cordoned: Callable[[], frozenset[str] | None] = lambda: None,
        measured: MeasuredEngines | None = None,
    ) -> None:
        """`loading`, `measured` None: engines are not asked for their downloads, for their figures. `see_kinds` tells
        of a namespace how kinds that the cluster need not have are seen there; `find_cordoned` which nodes are
        cordoned, or None if that cannot be seen."""
        self._cluster, self._settings, self._loading, self._measured = cluster, settings, loading, measured
        self._deployments, self._stores = deployments, stores
        self._see_kinds, self._find_cordoned = see_kinds, find_cordoned
        self._children = ChildWriter(cluster, stores, settings)
        self._memories: dict[Key, Memory] = {}
        self._recorder = Recorder(cluster, settings.identity)
        self.warnings = Warnings(cluster)

    def reconcile(self, key: Key) -> float | None:
        """One pass; returns in how many seconds time alone may call for another.

        Raises TransientError (try again), NotLeaderError (another replica's task), ApiError (not expected
        here).
        """
        deployment = self._deployments.get(key)
        if deployment is None or deployment["metadata"].get("deletionTimestamp"):
            if (memory := self._memories.pop(key, None)) is not None:
                memory.suspects.forget(self.warnings)
            self._ask_no_engines(key)
            return None
        metadata = deployment["metadata"]
        owner = Owner(metadata["namespace"], metadata["name"], metadata["uid"], int(metadata.get("generation", 1)))
        spec = parse(deployment)
        if not isinstance(spec, list):
            spec = find_escapes(spec, self._settings.allow_host_path) or spec
        if isinstance(spec, list):
            requeue_s = self._report_invalid(owner, spec, deployment)
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

    def _report_invalid(self, owner: Owner, errors: list[FieldError], deployment: Json) -> float | None:
        """Tells what is wrong with the spec, and how its pods are, which stay as they are."""
        memory = self._memories.setdefault((owner.namespace, owner.name), Memory())
        self._ask_no_engines((owner.namespace, owner.name))
        observed, previous = self._observe(owner, memory), deployment.get("status") or {}
        self._write_status(owner, deployment, build_invalid_status(owner, errors, observed, previous, time.time()))
        return memory.suspects.next_ask_s()

    def _converge(self, owner: Owner, spec: TokaDeploymentSpec, deployment: Json) -> float | None:
        previous = deployment.get("status") or {}
        memory = self._memories.setdefault((owner.namespace, owner.name), Memory())
        self._children.adopt_orphans(owner, memory)
        observed = self._observe(owner, memory)
        observed = replace(observed, complete_revision=previous.get("completeRevision", ""))
        spec = with_stored_revision(owner, spec, observed)
        resort = find_resort(owner, deployment, spec, observed)
        if resort.failed is not None and resort.spec is not None:
            spec = resort.spec
        observed = self._add_downloads(owner, spec, explain_claim_conflicts(owner.name, spec, observed))
        canary = self._judge_canary(owner, spec, deployment, observed, resort)
        new_limit = canary.limit if canary is not None and canary.revision == spec.revision else None
        plan = make_plan(owner, spec, observed, self._settings, time.time(), new_limit)
        self._confirm_owner(owner, plan, observed, previous)
        try:
            outcome = self._children.write(owner, plan, observed, memory)
        except NamespaceEndsError:
            return None
        observed = replace(observed, taken_names=frozenset(memory.taken_names))
        now = time.time()
        status = build_status(owner, spec, observed, plan, outcome, previous, now, resort, canary)
        delays = [
            0.0 if status.get("rollback", resort.failed) != resort.failed else None,  # a rollout was given up
            plan.requeue_s,
            0.0 if self._has_new_pool(owner, observed) else None,
            find_next_moment_s(spec, observed, status, now),
            _delay_status(memory, previous, status),
        ]
        if memory.status_due is None:
            self._write_status(owner, deployment, status)
        if memory.taken_names:
            delays.append(max(0.1, min(memory.taken_names.values()) - time.monotonic()))
        delays += [memory.refusals.next_try_s(), memory.suspects.next_ask_s()]
        return min((delay for delay in delays if delay is not None), default=None)

    def _has_new_pool(self, owner: Owner, observed: Observed) -> bool:
        """Whether this pass made the InferencePool: the HTTPRoute goes to it in the next one."""
        pools = self._stores[INFERENCE_POOL].members((owner.namespace, owner.name))
        return not observed.of_kind(INFERENCE_POOL) and any(is_owned_by(pool, owner.uid) for pool in pools)

    def _observe(self, owner: Owner, memory: Memory) -> Observed:
        """The state of the watches' caches, and of events where a pod does not come; else no requests."""
        key = (owner.namespace, owner.name)
        now = time.monotonic()
        for name in [name for name, until in memory.taken_names.items() if until <= now]:
            del memory.taken_names[name]
        children: dict[tuple[str, str], Json] = {}
        for kind, store in self._stores.items():
            if kind not in ("Pod", "EndpointSlice"):
                owned = (c for c in store.members(key) if is_owned_by(c, owner.uid) or is_kept_claim(c, owner.name))
                children.update(((kind, child["metadata"]["name"]), child) for child in owned)
        sets = {c["metadata"]["uid"] for (kind, _), c in children.items() if kind == STATEFUL_SET}
        endpoints = ready_addresses(
            s
            for s in self._stores["EndpointSlice"].members(key)
            if (s["metadata"].get("labels") or {}).get("kubernetes.io/service-name") == owner.name
        )
        pods = self._stores["Pod"].members(key)
        ours = [pod for pod in pods if is_adoptable(pod, owner.name) or any(is_owned_by(pod, uid) for uid in sets)]
        names = frozenset(pod["metadata"]["name"] for pod in pods) - {pod["metadata"]["name"] for pod in ours}
        views = tuple(view_pod(pod, endpoints) for pod in ours)
        observed = Observed(
            children,
            views,
            frozenset(memory.taken_names),
            names,
            sights=self._see_kinds(owner.namespace),
            cordoned=self._find_cordoned(),
        )
        return memory.suspects.explain(self.warnings, owner, observed, {p["metadata"]["name"]: p for p in ours})

    def _add_downloads(self, owner: Owner, spec: TokaDeploymentSpec, observed: Observed) -> Observed:
        """The same, with what engines that load say of their downloads; a thread of its own asks them."""
        if self._loading is None:
            return observed
        is_hubs = downloads_from_hub(spec)
        engines = tuple(
            Engine(pod.name, pod.loading_address, spec.engine.port)
            for pod in observed.pods
            if is_hubs and pod.loading_address and pod.revision == spec.revision and not pod.is_terminating
        )
        return replace(observed, downloads=self._loading.expect((owner.namespace, owner.name), engines))

    def _judge_canary(
        self, owner: Owner, spec: TokaDeploymentSpec, deployment: Json, observed: Observed, resort: Resort
    ) -> Canary | None:
        """The canary by what the engines said last; a thread of its own asks them while it is measured."""
        key, now = (owner.namespace, owner.name), time.time()
        previous = read_canary(deployment.get("status") or {})
        if self._measured is None or resort.failed is not None:  # then it only says what failed
            self._measure(key, ())
            return previous
        observed = replace(observed, figures=self._measured.recall(key))
        canary = find_canary(spec, observed, previous, describe_wish(deployment["spec"], spec), now)
        pods = find_measured(spec, observed, canary, now)
        sets = {pod.revision: observed.children.get((STATEFUL_SET, set_name(owner.name, pod.revision))) for pod in pods}
        ports = {revision: find_engine_port(found) for revision, found in sets.items() if found is not None}
        known = (pod for pod in pods if pod.revision in ports)
        self._measure(key, tuple(Engine(pod.uid, pod.address, ports[pod.revision]) for pod in known))
        return canary

    def _measure(self, key: Key, engines: tuple[Engine, ...]) -> None:
        if self._measured is not None:
            self._measured.expect(key, engines)

    def _ask_no_engines(self, key: Key) -> None:
        if self._loading is not None:
            self._loading.expect(key, ())
        self._measure(key, ())

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


def _delay_status(memory: Memory, previous: Json, status: Json) -> float | None:
    """Seconds until this status is due, which `memory` keeps over passes; None if it is due now, or no news."""
    delay_s = 0.0 if status == previous else find_batching_delay_s(previous, status)
    now = time.monotonic()
    due = min(now + delay_s, memory.status_due or math.inf)
    memory.status_due = due if delay_s and due > now else None
    return due - now if memory.status_due else None
