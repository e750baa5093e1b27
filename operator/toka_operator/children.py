"""Writing the children of a TokaDeployment: creating, correcting, adopting and deleting them.

Owns: what an API error means for one child, and what is remembered of children to save requests. Decides nothing
about which children there should be; `plan` does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from toka_operator.cluster import Cluster
from toka_operator.conditions import Outcome
from toka_operator.differences import (
    find_corrections,
    find_owner_correction,
    find_stale_annotations,
    find_uncorrected,
    is_satisfied,
)
from toka_operator.errors import (
    ApiError,
    ConflictError,
    NamespaceEndsError,
    NotFoundError,
    TransientError,
    WriteFailsError,
)
from toka_operator.events import Suspects
from toka_operator.fields import Json
from toka_operator.metrics import WRITES
from toka_operator.observed import Observed, is_kept_claim, is_orphaned, is_owned_by, is_predecessors
from toka_operator.plan import Plan
from toka_operator.podspec import IMAGE_VOLUMES_DROPPED, find_image_volumes
from toka_operator.refusals import Refusals
from toka_operator.resources import (
    CLAIM,
    CONTROLLER_REVISION,
    NETWORK_POLICY,
    POD,
    SERVICE_ACCOUNT,
    STATEFUL_SET,
    Owner,
)
from toka_operator.settings import FIELD_MANAGER, SERVICE_ANNOTATIONS_KEY, Settings
from toka_operator.store import Key, Store

logger = logging.getLogger("toka.children")

MAX_CORRECTIONS = 3
"""The number of times that one pass corrects one child: a hand edit may race with each correction."""


@dataclass(slots=True)
class Memory:
    """Notes that one pass leaves for the next, to save requests."""

    taken_names: dict[tuple[str, str], float] = field(default_factory=dict)
    """Names of children that objects of other owners hold -> when to try again (monotonic)."""
    settled: dict[str, tuple[Json, Json]] = field(default_factory=dict)
    """uid -> (desired, what no write of ours could correct), so that an admission webhook makes no endless
    loop."""
    not_ours: set[str] = field(default_factory=set)
    """uids of objects without an owner that look like children, but were not made by an operator."""
    refusals: Refusals = field(default_factory=Refusals)
    suspects: Suspects = field(default_factory=Suspects)
    status_due: float | None = None
    """The monotonic time at which a status that waits for more progress is written."""


class ChildWriter:
    """Writes children of any TokaDeployment, from any thread."""

    def __init__(self, cluster: Cluster, stores: Mapping[str, Store], settings: Settings) -> None:
        self._cluster, self._stores, self._settings = cluster, stores, settings

    def adopt_orphans(self, owner: Owner, memory: Memory) -> None:
        """Takes back children that lost their owner: `kubectl delete --cascade=orphan`, or a reference removed by hand.

        Labels alone do not tell: an object that somebody copied has them, too. One that an operator made has a field
        manager that says so. Costs a read of each such object, once.
        """
        key: Key = (owner.namespace, owner.name)
        for kind, store in self._stores.items():
            if kind in (POD, CLAIM, "EndpointSlice"):
                continue
            for child in store.members(key):
                if is_orphaned(child) and child["metadata"]["uid"] not in memory.not_ours:
                    self._adopt(owner, kind, child["metadata"]["name"], memory)

    def _adopt(self, owner: Owner, kind: str, name: str, memory: Memory) -> None:
        try:
            found = self._cluster.read(kind, owner.namespace, name)
        except NotFoundError:
            self._stores[kind].forget((owner.namespace, name))
            return
        metadata = found["metadata"]
        if not is_orphaned(found) or not any(
            m.get("manager") == FIELD_MANAGER for m in metadata.get("managedFields", [])
        ):
            memory.not_ours.add(metadata["uid"])
            return
        try:
            self._patch(kind, found, {"metadata": {"ownerReferences": [owner.reference()]}})
        except WriteFailsError as error:  # the name is told as taken, and this is tried again with it
            logger.warning("object=%s/%s child=%s/%s adopted=%r", owner.namespace, owner.name, kind, name, str(error))
            return
        except ApiError as error:
            if error.status not in (400, 403, 422):
                raise
            # OwnerReferencesPermissionEnforcement asks for the verb delete, which we lack for some kinds
            memory.not_ours.add(metadata["uid"])
            return
        logger.info("object=%s/%s child=%s/%s event=adopted", owner.namespace, owner.name, kind, name)

    def write(self, owner: Owner, plan: Plan, observed: Observed, memory: Memory) -> Outcome:
        """Makes every write of the plan. What the API server refuses is reported and backs off; the rest is written."""
        rejected: dict[str, str] = {}
        uids = {child["metadata"]["uid"] for child in observed.children.values()}
        memory.settled = {uid: settled for uid, settled in memory.settled.items() if uid in uids}

        def attempt(target: str, wish: object, write: Callable[[], None]) -> None:
            rejected[target] = memory.refusals.find(target, wish) or self._attempt(owner, memory, target, wish, write)

        for desired in plan.desired:
            kind, name = desired["kind"], desired["metadata"]["name"]
            live = observed.children.get((kind, name))
            taken = {child for child, _ in memory.taken_names}
            if kind == STATEFUL_SET and live is None and taken & {SERVICE_ACCOUNT, CLAIM, NETWORK_POLICY}:
                continue  # its pods would run as somebody else's account, write into somebody else's volume, or be open
            attempt(f"{kind} {name}", desired, partial(self._write_child, owner, desired, live, memory))
        for kind, name, uid in plan.deletions:
            attempt(f"deletion of {kind} {name}", uid, partial(self._delete, owner, kind, name, uid))
        for name, uid in plan.dead_pods:
            logger.info("object=%s/%s pod=%s event=deleted_for_good", owner.namespace, owner.name, name)
            attempt(f"deletion of {POD} {name}", uid, partial(self._delete, owner, POD, name, uid, grace_s=0))
        for name, uid in plan.moved_pods:
            logger.info("object=%s/%s pod=%s event=moved_from_cordoned_node", owner.namespace, owner.name, name)
            attempt(f"deletion of {POD} {name}", uid, partial(self._delete, owner, POD, name, uid))
        rejected = {target: why for target, why in rejected.items() if why}
        memory.refusals.keep_only(set(rejected))
        return Outcome(rejected, memory.refusals.find_failed())

    def _attempt(self, owner: Owner, memory: Memory, target: str, wish: object, write: Callable[[], None]) -> str:
        """Makes one write. Returns why the API server refused it, or nothing."""
        try:
            write()
            return ""
        except ApiError as error:
            if error.status not in (400, 403, 422) or isinstance(error, NamespaceEndsError):
                raise
            why = error.message[:1024] or f"{error.status} {error.reason}"
            is_news = memory.refusals.note(target, wish, why)
        except WriteFailsError as error:
            why = str(error)[:1024]
            is_news = memory.refusals.note(target, wish, why, is_failed=True)
        if is_news:
            logger.warning("object=%s/%s child=%r rejected=%r", owner.namespace, owner.name, target, why)
        return why

    def _write_child(self, owner: Owner, desired: Json, live: Json | None, memory: Memory) -> None:
        kind, name = desired["kind"], desired["metadata"]["name"]
        if live is None:
            live = self._create(owner, desired, memory)
            if live is None:
                return
        if live["metadata"].get("deletionTimestamp"):
            return
        uid = live["metadata"]["uid"]
        for _ in range(MAX_CORRECTIONS):
            corrections = _merge(find_corrections(desired, live), find_owner_correction(desired, live))
            stale = find_stale_annotations(desired, live, SERVICE_ANNOTATIONS_KEY)
            if not stale and (not corrections or memory.settled.get(uid) == (desired, corrections)):
                return
            try:
                live = self._patch(kind, live, _merge(corrections, stale))
            except ApiError as error:
                if not _keeps_its_bytes(error, desired, live):
                    raise
                self._make_anew(owner, desired, live, memory)
                return
            left = _merge(find_corrections(desired, live), find_owner_correction(desired, live))
            stubborn = find_uncorrected(corrections, left)
            if stubborn:
                where = (owner.namespace, owner.name, kind, name)
                logger.warning("object=%s/%s child=%s/%s not_corrected=%s", *where, sorted(stubborn))
                memory.settled[uid] = (desired, stubborn)

    def _make_anew(self, owner: Owner, desired: Json, live: Json, memory: Memory) -> None:
        """Replaces a revision's memory by another of the same contents. No pod depends on it."""
        kept = live["metadata"].get("annotations") or {}
        metadata = {**desired["metadata"], "annotations": {**kept, **desired["metadata"].get("annotations", {})}}
        kind, name = desired["kind"], metadata["name"]
        logger.info("object=%s/%s child=%s/%s event=made_anew", owner.namespace, owner.name, kind, name)
        self._delete(owner, kind, name, live["metadata"]["uid"])
        self._create(owner, {**desired, "metadata": metadata}, memory)

    def _create(self, owner: Owner, desired: Json, memory: Memory) -> Json | None:
        """The new child; None if another's object holds the name."""
        kind, name = desired["kind"], desired["metadata"]["name"]
        try:
            if kind == STATEFUL_SET:
                self._try_image_volumes(desired)
            created = self._cluster.create(desired)
        except NotFoundError as error:
            raise TransientError(f"the namespace {owner.namespace}, or the kind {kind}, is gone: {error}") from error
        except ConflictError:
            self._resolve_name_conflict(owner, desired, memory)
            return None
        WRITES.labels(kind=kind, verb="create").inc()
        created.setdefault("kind", kind)
        self._stores[kind].put(created)
        logger.debug("object=%s/%s child=%s/%s event=created", owner.namespace, owner.name, kind, name)
        return created

    def _try_image_volumes(self, desired: Json) -> None:
        """Raises ApiError where the API server would drop the pods' image volumes: an engine without its model is none.

        Costs a request, for those StatefulSets alone that have such volumes.
        """
        if not find_image_volumes(desired["spec"]["template"]):
            return
        tried = self._cluster.create(desired, is_trial=True)
        dropped = find_image_volumes(desired["spec"]["template"]) - find_image_volumes(tried["spec"]["template"])
        if dropped:
            raise ApiError(422, "Invalid", f"{IMAGE_VOLUMES_DROPPED} ({', '.join(sorted(dropped))})")

    def _resolve_name_conflict(self, owner: Owner, desired: Json, memory: Memory) -> None:
        """After a 409 on create: gives a child of ours its labels back, or notes that a foreign object has the name.

        With a child of ours the pass begins anew, because it was planned without this child.
        """
        kind, name = desired["kind"], desired["metadata"]["name"]
        try:
            holder = self._cluster.read(kind, owner.namespace, name)
        except NotFoundError as error:
            raise TransientError(f"{kind} {owner.namespace}/{name} came and went") from error
        if is_predecessors(holder, owner.name, owner.uid):
            raise TransientError(f"{kind} {owner.namespace}/{name} belongs to a predecessor, and goes with it")
        if not is_owned_by(holder, owner.uid) and not is_kept_claim(holder, owner.name):
            logger.warning("object=%s/%s child=%s/%s event=name_taken", owner.namespace, owner.name, kind, name)
            memory.taken_names[(kind, name)] = time.monotonic() + self._settings.taken_name_retry_s
            return
        holder.setdefault("kind", kind)
        labels = {"metadata": {"labels": desired["metadata"]["labels"]}}
        if is_satisfied(labels, holder):
            self._stores[kind].put(holder)
        else:
            self._patch(kind, holder, labels)
        raise TransientError(f"{kind} {owner.namespace}/{name} is there already")

    def _patch(self, kind: str, live: Json, patch: Json) -> Json:
        """One merge patch of just what differs.

        Not a server-side apply: of a child that was created by POST, an apply removes nothing (a changed
        Service port stays beside the new one), and created by apply, a foreign object would be taken over.
        """
        metadata = live["metadata"]
        name, namespace = metadata["name"], metadata["namespace"]
        try:
            patched = self._cluster.merge(kind, live, patch)
        except (ConflictError, NotFoundError) as error:
            self._look_again(kind, namespace, name)
            raise TransientError(f"{kind} {namespace}/{name} changed meanwhile: {error.message}") from error
        WRITES.labels(kind=kind, verb="patch").inc()
        patched.setdefault("kind", kind)
        self._stores[kind].put(patched)
        return patched

    def _look_again(self, kind: str, namespace: str, name: str) -> None:
        """Reads a child that is another than we knew."""
        try:
            found = self._cluster.read(kind, namespace, name)
        except NotFoundError:
            self._stores[kind].forget((namespace, name))
            return
        found.setdefault("kind", kind)
        self._stores[kind].put(found)

    def _delete(self, owner: Owner, kind: str, name: str, uid: str, grace_s: int | None = None) -> None:
        try:
            left = self._cluster.delete(kind, owner.namespace, name, uid, grace_s)
            WRITES.labels(kind=kind, verb="delete").inc()
            if kind == POD and left.get("kind") == POD:
                self._stores[kind].put(left)  # so that the next pass knows that it goes, and moves no other yet
        except (NotFoundError, ConflictError):
            self._stores[kind].forget((owner.namespace, name))


def _keeps_its_bytes(error: ApiError, desired: Json, live: Json) -> bool:
    """Whether a patch was refused because the API server wrote the data of a ControllerRevision in other bytes, which
    count as other data. The first versions made such ones; this one writes bytes that stay as they are."""
    is_about_data = error.status == 422 and "immutable" in error.message
    return desired["kind"] == CONTROLLER_REVISION and is_about_data and desired["data"] == live.get("data")


def _merge(a: Json, b: Json) -> Json:
    """Two merge patches as one."""
    both = {**a, **b}
    for key in a.keys() & b.keys():
        if isinstance(a[key], dict) and isinstance(b[key], dict):
            both[key] = _merge(a[key], b[key])
    return both
