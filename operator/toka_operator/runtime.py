"""The running operator: threads around the queue, the watches, the lease and the health port.

Owns: starting and stopping every thread, and what becomes of a failed pass. Knows nothing of kopf;
`handlers` feeds it TokaDeployments and `main` starts it.
"""

from __future__ import annotations

import logging
import threading
import time

from toka_operator.cluster import Cluster, connect
from toka_operator.errors import ApiError, NotLeaderError, OperatorError, TransientError
from toka_operator.fields import Json
from toka_operator.health import HealthServer
from toka_operator.lease import Election
from toka_operator.metrics import IS_LEADER, QUEUE_DEPTH, QUEUE_OLDEST_SECONDS, RECONCILE_SECONDS, RECONCILES
from toka_operator.reconcile import Reconciler
from toka_operator.settings import KIND, Settings
from toka_operator.store import Key, Store
from toka_operator.watches import SELECTORS, Watch, make_stores
from toka_operator.workqueue import WorkQueue

logger = logging.getLogger("toka.operator")

WATCH_SILENCE_S = 660.0
"""Two watch timeouts and some: a watch without any contact for so long is stuck."""
QUEUE_STUCK_S = 600.0
CHILD_SETTLE_S = 0.4
"""Children change in bursts (a pod is bound, starts, gets an endpoint): one pass and one status for a
burst."""
GAP_SETTLE_S = 2.0
"""After a broken connection: how long other watches may notice it too, before names are compared once."""


