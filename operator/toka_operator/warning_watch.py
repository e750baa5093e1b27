"""A watch of others' Warning events: a pass comes at once when there is news of a child that does not come.

Owns: the stream. Which children are waited for, and what was said of them, `events` knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from toka_operator.cluster import Cluster
from toka_operator.events import Warnings
from toka_operator.store import Key
from toka_operator.watch_stream import WatchStream


class WarningWatch(WatchStream):
    """Follows the Warnings of one scope. `on_news` gets the TokaDeployment that waits for the child concerned."""

    def __init__(
        self, cluster: Cluster, namespace: str | None, warnings: Warnings, on_news: Callable[[Key], None]
    ) -> None:
        super().__init__(cluster, "Event", namespace, field_selector="type=Warning")
        self._warnings, self._on_news = warnings, on_news

    def _begin(self, is_anew: bool) -> str:
        """Nothing is listed: what was said before a child is missed is asked for later."""
        return self._cluster.read_version(self._kind, self._namespace)

    def _take(self, event_type: str, obj: dict[str, Any]) -> None:
        uid = (obj.get("involvedObject") or {}).get("uid")
        if event_type != "DELETED" and uid and (key := self._warnings.note(uid)):
            self._on_news(key)
