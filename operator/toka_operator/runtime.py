"""The running operator: threads around the queue, the watches, the lease and the health port.

Owns: starting and stopping every thread, what becomes of a failed pass, and how the probes answer. Knows nothing of
kopf; `handlers` starts and stops it.
"""

from __future__ import annotations

import logging
import threading
import time

from toka_operator.cluster import Cluster, connect
from toka_operator.errors import NotLeaderError, OperatorError, TransientError
from toka_operator.health import HealthServer
from toka_operator.lease import Election
from toka_operator.loading import LoadingEngines
from toka_operator.measuring import MeasuredEngines
from toka_operator.metrics import (
    IS_LEADER,
    QUEUE_DEPTH,
    QUEUE_OLDEST_SECONDS,
    RECONCILE_SECONDS,
    RECONCILES,
    UNWATCHED_NAMESPACES,
)
from toka_operator.nodes import CordonedNodes
from toka_operator.reconcile import Reconciler
from toka_operator.resources import HTTP_ROUTE, INFERENCE_POOL, POD_MONITOR
from toka_operator.settings import KIND, Settings
from toka_operator.sight import KNOWN, NOT_ALLOWED, UNKNOWN
from toka_operator.store import Key, Store
from toka_operator.warning_watch import WarningWatch
from toka_operator.watch_stream import WatchStream
from toka_operator.watches import OPTIONAL_SELECTORS, SELECTORS, OptionalWatch, Watch, make_stores, own_key
from toka_operator.workqueue import WorkQueue

logger = logging.getLogger("toka.operator")

WATCH_STUCK_S = 300.0
"""Each attempt of a watch ends within its timeouts. A thread without any contact for so long hangs."""
QUEUE_STUCK_S = 600.0
CA_SILENCE_S = 60.0
"""No answer for so long, since the certificate authority's file changed: the process knows only the old one."""
CHILD_SETTLE_S = 0.4
"""Children change in bursts (a pod is bound, starts, gets an endpoint): one pass and one status for a
burst."""
STOP_LIMIT_S = 20.0
"""Seconds that the passes under way may take to end, all together."""


