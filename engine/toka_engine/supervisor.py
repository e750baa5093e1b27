"""The engine's first process: it starts the others, watches them, drains, and decides the exit code.

Order: take the port, have the model's files resolved, then start server, manager and model worker, joined by inherited
socket pairs. Afterwards it only waits for events: messages, ended processes, signals, and a heartbeat every 250 ms.
Whatever happens first decides the end: a child's death or silence, or SIGTERM. It loads neither torch nor the web
framework, and it never touches a request.

SIGTERM or SIGINT: before the engine is ready it ends at once with code 0 (nothing is being served); afterwards the
server drains and the code is 0. A second one ends it at once, also with 0: the operator of the process asked for it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import msgspec

from toka_engine import resolve
from toka_engine.channel import socket_pair
from toka_engine.config import EngineConfig
from toka_engine.control_messages import (
    ChildReady,
    Drain,
    Drained,
    Failed,
    Failing,
    FromChild,
    Pong,
    Progress,
    RankReports,
    ReplicaLost,
    Resolved,
    Start,
    Unresponsive,
)
from toka_engine.errors import REASONS, ExitCode
from toka_engine.heartbeat import Heartbeat
from toka_engine.noise import for_replica, settle_seed
from toka_engine.processes import PING_INTERVAL_S, ChildProcess, count_oom_kills, reap
from toka_engine.rendezvous import Rendezvous
from toka_engine.signals import SignalFd
from toka_engine.topology import RESOLVER, SERVER, Process, Role, choose_topology

logger = logging.getLogger("toka.supervisor")

MODULES: Mapping[str, str] = {
    Role.RESOLVE: "toka_engine.resolve",
    Role.SERVER: "toka_engine.server",
    Role.MANAGER: "toka_engine.manager",
    Role.MODEL: "toka_engine.model",
}
"""The module that the processes of a role run."""

_FAILING_GRACE_S = 1.0
"""For the server to answer waiting requests with 503 before everything is killed."""
_BLAME_GRACE_S = 0.2
"""Seconds to wait for the first cause when only a consequence is known."""
_DRAIN_MARGIN_S = 5.0
_KILL_TIMEOUT_S = 0.5


class Phase(Enum):
    STARTING = auto()
    READY = auto()
    DRAINING = auto()
    FAILING = auto()


@dataclass(frozen=True, slots=True)
class Outcome:
    """The way the engine ends."""

    code: ExitCode
    words: str = ""


class Supervisor:
    """Runs one engine. Use: `Supervisor(config, listener).run()`."""

    def __init__(
        self,
        config: EngineConfig,
        listener: socket.socket,
        modules: Mapping[str, str] = MODULES,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = settle_seed(config)
        self._is_seed_given = config.seed is not None
        self._listener = listener
        self._on_ready = on_ready
        self._modules = modules
        self._children: dict[str, ChildProcess] = {}
        self._phase = Phase.STARTING
        self._outcome: Outcome | None = None
        self._failures: list[tuple[bool, Outcome]] = []
        """(is a consequence of another, how it would end the engine), in order of arrival."""
        self._deadline: float | None = None
        self._heartbeat = Heartbeat()
        self._started_at = time.monotonic()
        self._num_oom_kills = count_oom_kills()
        self._rendezvous: Rendezvous | None = None
        self._num_replicas = self._config.dp_size
        self._suspects: dict[int, tuple[float, Outcome]] = {}
        """By replica that is lost for a cause not known yet: until when it is waited for, and the consequence seen."""

    def run(self) -> Outcome:
        """Run the engine to its end; afterwards none of its processes is left."""
        with SignalFd(signal.SIGTERM, signal.SIGINT, signal.SIGCHLD) as signals:
            try:
                # A run whose seed was drawn can be had again with this one.
                logger.info("event=seed value=%d given=%s", self._config.seed, "T" if self._is_seed_given else "F")
                self._resolve()
                next_beat = time.monotonic() + PING_INTERVAL_S
                while self._outcome is None:
                    self._wait(signals, next_beat)
                    for signum in signals.take():
                        self._handle_signal(signum)
                    self._receive()
                    self._note_deaths()
                    if time.monotonic() >= next_beat:
                        next_beat = time.monotonic() + PING_INTERVAL_S
                        self._beat()
                    self._check_deadlines()
                return self._outcome
            finally:
                self._kill_all(signals)
                self._end_rendezvous()

    # ------------------------------------------------------------ events

    def _wait(self, signals: SignalFd, until: float) -> None:
        poller = select.poll()
        poller.register(signals.fileno(), select.POLLIN)
        for child in self._children.values():
            if child.is_linked:
                poller.register(child.control.fileno(), select.POLLIN)
        deadlines = [deadline for deadline, _ in self._suspects.values()]
        until = min(until, self._deadline or math.inf, *deadlines)
        poller.poll(max(0.0, until - time.monotonic()) * 1e3)

    def _handle_signal(self, signum: int) -> None:
        if signum == signal.SIGCHLD:
            return  # `_note_deaths` looks at every child anyway
        name = signal.Signals(signum).name
        match self._phase:
            case Phase.STARTING:
                logger.info("event=stop signal=%s while=starting", name)
                self._outcome = Outcome(ExitCode.OK)
            case Phase.READY:
                logger.info("event=drain signal=%s", name)
                self._phase = Phase.DRAINING
                limit_s = self._config.drain_endpoint_delay_s + self._config.drain_timeout_s + _DRAIN_MARGIN_S
                self._deadline = time.monotonic() + limit_s
                self._children[SERVER.name].send(Drain())
            case Phase.DRAINING:
                logger.warning("event=stop signal=%s while=draining", name)
                self._outcome = Outcome(ExitCode.OK)
            case Phase.FAILING:
                logger.info("event=ignored signal=%s while=failing", name)

    def _receive(self) -> None:
        for child in list(self._children.values()):
            for message in child.receive():
                self._handle(child, message)

    def _handle(self, child: ChildProcess, message: FromChild) -> None:
        match message:
            case Progress(phase, detail):
                logger.info("event=progress process=%s phase=%s detail=%r", child.name, phase, detail)
                self._tell_server(Progress(phase, detail, child.name))
            case Resolved(model_dir, tokenizer_dir):
                self._start_engine(Start(self._config, model_dir, tokenizer_dir))
            case ChildReady():
                if self._phase is Phase.STARTING and all(one.is_ready for one in self._children.values()):
                    self._become_ready()
            case Drained():
                if self._phase is Phase.DRAINING:
                    self._outcome = Outcome(ExitCode.OK)
                elif self._phase is Phase.FAILING:
                    self._deadline = min(self._deadline or math.inf, time.monotonic() + _BLAME_GRACE_S)
            case Failed(exit_code, words, is_consequence):
                self._fail(child, Outcome(ExitCode(exit_code), words), is_consequence)
            case Pong():
                pass  # taken in by ChildProcess

    def _become_ready(self) -> None:
        self._phase = Phase.READY
        self._end_rendezvous()
        for child in self._children.values():
            child.forget_silence()  # it might be as long as only a start may have it
        seconds = time.monotonic() - self._started_at
        logger.info("event=ready seconds=%.1f port=%d", seconds, self._config.port)
        self._on_ready()

    def _note_deaths(self) -> None:
        statuses = reap()
        for child in self._children.values():
            child.status = statuses.get(child.pid, child.status)
        for child in list(self._children.values()):
            if child.is_running and child.is_linked:
                continue
            if child.is_given_up:
                if not child.is_running:
                    self._remove(child)
                continue
            for message in child.receive():  # what came with the end
                self._handle(child, message)
            if self._children.get(child.name) is not child:
                continue  # its work was done
            if not child.is_running:
                self._remove(child)
                self._fail(child, self._outcome_of_death(child), child.is_end_a_consequence)
            elif self._phase is not Phase.FAILING:
                # The link ended first; SIGCHLD follows at once and says how.
                self._fail(child, Outcome(ExitCode.PROCESS_DIED, child.describe_end()), is_consequence=True)

    def _beat(self) -> None:
        if self._phase is Phase.FAILING:
            return
        children = [child for child in self._children.values() if not child.is_given_up]
        was_silent, is_starting = self._heartbeat.silent_process, self._phase is Phase.STARTING
        if stuck := self._heartbeat.beat(children, is_starting):
            self._fail(stuck.child, Outcome(ExitCode.PROCESS_STALLED, stuck.words))
            return
        if (silent := self._heartbeat.silent_process) != was_silent:
            logger.warning("event=%s process=%s", "silent" if silent else "answering", silent or "all")
            self._tell_server(Unresponsive(silent))
        if not is_starting and (reports := self._heartbeat.make_reports(children)):
            self._tell_server(RankReports(reports))

    def _check_deadlines(self) -> None:
        for number, (deadline, outcome) in list(self._suspects.items()):
            if time.monotonic() >= deadline:
                self._lose_replica(number, outcome)
        if self._outcome is not None or self._deadline is None or time.monotonic() < self._deadline:
            return
        if self._phase is Phase.FAILING:
            self._outcome = self._first_cause()
        else:
            logger.warning("event=drain_timeout")
            self._outcome = Outcome(ExitCode.OK)

    # ------------------------------------------------------------ actions

    def _spawn(self, process: Process, start: Start, link_fds: Sequence[int] = ()) -> None:
        child = ChildProcess(process, self._modules[process.role], start, link_fds)
        self._children[process.name] = child
        logger.info("event=started process=%s pid=%d", process.name, child.pid)

    def _resolve(self) -> None:
        """Find the model's files: here where they are local folders, else in a process that may take its time."""
        if resolved := resolve.find_local(self._config):
            self._start_engine(Start(self._config, resolved.model_dir, resolved.tokenizer_dir))
        else:
            with self._listener.dup() as listener:
                self._spawn(RESOLVER, Start(self._config, "", ""), [listener.fileno()])

    def _start_engine(self, start: Start) -> None:
        if RESOLVER.name in self._children:
            self._remove(self._children[RESOLVER.name])
        os.environ.pop("HF_TOKEN", None)  # nobody needs it any more
        topology = choose_topology(self._config)
        if any(process.rank.tp_size > 1 for process in topology.processes):
            self._rendezvous = Rendezvous()
            start = msgspec.structs.replace(start, rendezvous=self._rendezvous.folder)
        link_fds: dict[str, list[int]] = {process.name: [] for process in topology.processes}
        with contextlib.ExitStack() as ends:
            pairs = [socket_pair() for _ in topology.links]
            for link, (_, second) in zip(topology.links, pairs, strict=True):
                link_fds[link.second].append(ends.enter_context(second).fileno())
            for link, (first, _) in zip(topology.links, pairs, strict=True):
                link_fds[link.first].append(ends.enter_context(first).fileno())
            link_fds[SERVER.name].append(ends.enter_context(self._listener).fileno())
            for process in topology.processes:
                own = msgspec.structs.replace(start, config=for_replica(self._config, process.rank.dp_rank))
                self._spawn(process, own, link_fds[process.name])

    def _end_rendezvous(self) -> None:
        if self._rendezvous is not None:
            self._rendezvous.remove()

    def _remove(self, child: ChildProcess) -> None:
        child.control.close()
        del self._children[child.name]

    def _fail(self, child: ChildProcess, outcome: Outcome, is_consequence: bool = False) -> None:
        """Note a cause of the end. The first one tells the server and starts the short way out."""
        if child.is_given_up:
            return
        if self._can_go_on_without(child):
            if is_consequence:  # the process to blame may be slow to go: a GPU's driver closes first
                self._suspects.setdefault(child.rank.dp_rank, (time.monotonic() + _BLAME_GRACE_S, outcome))
            else:
                self._lose_replica(child.rank.dp_rank, outcome)
            return
        self._failures.append((is_consequence, outcome))
        if self._phase is Phase.FAILING:
            return
        logger.error("event=failing process=%s reason=%s message=%r", child.name, REASONS[outcome.code], outcome.words)
        was_serving = self._phase in (Phase.READY, Phase.DRAINING)
        self._phase = Phase.FAILING
        self._suspects.clear()
        server = self._children.get(SERVER.name)
        is_answering = was_serving and server is not None and server is not child
        self._deadline = time.monotonic() + (_FAILING_GRACE_S if is_answering else _BLAME_GRACE_S)
        self._tell_server(Failing(child.name, outcome.words))

    def _can_go_on_without(self, child: ChildProcess) -> bool:
        """Whether enough replicas serve if that of `child` is lost, and those that are as good as lost."""
        num_needed = self._config.dp_min_size or self._config.dp_size
        is_serving = self._phase in (Phase.READY, Phase.DRAINING)
        lost = {child.rank.dp_rank, *self._suspects}
        return is_serving and child.role in (Role.MANAGER, Role.MODEL) and self._num_replicas - len(lost) >= num_needed

    def _lose_replica(self, number: int, outcome: Outcome) -> None:
        """End what is left of a replica; the engine goes on with the others."""
        self._num_replicas -= 1
        self._suspects.pop(number, None)
        logger.error(
            "event=replica_lost replica=%d left=%d reason=%s message=%r",
            number, self._num_replicas, REASONS[outcome.code], outcome.words,
        )  # fmt: skip
        for child in self._children.values():
            if child.role in (Role.MANAGER, Role.MODEL) and child.rank.dp_rank == number:
                child.is_given_up = True
                child.kill()
        self._num_oom_kills = count_oom_kills()  # what it may have been killed for explains no later death
        self._tell_server(ReplicaLost(number, outcome.words))

    def _tell_server(self, message: Progress | Unresponsive | Failing | ReplicaLost | RankReports) -> None:
        server = self._children.get(SERVER.name)
        if server is not None:
            server.send(message)

    def _outcome_of_death(self, child: ChildProcess) -> Outcome:
        if child.exit_message:
            return Outcome(ExitCode(child.exit_message.exit_code), child.exit_message.message)
        if child.was_killed and count_oom_kills() > self._num_oom_kills:
            return Outcome(ExitCode.OUT_OF_MEMORY, f"{child.name} was killed for memory by the kernel")
        return Outcome(ExitCode.PROCESS_DIED, child.describe_end())

    def _first_cause(self) -> Outcome:
        """The first failure that no other one explains; else the first."""
        return min(self._failures, key=lambda failure: failure[0])[1]

    def _kill_all(self, signals: SignalFd) -> None:
        """End every child and reap it, without waiting for one that the kernel cannot end now."""
        for child in self._children.values():
            child.kill()
        deadline = time.monotonic() + _KILL_TIMEOUT_S
        while (remaining := [c for c in self._children.values() if c.is_running]) and time.monotonic() < deadline:
            poller = select.poll()
            poller.register(signals.fileno(), select.POLLIN)
            poller.poll((deadline - time.monotonic()) * 1e3)
            signals.take()
            statuses = reap()
            for child in remaining:
                child.status = statuses.get(child.pid, child.status)
