"""A thread that follows one watch of the API server for as long as the process lives.

Owns: bookmarks, beginning anew when a version is too old, and backoff. What an event means, and what the stream begins
with, is its heirs'.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from abc import ABC, abstractmethod
from typing import Any

from toka_operator.cluster import Cluster
from toka_operator.errors import ApiError, GoneError, TransientError
from toka_operator.metrics import WATCH_RESTARTS

logger = logging.getLogger("toka.watches")

BACKOFF_FIRST_S = 0.2
BACKOFF_LAST_S = 5.0
REFUSED_BACKOFF_LAST_S = 15.0
"""Longest wait after a refusal (403, 404): its cause is seldom gone within seconds."""
SHORT_STREAM_S = 1.0
"""A stream that ends sooner counts as broken, so that a server that ends all of them at once meets a backoff."""
MAX_RESUMES = 3
"""After so many failures in a row the kind is listed again: the failure may be due to the version."""


class WatchStream(threading.Thread, ABC):
    """Follows the events of one kind in one scope (a namespace; None: the cluster), until it is stopped."""

    def __init__(
        self, cluster: Cluster, kind: str, namespace: str | None, label_selector: str = "", field_selector: str = ""
    ) -> None:
        super().__init__(name=f"watch-{kind}-{namespace or 'all'}", daemon=True)
        self._cluster, self._kind, self._namespace = cluster, kind, namespace
        self._label_selector, self._field_selector = label_selector, field_selector
        self._stop_event = threading.Event()
        self._version = ""
        self._num_failures = 0
        self._is_outdated = threading.Event()
        self.last_contact = time.monotonic()
        """The time at which the thread last came round: after an event, a list, or a failure."""
        self.trouble = ""
        """The error that the last attempt met; empty while the watch works."""
        self.is_refused = False
        """Whether the watch was refused since it last worked: namespace, CRD or the right to see them is gone."""

    @abstractmethod
    def _begin(self, is_anew: bool) -> str:
        """Look at what there is, and return the version to watch from. `is_anew`: whatever was seen is out of date."""

    @abstractmethod
    def _take(self, event_type: str, obj: dict[str, Any]) -> None:
        """Take in one event that is no bookmark."""

    def stop(self) -> None:
        self._stop_event.set()

    def begin_anew(self) -> None:
        """Gives up all that was seen, and begins anew, when the present stream ends: the versions of the API server
        went back, and a stream from a version that is yet to come tells of nothing."""
        self._is_outdated.set()

    def run(self) -> None:
        while not self._stop_event.is_set():
            cause, delay_s = self._attempt()
            self.last_contact = time.monotonic()
            WATCH_RESTARTS.labels(kind=self._kind, cause=cause).inc()
            self._stop_event.wait(delay_s)

    def _attempt(self) -> tuple[str, float]:
        """Begins anew if there is no version to go on from, and follows the stream. Returns why it ended, and how long
        to wait before the next attempt."""
        started = time.monotonic()
        try:
            is_anew = self._is_outdated.is_set()
            if is_anew or not self._version:
                self._version = self._begin(is_anew)
            if is_anew:
                self._is_outdated.clear()
                logger.warning("watch=%s event=began_anew version=%s", self.name, self._version)
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

    def _follow(self) -> None:
        """Takes in events until the stream ends; `_version` is always the one to go on from."""
        selectors = (self._label_selector, self._field_selector)
        for event in self._cluster.watch(self._kind, self._namespace, self._version, *selectors):
            if event["type"] != "BOOKMARK":
                self._take(event["type"], event["object"])
            self._version = event["object"]["metadata"]["resourceVersion"]
            self._note_contact()
            if self._stop_event.is_set():
                return