class Runtime:
    """Everything between the API server's events and our writes to it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._queue: WorkQueue[Key] = WorkQueue(max_bulk_workers=max(1, settings.num_workers // 2))
        self._deployments = Store(own_key)
        self._stores = make_stores()
        self._election = Election(settings, self._on_elected, self._on_restored)
        scopes = settings.watch_namespaces or (None,)
        optional = _list_optional_kinds(settings)
        self._cluster: Cluster = connect(
            (len(SELECTORS) + 1 + len(optional)) * len(scopes) + settings.watches_nodes,
            settings.num_workers,
            self._election.write_window_s,
            lease_timeout_s=settings.lease_renew_deadline_s / 2,
            watch_timeout_s=settings.watch_timeout_s,
        )
        self._election.connect(self._cluster)
        self._loading = LoadingEngines(self._queue.add, self._election.is_held) if settings.reads_downloads else None
        self._measured = MeasuredEngines(self._note_figures, self._election.is_held)
        self._optional = {(kind, scope): self._watch_optional(kind, scope) for kind in optional for scope in scopes}
        self._nodes = self._make_node_watch() if settings.watches_nodes else None
        self._reconciler = Reconciler(
            self._cluster,
            self._deployments,
            self._stores,
            settings,
            self._loading,
            self._see_kinds,
            self._find_cordoned,
            self._measured,
        )
        self._warning_watches = [
            WarningWatch(self._cluster, scope, self._reconciler.warnings, self._note_warning) for scope in scopes
        ]
        self._watches = {scope: [self._make_watch(kind, scope) for kind in SELECTORS] for scope in scopes}
        self._workers = [
            threading.Thread(target=self._work, name=f"worker-{n}", daemon=True) for n in range(settings.num_workers)
        ]
        self._is_stopped = False
        self._health = HealthServer(settings.health_port, self.describe_trouble, self.describe_readiness, self._measure)

    def start(self) -> None:
        """Starts every thread; returns at once."""
        self._health.start()
        for thread in self._threads():
            thread.start()

    def stop(self) -> None:
        """Finishes the passes under way, gives the lease back, and ends what was started."""
        if self._is_stopped:
            return
        self._is_stopped = True
        self._queue.close()
        for watch in self._streams():
            watch.stop()
        for asker in self._askers():
            asker.stop()
        deadline = time.monotonic() + STOP_LIMIT_S
        for worker in filter(threading.Thread.is_alive, self._workers):
            worker.join(timeout=max(0.1, deadline - time.monotonic()))
        self._election.stop()
        if self._election.is_alive():
            self._election.join(timeout=10.0)
        self._health.stop()

    @property
    def health_port(self) -> int:
        """The port of the probes and metrics, also where the settings leave the choice to the kernel."""
        return self._health.port

    def describe_trouble(self) -> str:
        """Why this process should be restarted; empty if that would not help."""
        now = time.monotonic()
        dead = [f"thread {t.name} ended" for t in self._threads() if t.ident is not None and not t.is_alive()]
        stuck = [f"{w.name} hangs" for w in self._streams() if now - w.last_contact > WATCH_STUCK_S]
        _, oldest_s = self._queue.measure()
        if oldest_s > QUEUE_STUCK_S and self._election.is_held():
            stuck.append(f"queue waits {oldest_s:.0f} s")
        silence_s = now - self._cluster.last_answer
        if silence_s > CA_SILENCE_S and self._cluster.has_outdated_ca():
            stuck.append(f"the certificate authority's file changed, and nothing was answered for {silence_s:.0f} s")
        return ", ".join([*dead, *stuck])

    def describe_readiness(self) -> tuple[bool, str]:
        """Whether this replica could lead now, and what it lacks. A namespace that is gone is named, no more: the
        others are served."""
        silence = self._election.describe_silence()
        unwatched = self._find_unwatched()
        filling = [w.name for w in self._all_watches() if not w.is_synced.is_set() and not w.is_refused]
        lacks = [silence] if silence else []
        lacks += [f"not watched: {scope}: {why}" for scope, why in unwatched.items()]
        lacks += [f"{name} is filling its cache" for name in filling]
        if self._nodes is not None and self._nodes.is_refused:
            lacks.append(f"cordoned nodes are not seen: {self._nodes.trouble}")
        is_ready = not silence and not filling and len(unwatched) < len(self._watches)
        return is_ready, "\n".join(lacks) or "ok"

    def _threads(self) -> list[threading.Thread]:
        return [*self._streams(), self._election, *self._workers, *self._askers()]

    def _askers(self) -> list[LoadingEngines | MeasuredEngines]:
        return [self._measured] if self._loading is None else [self._measured, self._loading]

    def _streams(self) -> list[WatchStream]:
        nodes = [self._nodes] if self._nodes is not None else []
        return [*self._all_watches(), *self._warning_watches, *self._optional.values(), *nodes]

    def _all_watches(self) -> list[Watch]:
        return [watch for watches in self._watches.values() for watch in watches]

    def _make_watch(self, kind: str, scope: str | None) -> Watch:
        is_child = kind != KIND
        store = self._stores[kind] if is_child else self._deployments
        on_change = self._note_child if is_child else self._note_deployment
        return Watch(self._cluster, kind, scope, store, on_change, lambda: self._on_synced(scope))

    def _watch_optional(self, kind: str, scope: str | None) -> OptionalWatch:
        store, on_change, retry_s = self._stores[kind], self._note_child, self._settings.absent_retry_s
        return OptionalWatch(self._cluster, kind, scope, store, on_change, lambda: self._on_synced(scope), retry_s)

    def _see_kinds(self, namespace: str) -> dict[str, str]:
        """Each kind that the cluster need not have -> the way it is seen in a namespace."""
        return {kind: self._see_kind(kind, namespace) for kind in OPTIONAL_SELECTORS}

    def _see_kind(self, kind: str, namespace: str) -> str:
        watch = self._optional.get((kind, namespace)) or self._optional.get((kind, None))
        if watch is None or watch.is_refused:
            return NOT_ALLOWED
        return KNOWN if watch.is_synced.is_set() else UNKNOWN

    def _make_node_watch(self) -> CordonedNodes:
        return CordonedNodes(self._cluster, self._note_nodes, self._on_nodes_settled)

    def _on_nodes_settled(self) -> None:
        for scope in self._watches:
            self._on_synced(scope)

    def _find_cordoned(self) -> frozenset[str] | None:
        return self._nodes.find() if self._nodes is not None else None

    def _note_nodes(self, names: frozenset[str]) -> None:
        """Asks for a pass over every object that has a pod on one of these nodes."""
        for key in self._stores["Pod"].list_keys_of(lambda pod: pod["spec"].get("nodeName") in names):
            self._queue.add(key)

    def _note_deployment(self, key: Key, is_new: bool) -> None:
        """Asks for a pass. New objects may come by the thousand, and to make their children takes many writes, of
        which one waits: the API server gives addresses to Services one at a time. Changes of others go first."""
        self._queue.add(key, is_bulk=is_new)

    def _note_child(self, key: Key, is_new: bool) -> None:
        self._queue.add_after(key, CHILD_SETTLE_S)

    def _note_warning(self, key: Key) -> None:
        """Asks for a pass as time alone does: whoever may write Events calls for no more than one a second."""
        self._queue.add_timed(key, CHILD_SETTLE_S)

    def _note_figures(self, key: Key) -> None:
        """Asks for a pass as time alone does: several engines answer within a moment."""
        self._queue.add_timed(key, CHILD_SETTLE_S)

    def _on_synced(self, scope: str | None) -> None:
        """The passes dropped while not everything in the scope was seen are asked for."""
        if self._is_seen(scope):
            self._add_all(scope)

    def _on_restored(self) -> None:
        for watch in self._streams():
            watch.begin_anew()

    def _on_elected(self) -> None:
        self._add_all(None)

    def _add_all(self, scope: str | None) -> None:
        for key in self._deployments.list_keys(scope):
            self._queue.add(key, is_bulk=True)

    def _is_seen(self, scope: str | None) -> bool:
        """Whether every kind of a scope was listed, and may be watched now: a pass neither takes what is there for
        missing, nor pods for available of which nothing was heard since the right to see them is gone."""
        is_known = all(watch.is_answered for (_, place), watch in self._optional.items() if place == scope)
        is_known = is_known and (self._nodes is None or self._nodes.is_settled)
        return is_known and all(watch.is_synced.is_set() and not watch.is_refused for watch in self._watches[scope])

    def _find_unwatched(self) -> dict[str, str]:
        """Each scope that cannot be watched now -> the API server's words."""
        refused = {
            scope or "the cluster": next((w.trouble for w in watches if w.is_refused), "")
            for scope, watches in self._watches.items()
        }
        return {scope: why for scope, why in refused.items() if why}

    def _measure(self) -> None:
        depth, oldest_s = self._queue.measure()
        QUEUE_DEPTH.set(depth)
        QUEUE_OLDEST_SECONDS.set(oldest_s)
        IS_LEADER.set(1 if self._election.is_held() else 0)
        UNWATCHED_NAMESPACES.set(len(self._find_unwatched()))

    def _work(self) -> None:
        while (key := self._queue.get()) is not None:
            self._work_on(key)

    def _work_on(self, key: Key) -> None:
        """One pass. A key is dropped by a follower, and while not everything in its scope is seen: it is added again
        when this replica is elected, and when all is seen."""
        scope = key[0] if key[0] in self._watches else None
        if not self._election.is_held() or not self._is_seen(scope):
            self._queue.done(key)
            return
        result = "failed"
        try:
            with RECONCILE_SECONDS.time():
                requeue_s = self._reconciler.reconcile(key)
            self._queue.done(key)
            if requeue_s is not None:
                self._queue.add_timed(key, requeue_s)
            result = "done"
        except NotLeaderError:
            self._queue.done(key)
            result = "not_leader"
        except TransientError as error:
            delay_s = self._queue.retry(key, error.retry_after_s or 0.0)
            logger.info("object=%s/%s event=retry in_s=%.1f why=%r", *key, delay_s, str(error))
            result = "retried"
        except OperatorError as error:
            delay_s = self._queue.retry(key)
            logger.error("object=%s/%s event=failed in_s=%.1f error=%r", *key, delay_s, str(error))
        except Exception:
            delay_s = self._queue.retry(key)
            logger.exception("object=%s/%s event=defect in_s=%.1f", *key, delay_s)
        finally:
            RECONCILES.labels(result=result).inc()


def _list_optional_kinds(settings: Settings) -> tuple[str, ...]:
    """The kinds that are watched where the cluster has them."""
    monitors = (POD_MONITOR,) if settings.makes_pod_monitors else ()
    return (*monitors, INFERENCE_POOL, HTTP_ROUTE) if settings.makes_routes else monitors
