"""Events: those that we post about TokaDeployments, and those of others that explain missing pods.

Owns: every request about Events. An Event that is posted again within a while is counted up instead of made anew.
Others' events are listed only for a pod, StatefulSet or claim that does not come, by its uid, with a backoff. A watch
of Warnings tells when there is news of one. What it brings is not kept, nor needed: without the right to it, news comes
later.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from toka_operator import __version__
from toka_operator.cluster import Cluster
from toka_operator.errors import ApiError, NamespaceEndsError, TransientError
from toka_operator.failures import (
    Failure,
    explain_missing_pods,
    explain_pending_claim,
    explain_waiting_pod,
    is_creating,
    is_unscheduled,
)
from toka_operator.fields import Json
from toka_operator.metrics import WRITES
from toka_operator.observed import Observed
from toka_operator.resources import CLAIM, STATEFUL_SET, Owner
from toka_operator.settings import API_VERSION, GROUP, KIND, MANAGED_BY
from toka_operator.status import Event
from toka_operator.store import Key
from toka_operator.times import format_time

logger = logging.getLogger("toka.events")

SERIES_S = 600.0
"""The same event within so long is counted up."""
MAX_SERIES = 4096
SUSPECT_AFTER_S = 2.0
"""A pod that does not come within so long is asked about."""
ASK_FIRST_S = 2.0
ASK_LAST_S = 30.0
LISTS_APART_S = 0.2
FRONT = 5
"""The number of those that wait longest, any of which may ask: passes that only time calls for come once a second."""
COMES_LATE_S = 5.0
"""An object that does not come for so long after its turn has no place any more."""
RETRIED_ANNOTATION = f"{GROUP}/pods-retried-at"
"""On a StatefulSet whose pods were refused: when its controller was last made to try again."""


class Recorder:
    """Posts Events about TokaDeployments. One that is lost is not missed: the conditions say the same."""

    def __init__(self, cluster: Cluster, identity: str) -> None:
        self._cluster, self._identity = cluster, identity
        self._series: OrderedDict[tuple[str, str, str], tuple[Json, float]] = OrderedDict()

    def post(self, owner: Owner, event: Event) -> None:
        series = (owner.uid, event.reason, event.message)
        posted, at = self._series.pop(series, (None, 0.0))
        try:
            if posted is not None and time.monotonic() < at + SERIES_S:
                posted = self._count_up(posted)
            else:
                posted = self._create(owner, event)
        except NamespaceEndsError:
            return
        except (ApiError, TransientError) as error:
            logger.warning("object=%s/%s event=%s lost=%r", owner.namespace, owner.name, event.reason, str(error))
            return
        self._series[series] = (posted, time.monotonic())
        while len(self._series) > MAX_SERIES:
            self._series.popitem(last=False)

    def _create(self, owner: Owner, event: Event) -> Json:
        stamp = format_time(time.time())
        involved = {"apiVersion": API_VERSION, "kind": KIND, "name": owner.name}
        involved |= {"namespace": owner.namespace, "uid": owner.uid}
        manifest = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{owner.name}.{time.time_ns():x}", "namespace": owner.namespace},
            "involvedObject": involved,
            "type": "Warning" if event.is_warning else "Normal",
            "reason": event.reason,
            "message": event.message[:1024],
            "source": {"component": MANAGED_BY},
            "reportingComponent": MANAGED_BY,
            "reportingInstance": f"{self._identity} {__version__}"[:128],
            "firstTimestamp": stamp,
            "lastTimestamp": stamp,
            "count": 1,
        }
        created = self._cluster.create(manifest)
        WRITES.labels(kind="Event", verb="create").inc()
        return created

    def _count_up(self, posted: Json) -> Json:
        patch = {"count": int(posted.get("count") or 1) + 1, "lastTimestamp": format_time(time.time())}
        updated = self._cluster.merge("Event", posted, patch)
        WRITES.labels(kind="Event", verb="patch").inc()
        return updated


class Warnings:
    """Lists of others' Warning events: no more than a few a second, however many objects wait for pods, because the API
    server reads all events of a namespace for each. Those that wait for their turn keep their place.

    Passes ask, a watch's thread brings news."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._lock = threading.Lock()
        self._next_list = 0.0
        self._waiting: OrderedDict[str, float] = OrderedDict()
        """uid of an object whose turn is yet to come -> when it was told to come again (monotonic)."""
        self._expected: dict[str, Key] = {}
        """uid of a child that does not come -> its TokaDeployment."""
        self._news: set[str] = set()
        """uids of expected children of which a Warning came since they were last asked about."""

    def expect(self, uid: str, key: Key) -> None:
        """Heed Warnings about the object with this uid from now on."""
        with self._lock:
            self._expected[uid] = key

    def forget(self, uids: Iterable[str]) -> None:
        with self._lock:
            for uid in uids:
                self._expected.pop(uid, None)
                self._news.discard(uid)

    def note(self, uid: str) -> Key | None:
        """Take in that there is a new Warning about an object; the TokaDeployment to work on, if it is news to any."""
        with self._lock:
            key = self._expected.get(uid)
            if key is None or uid in self._news:
                return None
            self._news.add(uid)
            return key

    def has_news(self, uid: str) -> bool:
        with self._lock:
            return uid in self._news

    def turn_in_s(self, uid: str) -> float:
        """Seconds until events about the object with this uid may be asked for; 0.0: now, once."""
        with self._lock:
            now = time.monotonic()
            while self._waiting and next(iter(self._waiting.values())) + COMES_LATE_S < now:
                self._waiting.popitem(last=False)  # it found its pods, or is gone
            self._waiting.setdefault(uid, now)
            place = next(number for number, waiting in enumerate(self._waiting) if waiting == uid)
            if place < FRONT and now >= self._next_list:
                del self._waiting[uid]
                self._news.discard(uid)
                self._next_list = now + LISTS_APART_S
                return 0.0
            self._waiting[uid] = max(now, self._next_list) + place * LISTS_APART_S
            return max(LISTS_APART_S, self._waiting[uid] - now)

    def list_about(self, namespace: str, uid: str) -> list[Json] | None:
        """The Warnings about the object with this uid; None if nobody answers."""
        try:
            return self.cluster.list_all(
                "Event", namespace, field_selector=f"involvedObject.uid={uid},type=Warning"
            ).items
        except (ApiError, TransientError) as error:
            logger.warning("namespace=%s event=events_not_listed why=%r", namespace, str(error))
            return None


