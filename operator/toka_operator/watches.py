"""List and watch of TokaDeployments and their children: the operator's only sight of the cluster.

Owns: one thread per watched kind and scope (a namespace, or the whole cluster), bookmarks, listing again when a
version is too old, and backoff. kopf's own watch is not used, because it may end while the process lives, selects no
labels on the server and knows no parents. Each change ends as one key handed to `on_change`; nothing is decided here.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Any

from toka_operator.cluster import Cluster
from toka_operator.errors import ApiError, GoneError, TransientError
from toka_operator.fields import Json
from toka_operator.metrics import WATCH_RESTARTS
from toka_operator.settings import KIND, MANAGED_BY
from toka_operator.store import Key, Store

logger = logging.getLogger("toka.watches")

_OURS = f"app.kubernetes.io/managed-by={MANAGED_BY}"
CHILD_SELECTORS = {
    "ServiceAccount": _OURS,
    "Service": _OURS,
    "StatefulSet": _OURS,
    "PersistentVolumeClaim": f"{_OURS},app.kubernetes.io/component in (cache,data)",
    "PodDisruptionBudget": _OURS,
    "ControllerRevision": f"{_OURS},app.kubernetes.io/component=revision",
    "Pod": f"{_OURS},app.kubernetes.io/component=engine",
    "EndpointSlice": _OURS,
}
SELECTORS = {KIND: "", **CHILD_SELECTORS}
"""Label selector of each watched kind, applied by the API server."""
BACKOFF_FIRST_S = 0.2
BACKOFF_LAST_S = 5.0
REFUSED_BACKOFF_LAST_S = 15.0
"""Longest wait after a refusal (403, 404): its cause is seldom gone within seconds."""
SHORT_STREAM_S = 1.0
"""A stream that ends sooner counts as broken, so that a server that ends all of them at once meets a backoff."""
MAX_RESUMES = 3
"""After so many failures in a row the kind is listed again: the failure may be due to the version."""


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
    spec = obj.get("spec") or {}
    return {**obj, "spec": {"nodeName": spec.get("nodeName")}} if "containers" in spec else obj


def make_stores() -> dict[str, Store]:
    return {kind: Store(child_key, trim_child) for kind in CHILD_SELECTORS}


class Watch(threading.Thread):
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
        super().__init__(name=f"watch-{kind}-{namespace or 'all'}", daemon=True)
        self._cluster, self._kind, self._namespace, self._store = cluster, kind, namespace, store
        self._on_change, self._on_synced = on_change, on_synced
        self._stop_event = threading.Event()
        self._version = ""
        self._num_failures = 0
        self._is_outdated = threading.Event()
        self.is_synced = threading.Event()
        self.last_contact = time.monotonic()
        """The time at which the thread last came round: after an event, a list, or a failure."""
        self.trouble = ""
        """The error that the last attempt met; empty while the watch works."""
        self.is_refused = False
        """Whether the watch was refused since it last worked: namespace, CRD or the right to see them is gone."""

    def stop(self) -> None:
        self._stop_event.set()

    def begin_anew(self) -> None:
        """Gives up all that was seen, and lists, when the present stream ends: the versions of the API server went
        back, and a stream from a version that is yet to come tells of nothing."""
        self._is_outdated.set()

    def run(self) -> None:
        while not self._stop_event.is_set():
            cause, delay_s = self._attempt()
            self.last_contact = time.monotonic()
            WATCH_RESTARTS.labels(kind=self._kind, cause=cause).inc()
            self._stop_event.wait(delay_s)

    def _attempt(self) -> tuple[str, float]:
        """Lists if there is no version to go on from, and follows the stream. Returns why it ended, and how long to
        wait before the next attempt."""
        started = time.monotonic()
        try:
            if self._is_outdated.is_set() or not self._version:
                self._version = self._list()
            self._follow()
        except GoneError:
            logger.info("watch=%s event=too_old action=list_again", self.name)
            self._version = ""
            return "gone", self._fail(None)
        except (ApiError, TransientError) as error:
            return "error", self._fail(error)
        if time.monotonic() < started + SHORT_STREAM_S:
            return "timeout", self._fail(None)
        self._note_contact()
        return "timeout", 0.0

    def _fail(self, error: ApiError | TransientError | None) -> float:
        """Counts a failure (None: one that is not worth a line in the log) and returns its backoff."""
        self._num_failures += 1
        is_refusal = isinstance(error, ApiError)
        self.is_refused = self.is_refused or is_refusal
        if is_refusal or self._num_failures % MAX_RESUMES == 0:
            self._version = ""
        if error is None and self._num_failures == 1:
            return 0.0
        last_s = REFUSED_BACKOFF_LAST_S if is_refusal else BACKOFF_LAST_S
        delay_s: float = min(last_s, BACKOFF_FIRST_S * 2.0 ** min(self._num_failures, 10)) * random.uniform(0.75, 1.0)
        if isinstance(error, TransientError):
            delay_s = max(delay_s, min(error.retry_after_s or 0.0, REFUSED_BACKOFF_LAST_S))
        if error is not None and str(error) != self.trouble:
            self.trouble = str(error)
            logger.warning("watch=%s event=broken error=%r retry_s=%.1f", self.name, self.trouble, delay_s)
        return delay_s

    def _note_contact(self) -> None:
        """The stream works: failures are counted anew."""
        self._num_failures = 0
        self._note_recovery()

    def _note_recovery(self) -> None:
        self.last_contact = time.monotonic()
        if self.trouble:
            logger.info("watch=%s event=recovered", self.name)
            self.trouble, self.is_refused = "", False

    def _list(self) -> str:
        is_anew = self._is_outdated.is_set()
        page = self._cluster.list_all(self._kind, self._namespace, SELECTORS[self._kind])
        for item in page.items:
            item.setdefault("kind", self._kind)
        changed = self._store.replace_all(page.items, int(page.resource_version), self._namespace, is_anew)
        if is_anew:
            self._is_outdated.clear()
            logger.warning("watch=%s event=began_anew version=%s", self.name, page.resource_version)
        is_seen_again = self.is_refused or not self.is_synced.is_set()
        self._note_recovery()
        for key in changed:
            self._on_change(key, True)
        if is_seen_again:
            self.is_synced.set()
            self._on_synced()
        return page.resource_version

    def _follow(self) -> None:
        """Takes in events until the stream ends; `_version` is always the one to go on from."""
        for event in self._cluster.watch(self._kind, self._namespace, SELECTORS[self._kind], self._version):
            self._take(event)
            self._note_contact()
            if self._stop_event.is_set():
                return

    def _take(self, event: dict[str, Any]) -> None:
        obj: Json = event["object"]
        if event["type"] != "BOOKMARK":
            change = self._store.remove if event["type"] == "DELETED" else self._store.put
            for key in change(obj):
                self._on_change(key, event["type"] == "ADDED")
        self._version = obj["metadata"]["resourceVersion"]
