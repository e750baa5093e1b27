"""The operator's Prometheus metrics. Owns their names; measures nothing itself."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

RECONCILES = Counter("toka_operator_reconciles_total", "Passes over one TokaDeployment.", ["result"])
RECONCILE_SECONDS = Histogram("toka_operator_reconcile_seconds", "Time of one pass, writes included.")
WRITES = Counter("toka_operator_writes_total", "Writes to the API server.", ["kind", "verb"])
WATCH_RESTARTS = Counter("toka_operator_watch_restarts_total", "Watches begun anew.", ["kind", "cause"])
QUEUE_DEPTH = Gauge("toka_operator_queue_depth", "Keys waiting or worked on.")
QUEUE_OLDEST_SECONDS = Gauge("toka_operator_queue_oldest_seconds", "How long the oldest waiting key has waited.")
IS_LEADER = Gauge("toka_operator_is_leader", "1 while this replica holds the Lease.")
UNWATCHED_NAMESPACES = Gauge(
    "toka_operator_unwatched_namespaces", "Namespaces that cannot be watched: gone, or without a Role."
)