@dataclass(slots=True)
class _Suspect:
    """A pod, or a StatefulSet with too few pods, that does not come."""

    next_ask: float
    asked: float
    """The monotonic time at which its events were last listed, or it was first missed."""
    delay_s: float = ASK_FIRST_S
    failure: Failure | None = None


class Suspects:
    """The children that one TokaDeployment waits for without a stated reason, by uid, and what events say of them."""

    def __init__(self) -> None:
        self._suspects: dict[str, _Suspect] = {}

    def explain(self, warnings: Warnings, owner: Owner, observed: Observed, pods: Mapping[str, Json]) -> Observed:
        """The same observation with the failures that only events tell. `pods` are those of `observed` by name."""
        lacking = {child["metadata"]["uid"]: child for child in observed.of_kind(STATEFUL_SET) if _lacks(child, pods)}
        creating = {pod["metadata"]["uid"]: pod for pod in pods.values() if is_creating(pod)}
        unscheduled = {name for name, pod in pods.items() if is_unscheduled(pod)}
        claims = [c for c in observed.of_kind(CLAIM) if unscheduled and _is_pending(c)]
        asked = lacking.keys() | creating.keys() | {claim["metadata"]["uid"] for claim in claims}
        gone = self._suspects.keys() - asked
        warnings.forget(gone)
        for uid in gone:
            del self._suspects[uid]
        missing = [self._ask(warnings, owner, child, explain_missing_pods) for child in lacking.values()]
        waiting = [self._ask(warnings, owner, pod, explain_waiting_pod) for pod in creating.values()]
        explained = {failure.pod: failure for failure in waiting if failure is not None}
        for failure in (self._ask(warnings, owner, claim, explain_pending_claim) for claim in claims):
            if failure is not None:
                explained |= {name: replace(failure, pod=name) for name in unscheduled}
        views = (replace(view, failure=_choose(view.failure, explained.get(view.name))) for view in observed.pods)
        found = tuple(failure for failure in missing if failure is not None)
        return replace(observed, pods=tuple(views), missing_pods=found)

    def forget(self, warnings: Warnings) -> None:
        """Wait for nothing any more: the TokaDeployment is gone."""
        warnings.forget(self._suspects)
        self._suspects.clear()

    def next_ask_s(self) -> float | None:
        """Seconds until events are to be asked for again; None if nothing is waited for."""
        moment = min((suspect.next_ask for suspect in self._suspects.values()), default=None)
        return None if moment is None else max(0.0, moment - time.monotonic())

    def _ask(
        self, warnings: Warnings, owner: Owner, obj: Json, explain: Callable[[str, list[Json]], Failure | None]
    ) -> Failure | None:
        now = time.monotonic()
        uid, name = obj["metadata"]["uid"], obj["metadata"]["name"]
        suspect = self._suspects.get(uid)
        if suspect is None:
            suspect = self._suspects[uid] = _Suspect(now + SUSPECT_AFTER_S, now)
            warnings.expect(uid, (owner.namespace, owner.name))
        if warnings.has_news(uid):
            suspect.next_ask = min(suspect.next_ask, suspect.asked + ASK_FIRST_S)
        if now < suspect.next_ask:
            return suspect.failure
        turn_in_s = warnings.turn_in_s(uid)
        suspect.next_ask = now + (turn_in_s or suspect.delay_s)
        if turn_in_s > 0.0:
            return suspect.failure
        suspect.asked = now
        suspect.delay_s = min(ASK_LAST_S, suspect.delay_s * 2)
        events = warnings.list_about(owner.namespace, uid)
        if events is None:
            return suspect.failure
        suspect.failure = explain(name, events)
        if suspect.failure is not None and obj.get("kind") == STATEFUL_SET:
            self._nudge(warnings.cluster, obj)
        return suspect.failure

    def _nudge(self, cluster: Cluster, stateful_set: Json) -> None:
        """Touches a StatefulSet whose pods were refused: its controller tries again at once, instead of after a
        backoff of up to a quarter of an hour."""
        patch = {"metadata": {"annotations": {RETRIED_ANNOTATION: format_time(time.time())}}}
        try:
            cluster.merge(STATEFUL_SET, stateful_set, patch)
            WRITES.labels(kind=STATEFUL_SET, verb="patch").inc()
        except (ApiError, TransientError) as error:
            logger.info("child=%s event=not_touched why=%r", stateful_set["metadata"]["name"], str(error))


def _is_pending(claim: Json) -> bool:
    return (claim.get("status") or {}).get("phase") == "Pending"


def _choose(seen: Failure | None, told: Failure | None) -> Failure | None:
    """Return the failure of a pod: its status tells it, but why a claim is pending, events tell better."""
    if seen is None:
        return told
    is_better = told is not None and told.reason == seen.reason == "ClaimPending"
    return replace(seen, message=told.message) if told is not None and is_better else seen


def _lacks(stateful_set: Json, pods: Mapping[str, Json]) -> bool:
    """Whether a StatefulSet asks for a pod that nobody has seen, and its controller says that it has not made it.

    A controller that has not seen the newest spec is only slow.
    """
    metadata, status = stateful_set["metadata"], stateful_set.get("status") or {}
    uid, wanted = metadata["uid"], int(stateful_set["spec"].get("replicas", 1))
    is_slow = int(status.get("observedGeneration", 0)) < int(metadata.get("generation", 0))
    if is_slow or int(status.get("replicas", 0)) >= wanted:
        return False
    owned = (o for pod in pods.values() for o in pod["metadata"].get("ownerReferences") or [])
    return sum(1 for owner in owned if owner.get("uid") == uid) < wanted
