"""The manager's process: the only module here that does I/O.

Sleeps in `wait` until the server or a worker has something to say. Every rank of the replica gets the same steps; the
output rank, the first one of the last stage, sends their tokens.
"""

from __future__ import annotations

import gc
import logging
import time

import msgspec

from toka_engine.channel import Channel, broadcast, wait
from toka_engine.child import Child
from toka_engine.errors import MessageError
from toka_engine.manager.busy import BusyTime
from toka_engine.manager.core import Manager
from toka_engine.manager.sizes import agree_on, choose_sizes, engine_info
from toka_engine.messages import GrammarReady, ServerToManager, Tokens, WorkerReady, WorkerToManager
from toka_engine.portable import HeapKeeper
from toka_engine.topology import find_output_rank

STATS_INTERVAL_S = 0.25

GC_THRESHOLDS = (20_000, 20, 50)
"""Objects here are many and seldom in cycles: rare collections keep steps even."""

logger = logging.getLogger("toka.manager")


def make_collections_rare() -> None:
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


class Loop:
    """Moves messages between the links and the core."""

    def __init__(self, child: Child, server: Channel[ServerToManager], workers: list[Channel[WorkerToManager]]) -> None:
        self._child = child
        self._server = server
        self._workers = workers
        output = find_output_rank(child.start.rank)
        self._output = workers[output]
        self._samplers = workers[output:]
        """The ranks of the last stage."""
        self._config = child.start.config
        self._next_stats = 0.0
        self._next_report = 0.0
        self._is_reported = False  # so that /metrics has every figure before the first request
        self._busy_time = BusyTime()
        self._heap = HeapKeeper()
        self._manager = self._set_up()

    def run(self) -> None:
        """Serve until a peer goes away (PeerClosedError)."""
        while True:
            timeout_s = None if self._is_reported else max(0.0, self._next_stats - time.monotonic())
            readable = wait([self._server, *self._workers], timeout_s)
            with self._child.busy():
                self._turn(readable)

    def _set_up(self) -> Manager:
        """Wait for the workers, tell the server the limits."""
        self._child.progress("wait", "for the model workers")
        readies = [self._receive_ready(worker) for worker in self._workers]
        ready = agree_on(readies)
        sizes = choose_sizes(self._config, ready)
        manager = Manager(self._config, sizes, time.monotonic, len(self._samplers), ready.step_times)
        self._server.send(engine_info(sizes, ready))
        self._child.ready()
        logger.info(
            "event=ready pages=%d page_size=%d slots=%d max_running=%d max_tokens_per_forward=%d "
            "max_request_tokens=%d",
            sizes.num_pages, sizes.page_size, sizes.num_slots, sizes.max_running,
            sizes.max_tokens_per_forward, sizes.max_request_tokens,
        )  # fmt: skip
        make_collections_rare()
        return manager

    def _receive_ready(self, worker: Channel[WorkerToManager]) -> WorkerReady:
        message = worker.receive()[0]
        if not isinstance(message, WorkerReady):
            raise MessageError(f"expected WorkerReady, got {type(message).__name__}")
        return message

    def _turn(self, readable: list[Channel[ServerToManager]] | list[Channel[WorkerToManager]]) -> None:
        manager = self._manager
        outbox: list[msgspec.Struct] = []
        for worker in self._workers:
            if worker in readable:
                for tokens in worker.receive_ready():
                    if isinstance(tokens, GrammarReady):
                        outbox += manager.note_grammar(tokens)
                    elif worker is self._output and isinstance(tokens, Tokens):
                        self._busy_time.add_step(time.monotonic(), tokens.step_wall_s)
                        outbox += manager.receive(tokens)
        if self._server in readable:
            for request in self._server.receive_ready():
                outbox += manager.handle(request)
        for grammar in manager.take_grammars():
            broadcast(self._samplers, grammar)
        while step := manager.plan():
            broadcast(self._workers, step)
        if started := manager.take_started():
            self._server.send(started)  # before a token of theirs, which only a later turn can bring
        for message in outbox:
            self._server.send(message)
        self._report()

    def _report(self) -> None:
        """Send the totals at the start, a few times a second while there is work, and once more when it ends."""
        now = time.monotonic()
        self._heap.look(now)
        has_work = self._manager.has_work
        if now >= self._next_stats and (has_work or not self._is_reported):
            self._next_stats = now + STATS_INTERVAL_S
            stats = self._manager.stats(time.process_time(), self._busy_time.total_s)
            self._server.send(stats)
            if now >= self._next_report and self._config.stats_report_seconds > 0:
                self._next_report = now + self._config.stats_report_seconds
                logger.info(
                    "event=stats running=%d waiting=%d pages_used=%d pages_cached=%d steps=%d preemptions=%d",
                    stats.running, stats.waiting, stats.kv_pages_used, stats.kv_pages_cached,
                    stats.steps_total, stats.preemptions_total,
                )  # fmt: skip
            self._is_reported = not has_work
        elif has_work:
            self._is_reported = False


def main(child: Child, link_fds: list[int]) -> None:
    """Run the manager: link_fds are the server's link and those of the workers."""
    server: Channel[ServerToManager] = Channel.from_fd(link_fds[0], ServerToManager)
    workers: list[Channel[WorkerToManager]] = [Channel.from_fd(fd, WorkerToManager) for fd in link_fds[1:]]
    Loop(child, server, workers).run()
