"""Leader election by a Lease: at most one of the operator's replicas writes.

Owns: who leads, by the rules of client-go: a lease is taken when its holder did not renew it for its whole
duration *as measured by our own clock*, and a leader that could not renew before the deadline stops by
itself, before another may start. Every write asks `write_window_s`, and is given up before another may act.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

from toka_operator.cluster import Cluster
from toka_operator.errors import ApiError, ConflictError, NotFoundError, TransientError
from toka_operator.fields import Json
from toka_operator.settings import Settings

logger = logging.getLogger("toka.lease")


LEASE_SILENCE_S = 60.0
"""A replica that has not seen the Lease renewed, by whomever, for so long could not take part in an election."""


class Election(threading.Thread):
    """Runs until stopped; gives the lease back then, so that the next leader need not wait.

    `on_elected` is called at the beginning of each term. A term ends when the Lease lapses, also if nobody looked
    meanwhile and the next renewal succeeds. `on_restored` is called when the Lease has an older version than before:
    etcd was restored from a backup. No stream tells of that, and the Lease alone is asked for again and again.
    """

    def __init__(
        self, settings: Settings, on_elected: Callable[[], None], on_restored: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(name="lease", daemon=True)
        self._settings = settings
        self._on_elected, self._on_restored = on_elected, on_restored
        self._stop_event = threading.Event()
        self._cluster: Cluster | None = None
        self._known: Json | None = None
        """The Lease as it was last read or written."""
        self._is_doubtful = False
        """Whether the last request failed, so that the Lease may be another by now."""
        self._version = 0
        self._seen_at = 0.0
        self._held_until = 0.0
        self._is_new_term = False
        """Whether a term began that `on_elected` was not called for."""
        self._renewal: tuple[str, str] | None = None
        """Holder and time of the last renewal that was read."""
        self._alive_at: float | None = None
        """The time at which the Lease was last seen renewed, by us or another."""

    def connect(self, cluster: Cluster) -> None:
        """The cluster asks `write_window_s` before writes, so the two are made one after the other."""
        self._cluster = cluster

    def is_held(self) -> bool:
        """Whether we surely lead now."""
        return time.monotonic() < self._held_until

    def write_window_s(self) -> float:
        """Seconds that a write may take which begins now, so that it ends before another may lead; 0.0 if we do not."""
        left_s = self._held_until - time.monotonic()
        if left_s <= 0.0:
            return 0.0
        return left_s + self._settings.lease_duration_s - self._settings.lease_renew_deadline_s

    def describe_silence(self) -> str:
        """Why this replica could not take part in an election; empty if it can."""
        if self._alive_at is None:
            return f"lease {self._settings.lease_name} has no living holder yet"
        silence_s = time.monotonic() - self._alive_at
        return (
            f"lease {self._settings.lease_name} was not seen renewed for {silence_s:.0f} s"
            if silence_s > LEASE_SILENCE_S
            else ""
        )

    def stop(self) -> None:
        self._stop_event.set()

    def run(self) -> None:
        was_held = False
        while not self._stop_event.is_set():
            try:
                self._try_once()
            except ConflictError:
                self._is_doubtful = True
            except (ApiError, TransientError) as error:
                self._is_doubtful = True
                logger.warning("lease=%s event=failed error=%r", self._settings.lease_name, str(error))
            if self.is_held() != was_held:
                was_held = not was_held
                logger.info(
                    "lease=%s held=%s identity=%s", self._settings.lease_name, was_held, self._settings.identity
                )
            if self._is_new_term:
                self._is_new_term = False
                self._on_elected()
            self._stop_event.wait(next_try_s(self._settings.lease_retry_s, self.is_held(), self._lapses_in_s()))
        self._release()

    def _try_once(self) -> None:
        started = time.monotonic()
        lease = self._known if self.is_held() and not self._is_doubtful else self._read()
        if lease is None:
            self._accept(self._write(None), started)
            return
        holder = lease["spec"].get("holderIdentity") or ""
        is_ours = holder == self._settings.identity
        if not is_ours:
            self._held_until = 0.0
        if is_ours or not holder or started >= self._lapses_at():
            self._accept(self._write(lease), started)

    def _lapses_at(self) -> float:
        """Return the time (monotonic) from which the Lease that we know may be taken, if it is not renewed."""
        duration_s = int(self._known["spec"].get("leaseDurationSeconds") or 0) if self._known else 0
        return self._seen_at + duration_s

    def _lapses_in_s(self) -> float:
        return self._lapses_at() - time.monotonic()

    def _read(self) -> Json | None:
        """The lease; its age counts from when *we* saw this state of it first."""
        assert self._cluster is not None
        try:
            lease = self._cluster.read("Lease", self._settings.namespace, self._settings.lease_name)
        except NotFoundError:
            return None
        lease.setdefault("spec", {})
        is_same = self._known is not None and self._known["spec"] == lease["spec"]
        if not is_same:
            self._seen_at = time.monotonic()
        self._know(lease)
        self._note_renewal(lease)
        return lease

    def _know(self, lease: Json) -> None:
        self._known, self._is_doubtful = lease, False
        version = int(lease["metadata"]["resourceVersion"])
        if version < self._version:
            logger.warning("lease=%s event=went_back version=%d", self._settings.lease_name, version)
            self._on_restored()
        self._version = version

    def _note_renewal(self, lease: Json) -> None:
        """Whoever renewed the Lease since it was read last is alive."""
        spec = lease["spec"]
        renewal = (spec.get("holderIdentity") or "", spec.get("renewTime") or "")
        if self._renewal is not None and renewal != self._renewal and renewal[0]:
            self._alive_at = time.monotonic()
        self._renewal = renewal

    def _write(self, lease: Json | None) -> Json:
        assert self._cluster is not None
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = dict(lease["spec"]) if lease else {}
        if spec.get("holderIdentity") != self._settings.identity:
            spec["acquireTime"] = now
            spec["leaseTransitions"] = int(spec.get("leaseTransitions") or 0) + (1 if lease else 0)
        spec["holderIdentity"] = self._settings.identity
        spec["leaseDurationSeconds"] = int(self._settings.lease_duration_s)
        spec["renewTime"] = now
        if lease:
            return self._cluster.replace({**lease, "spec": spec})
        metadata = {"name": self._settings.lease_name, "namespace": self._settings.namespace}
        manifest = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": metadata,
            "spec": spec,
        }
        return self._cluster.create(manifest)

    def _accept(self, lease: Json, started: float) -> None:
        """We lead until the renewal deadline, counted from before the request. A new term begins unless we still
        led until now."""
        was_held = self.is_held()
        self._know(lease)
        self._seen_at = started
        self._alive_at = time.monotonic()
        self._held_until = started + self._settings.lease_renew_deadline_s
        if not was_held and self.is_held():
            self._is_new_term = True

    def _release(self) -> None:
        if not self.is_held() or self._cluster is None or self._known is None:
            return
        self._held_until = 0.0
        spec = {**self._known["spec"], "holderIdentity": "", "leaseDurationSeconds": 1}
        try:
            self._cluster.replace({**self._known, "spec": spec})
        except (ApiError, TransientError) as error:
            logger.warning("lease=%s event=not_released error=%r", self._settings.lease_name, str(error))


def next_try_s(retry_s: float, is_held: bool, lapses_in_s: float) -> float:
    """Return the seconds until the next try: a leader renews on time; those that wait try as soon as the Lease lapses,
    and spread out their writes."""
    if is_held:
        return retry_s
    regular_s = retry_s * random.uniform(1.0, 1.2)
    return min(regular_s, lapses_in_s + retry_s * random.uniform(0.0, 0.2)) if lapses_in_s > 0.0 else regular_s