class Runtime:
    """Everything between kopf's events and the API server's writes."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._queue: WorkQueue[Key] = WorkQueue(max_bulk_workers=max(1, settings.num_workers // 2))
        self._deployments = Store(lambda obj: (obj["metadata"].get("namespace", ""), obj["metadata"]["name"]))
        self._stores = make_stores()
        self._election = Election(settings, self._on_elected)
        num_watches = len(SELECTORS) * max(1, len(settings.watch_namespaces))
        self._cluster: Cluster = connect(settings.num_workers + num_watches + 4, self._election.is_held)
        self._election.connect(self._cluster)
        self._gap = threading.Event()
        self._reconciler = Reconciler(self._cluster, self._deployments, self._stores, settings)
        self._watches = [
            Watch(self._cluster, kind, namespace, self._stores[kind], self._note_child, self._gap.set)
            for kind in SELECTORS
            for namespace in settings.watch_namespaces or (None,)
        ]
        self._workers = [
            threading.Thread(target=self._work, name=f"worker-{n}", daemon=True) for n in range(settings.num_workers)
        ]
        self._stopping = threading.Event()
        self._names_thread = threading.Thread(target=self._compare_names_forever, name="names", daemon=True)
        self._health = HealthServer(settings.health_port, self.describe_trouble, self.is_ready, self._measure)

    def start(self) -> None:
        """Starts every thread; returns at once."""
        threads: list[threading.Thread] = [*self._watches, self._election, self._names_thread, *self._workers]
        for thread in threads:
            thread.start()

    def wait_for_resource(self) -> None:
        """Blocks until the API server serves TokaDeployments: kopf looks only once, when it starts.

        The health port is open meanwhile: to restart would not help.
        """
        self._health.start()
        delay_s = 0.5
        namespace = next(iter(self._settings.watch_namespaces), None)
        while True:
            try:
                self._cluster.list_identities(KIND, namespace)
                return
            except (ApiError, TransientError) as error:
                logger.warning("event=waiting_for_resource kind=%s retry_s=%.1f error=%r", KIND, delay_s, str(error))
            if self._stopping.wait(delay_s):
                return
            delay_s = min(10.0, delay_s * 2)

    def stop(self) -> None:
        """Finishes the passes under way, gives the lease back, and ends what was started."""
        self._stopping.set()
        self._gap.set()
        self._queue.close()
        for watch in self._watches:
            watch.stop()
        for worker in filter(threading.Thread.is_alive, self._workers):
            worker.join(timeout=10.0)
        self._election.stop()
        if self._election.is_alive():
            self._election.join(timeout=10.0)
        self._health.stop()

    def note(self, event_type: str | None, obj: Json) -> None:
        """Takes in one TokaDeployment as kopf saw it; `event_type` None is the initial listing.

        New objects may come by the thousand, and to make their children takes many writes, of which one waits: the
        API server gives addresses to Services one at a time. What becomes of those that have theirs is told meanwhile.
        """
        change = self._deployments.remove if event_type == "DELETED" else self._deployments.put
        for key in change(obj):
            self._queue.add(key, is_bulk=event_type in (None, "ADDED"))

    def is_ready(self) -> bool:
        """Whether every cache is filled, so that this replica could lead."""
        return all(watch.is_synced.is_set() for watch in self._watches)

    def describe_trouble(self) -> str:
        """Why this process should be restarted; empty if it should not."""
        now = time.monotonic()
        threads: list[threading.Thread] = [*self._watches, self._election, self._names_thread, *self._workers]
        dead = [t.name for t in threads if t.ident is not None and not t.is_alive()]
        silent = [w.name for w in self._watches if now - w.last_contact > WATCH_SILENCE_S]
        _, oldest_s = self._queue.measure()
        stuck = [f"queue waits {oldest_s:.0f} s"] if oldest_s > QUEUE_STUCK_S and self._election.is_held() else []
        return ", ".join([f"thread {n} ended" for n in dead] + [f"{n} is silent" for n in silent] + stuck)

    def _note_child(self, key: Key) -> None:
        self._queue.add_after(key, CHILD_SETTLE_S)

    def _on_elected(self) -> None:
        for key in self._deployments.list_keys():
            self._queue.add(key, is_bulk=True)

    def _measure(self) -> None:
        depth, oldest_s = self._queue.measure()
        QUEUE_DEPTH.set(depth)
        QUEUE_OLDEST_SECONDS.set(oldest_s)
        IS_LEADER.set(1 if self._election.is_held() else 0)

    def _work(self) -> None:
        for watch in self._watches:
            while not watch.is_synced.wait(timeout=1.0):
                if self._stopping.is_set():
                    return
        while (key := self._queue.get()) is not None:
            self._work_on(key)

    def _work_on(self, key: Key) -> None:
        """One pass. A follower drops the key: it is added again when this replica is elected."""
        if not self._election.is_held():
            self._queue.done(key)
            return
        result = "failed"
        try:
            with RECONCILE_SECONDS.time():
                requeue_s = self._reconciler.reconcile(key)
            self._queue.done(key)
            if requeue_s is not None:
                self._queue.add_after(key, requeue_s)
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

    def _compare_names_forever(self) -> None:
        """Every ten minutes and after each gap: kopf lists again silently, and never tells what vanished."""
        while not self._stopping.is_set():
            if self._gap.wait(timeout=self._settings.names_check_s):
                self._stopping.wait(GAP_SETTLE_S)
            self._gap.clear()
            if self._stopping.is_set():
                return
            try:
                for namespace in self._settings.watch_namespaces or (None,):
                    self._compare_names(namespace)
            except (ApiError, TransientError) as error:
                logger.info("event=names_not_compared why=%r", str(error))
                self._stopping.wait(5.0)
                self._gap.set()

    def _compare_names(self, namespace: str | None) -> None:
        known = {k for k in self._deployments.list_keys() if namespace in (None, k[0])}
        listed = self._cluster.list_identities(KIND, namespace)
        for key in known - set(listed):
            logger.info("object=%s/%s event=vanished", *key)
            self._deployments.forget(key)
            self._queue.add(key)
        for key, uid in listed.items():
            found = self._deployments.get(key)
            if found is None or found["metadata"]["uid"] != uid:
                self.note("MODIFIED", self._cluster.read(KIND, *key))
