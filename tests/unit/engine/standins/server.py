"""Stand-in for the server: it logs what the supervisor tells it, and serves nothing."""

import logging
import os

from toka_engine.child import Child, run_child
from toka_engine.control_messages import Drained, Failing, Progress, RankReports, ReplicaLost

from tests.unit.engine.standins.behaviour import behave

log = logging.getLogger(__name__)


def main(child: Child, link_fds: list[int]) -> None:
    def drain() -> None:
        log.info("event=told what=drain")
        if os.environ.get("TOKA_TEST_DRAIN") != "never":
            child.send(Drained())

    def failing(message: Failing) -> None:
        log.info("event=told what=failing process=%s", message.process)
        child.send(Drained())

    def silent(process: str) -> None:
        log.info("event=told what=silent process=%s", process or "none")

    def progress(message: Progress) -> None:
        log.info("event=told what=progress process=%s phase=%s", message.process, message.phase)

    def replica_lost(message: ReplicaLost) -> None:
        log.info("event=told what=replica_lost replica=%d reason=%r", message.replica, message.reason)

    def rank_reports(message: RankReports) -> None:
        for report in message.ranks:
            place, steps, memory = report.rank, report.num_steps, report.memory_bytes > 1 << 20
            log.info("event=told what=rank dp=%d tp=%d steps=%d memory=%s", place.dp_rank, place.tp_rank, steps, memory)

    child.on_rank_reports = rank_reports
    child.on_drain = drain
    child.on_replica_lost = replica_lost
    child.on_failing = failing
    child.on_unresponsive = silent
    child.on_progress = progress
    behave(child, link_fds[:1])


run_child("server", main)
