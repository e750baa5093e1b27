"""Our own list+watch of children, because kopf neither selects by label on the server nor knows parents.

Owns: one thread per watched kind and namespace, bookmarks, listing again after 410, backoff after a broken
connection. Each change ends as one key handed to `on_change`; nothing is decided here.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable

from toka_operator.cluster import Cluster
from toka_operator.errors import ApiError, GoneError, TransientError
from toka_operator.fields import Json
from toka_operator.metrics import WATCH_RESTARTS
from toka_operator.settings import MANAGED_BY
from toka_operator.store import Key, Store

logger = logging.getLogger("toka.watches")

_OURS = f"app.kubernetes.io/managed-by={MANAGED_BY}"
SELECTORS = {
    "ServiceAccount": _OURS,
    "Service": _OURS,
    "StatefulSet": _OURS,
    "PodDisruptionBudget": _OURS,
    "ControllerRevision": f"{_OURS},app.kubernetes.io/component=revision",
    "Pod": f"{_OURS},app.kubernetes.io/component=engine",
    "EndpointSlice": _OURS,
}
BACKOFF_LAST_S = 5.0


def child_key(obj: Json) -> Key | None:
    """The TokaDeployment that a child names in its labels."""
    labels = obj["metadata"].get("labels") or {}
    name = labels.get("app.kubernetes.io/instance")
    return (obj["metadata"].get("namespace", ""), name) if name else None


def trim_child(obj: Json) -> Json:
    """Without what is never looked at: a thousand pods are to fit in little memory."""
    return {k: v for k, v in obj.items() if k != "spec" or "containers" not in v}


def make_stores() -> dict[str, Store]:
    return {kind: Store(child_key, trim_child) for kind in SELECTORS}


class Watch(threading.Thread):
    """Keeps one Store true. `on_change` gets each changed key, `on_gap` is called after a connection
    broke."""

    def __init__(
        self,
        cluster: Cluster,
        kind: str,
        namespace: str | None,
        store: Store,
        on_change: Callable[[Key], None],
        on_gap: Callable[[], None],
    ) -> None:
        super().__init__(name=f"watch-{kind}-{namespace or 'all'}", daemon=True)
        self._cluster, self._kind, self._namespace, self._store = cluster, kind, namespace, store
        self._on_change, self._on_gap = on_change, on_gap
        self._stop_event = threading.Event()
        self.is_synced = threading.Event()
        self.last_contact = time.monotonic()

    def stop(self) -> None:
        self._stop_event.set()

    def run(self) -> None:
        version = ""
        num_failures = 0
        while not self._stop_event.is_set():
            try:
                version = version or self._list()
                version = self._follow(version)
                num_failures = 0
                WATCH_RESTARTS.labels(kind=self._kind, cause="timeout").inc()
            except GoneError:
                logger.info("watch=%s event=too_old action=list_again", self._kind)
                WATCH_RESTARTS.labels(kind=self._kind, cause="gone").inc()
                version = ""
                self._on_gap()
            except (ApiError, TransientError) as error:
                num_failures += 1
                self.last_contact = time.monotonic()  # the server is silent, this thread is not
                delay_s = min(BACKOFF_LAST_S, 0.2 * 2 ** min(num_failures, 8)) * random.uniform(0.75, 1.25)
                logger.warning("watch=%s event=broken error=%r retry_s=%.1f", self._kind, str(error), delay_s)
                WATCH_RESTARTS.labels(kind=self._kind, cause="error").inc()
                version = "" if isinstance(error, ApiError) else version
                self._stop_event.wait(delay_s)
                self._on_gap()

    def _list(self) -> str:
        page = self._cluster.list_all(self._kind, self._namespace, SELECTORS[self._kind])
        for item in page.items:
            item.setdefault("kind", self._kind)
        changed = self._store.replace_all(page.items, int(page.resource_version))
        self.last_contact = time.monotonic()
        self.is_synced.set()
        for key in changed:
            self._on_change(key)
        return page.resource_version

    def _follow(self, version: str) -> str:
        for event in self._cluster.watch(self._kind, self._namespace, SELECTORS[self._kind], version):
            self.last_contact = time.monotonic()
            obj = event["object"]
            version = obj["metadata"]["resourceVersion"]
            if event["type"] == "BOOKMARK":
                continue
            change = self._store.remove if event["type"] == "DELETED" else self._store.put
            for key in change(obj):
                self._on_change(key)
            if self._stop_event.is_set():
                break
        return version
