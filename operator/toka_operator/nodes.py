"""A watch of the cordoned nodes, whose pods somebody may soon want away.

Owns: which nodes are cordoned, as far as the operator may know. The API server sends only those (a field selector), so
that the heartbeats of a thousand nodes cost nothing here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from toka_operator.cluster import Cluster
from toka_operator.errors import ApiError, TransientError
from toka_operator.watch_stream import WatchStream

NODE = "Node"
_CORDONED = "spec.unschedulable=true"


class CordonedNodes(WatchStream):
    """Follows the cordoned nodes. `on_change` gets the names of those that were cordoned or are no longer; `on_settled`
    is called when it turns out whether they can be seen at all."""

    def __init__(
        self, cluster: Cluster, on_change: Callable[[frozenset[str]], None], on_settled: Callable[[], None]
    ) -> None:
        super().__init__(cluster, NODE, None, field_selector=_CORDONED)
        self._on_change, self._on_settled = on_change, on_settled
        self._names: frozenset[str] = frozenset()
        self._is_synced = threading.Event()

    @property
    def is_settled(self) -> bool:
        """Whether the nodes were listed, or the operator may not see them."""
        return self._is_synced.is_set() or self.is_refused

    def find(self) -> frozenset[str] | None:
        """The names of the cordoned nodes; None if the operator cannot see nodes."""
        return self._names if self._is_synced.is_set() and not self.is_refused else None

    def _begin(self, is_anew: bool) -> str:
        page = self._cluster.list_all(self._kind, None, field_selector=self._field_selector)
        before, was_seen = self._names, self.find() is not None
        self._names = frozenset(node["metadata"]["name"] for node in page.items)
        self._is_synced.set()
        self._note_recovery()
        self._on_change(before ^ self._names)
        if not was_seen:
            self._on_settled()
        return page.resource_version

    def _take(self, event_type: str, obj: dict[str, Any]) -> None:
        """Take in one event: a node that is no longer cordoned comes as deleted."""
        name = frozenset([obj["metadata"]["name"]])
        before = self._names
        self._names = before - name if event_type == "DELETED" else before | name
        if self._names != before:
            self._on_change(name)

    def _fail(self, error: ApiError | TransientError | None) -> float:
        was_refused = self.is_refused
        delay_s = super()._fail(error)
        if self.is_refused and not was_refused:
            self._on_settled()
        return delay_s
