"""List and watch of TokaDeployments and their children: the operator's only sight of the cluster.

Owns: one thread per watched kind and scope (a namespace, or the whole cluster). kopf's own watch is not used, because
it may end while the process lives, selects no labels on the server and knows no parents. Each change ends as one key
handed to `on_change`; nothing is decided here.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable

from toka_operator.cluster import Cluster
from toka_operator.errors import ApiError, NotFoundError, TransientError
from toka_operator.fields import Json
from toka_operator.settings import KIND, MANAGED_BY
from toka_operator.store import Key, Store
from toka_operator.watch_stream import WatchStream

logger = logging.getLogger("toka.watches")

_OURS = f"app.kubernetes.io/managed-by={MANAGED_BY}"
CHILD_SELECTORS = {
    "ServiceAccount": _OURS,
    "Service": _OURS,
    "StatefulSet": _OURS,
    "PersistentVolumeClaim": f"{_OURS},app.kubernetes.io/component in (cache,data)",
    "PodDisruptionBudget": _OURS,
    "NetworkPolicy": _OURS,
    "HorizontalPodAutoscaler": _OURS,
    "ControllerRevision": f"{_OURS},app.kubernetes.io/component=revision",
    "Pod": f"{_OURS},app.kubernetes.io/component=engine",
    "EndpointSlice": _OURS,
}
OPTIONAL_SELECTORS = {"PodMonitor": _OURS, "InferencePool": _OURS, "HTTPRoute": _OURS}
"""The same of kinds that a cluster need not have."""
SELECTORS = {KIND: "", **CHILD_SELECTORS}
"""Label selector of each watched kind, applied by the API server."""


def own_key(obj: Json) -> Key:
    """The key of a TokaDeployment: its own name."""
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


def child_key(obj: Json) -> Key | None:
    """The TokaDeployment that a child names in its labels."""
    labels = obj["metadata"].get("labels") or {}
    name = labels.get("app.kubernetes.io/instance")
    return (obj["metadata"].get("namespace", ""), name) if name else None


def trim_child(obj: Json) -> Json:
    """The object without what is never looked at (a pod's spec but its node): a thousand pods fit in little memory."""
    spec, status = obj.get("spec") or {}, obj.get("status") or {}
    if "containers" in spec:
        return {**obj, "spec": {"nodeName": spec.get("nodeName")}}
    if "scaleTargetRef" in spec:  # an autoscaler writes what it measures every few seconds
        return {**obj, "status": {"conditions": status.get("conditions")}}
    return obj


def make_stores() -> dict[str, Store]:
    return {kind: Store(child_key, trim_child) for kind in (*CHILD_SELECTORS, *OPTIONAL_SELECTORS)}


class Watch(WatchStream):
    """Keeps one scope of one Store true, until it is stopped.

    `on_change` gets each changed key and whether the object was new (listed or added). `on_synced` is called after the
    first complete list, and after the first one that is allowed again.
    """

    def __init__(
        self,
        cluster: Cluster,
        kind: str,
        namespace: str | None,
        store: Store,
        on_change: Callable[[Key, bool], None],
        on_synced: Callable[[], None],
    ) -> None:
        super().__init__(cluster, kind, namespace, {**SELECTORS, **OPTIONAL_SELECTORS}[kind])
        self._store = store
        self._on_change, self._on_synced = on_change, on_synced
        self.is_synced = threading.Event()

    def _begin(self, is_anew: bool) -> str:
        page = self._cluster.list_all(self._kind, self._namespace, self._label_selector)
        for item in page.items:
            item.setdefault("kind", self._kind)
        changed = self._store.replace_all(page.items, int(page.resource_version), self._namespace, is_anew)
        is_seen_again = self.is_refused or not self.is_synced.is_set()
        self._note_recovery()
        for key in changed:
            self._on_change(key, True)
        if is_seen_again:
            self.is_synced.set()
            self._on_synced()
        return page.resource_version

    def _take(self, event_type: str, obj: Json) -> None:
        change = self._store.remove if event_type == "DELETED" else self._store.put
        for key in change(obj):
            self._on_change(key, event_type == "ADDED")


class OptionalWatch(Watch):
    """Watches a kind that the cluster need not have. While it is away, the store is empty, and nothing is wrong.

    `on_synced` is called when the kind comes, when it goes, and when it is first known to be away. A kind that is away
    is looked for again after up to `absent_retry_s`.
    """

    _was_refused = False

    def __init__(
        self,
        cluster: Cluster,
        kind: str,
        namespace: str | None,
        store: Store,
        on_change: Callable[[Key, bool], None],
        on_synced: Callable[[], None],
        absent_retry_s: float,
    ) -> None:
        super().__init__(cluster, kind, namespace, store, on_change, on_synced)
        self._absent_retry_s = absent_retry_s

    @property
    def is_answered(self) -> bool:
        """Whether it is known that the kind is there, or that it is not."""
        return self._was_refused or self.is_synced.is_set()

    def _fail(self, error: ApiError | TransientError | None) -> float:
        is_news = isinstance(error, ApiError) and (self.is_synced.is_set() or not self._was_refused)
        self._was_refused = self._was_refused or isinstance(error, ApiError)
        if not isinstance(error, NotFoundError):
            delay_s = super()._fail(error)
            if is_news:
                self._on_synced()
            return delay_s
        self._version = ""
        self._note_recovery()
        self._store.replace_all([], 0, self._namespace, is_anew=True)
        self.is_synced.clear()
        if is_news:
            logger.info("watch=%s event=kind_is_away", self.name)
            self._on_synced()
        return self._absent_retry_s * random.uniform(0.75, 1.0)
