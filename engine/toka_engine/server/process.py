"""The server process listens at once, serves when `EngineInfo` has come, drains, and fails with the others.

Owns: the life of the process, from the listening socket to `Drained`. Runs in one event loop; the control
thread only hands its messages over to it.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import resource
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from typing import Any

import msgspec
import uvicorn
import uvloop

from toka_engine.child import Child
from toka_engine.config import EngineConfig
from toka_engine.control_messages import Drained, Failing, Progress
from toka_engine.errors import PortInUseError
from toka_engine.messages import Deltas, EngineInfo, ManagerToServer, PromptLogprobs, Refused, Started, Stats
from toka_engine.portable import HeapKeeper
from toka_engine.server.application import KNOWN_PATHS, LIMITED_PATHS, generating_handlers, make_application
from toka_engine.server.batches.peers import Peers
from toka_engine.server.batches.service import Batches
from toka_engine.server.connection import ConnectionLimits, Connections, connection_factory
from toka_engine.server.cors import Origins
from toka_engine.server.engine import Folders, load, make_engine
from toka_engine.server.errors import unavailable
from toka_engine.server.front import Front
from toka_engine.server.generation_defaults import describe_defaults
from toka_engine.server.health import Health, Phase
from toka_engine.server.keys.check import KeyCheck
from toka_engine.server.keys.file import KEY_VARIABLE
from toka_engine.server.keys.reload import Keys
from toka_engine.server.large_requests import LargeRequests, Setup
from toka_engine.server.link import ManagerLink
from toka_engine.server.prefix_index import PrefixHasher
from toka_engine.server.replicas import Replicas
from toka_engine.server.service import Service
from toka_engine.server.statsd import StatsdReporter
from toka_engine.server.status_page.routes import page_router
from toka_engine.server.status_page.samples import LoadSamples
from toka_engine.server.streams import Streams
from toka_engine.server.tracing import make_tracing

logger = logging.getLogger("toka.server")

_BACKLOG = 2048
_KEEP_ALIVE_S = 65
"""Longer than usual clients keep idle connections, so that it is they who close them."""
_HEARTBEAT_S = 0.25
_ERROR_WRITE_S = 2.0
"""The time for writing the errors of streams that the drain has cut."""
_OTHER_FILES = 128
"""The number of file descriptors that are not connections."""


class Server:
    """The process: its parts, put together."""

    def __init__(self, child: Child, manager_fds: Sequence[int], listen_fd: int | None) -> None:
        """`manager_fds`: the links to the managers, by replica."""
        self._child = child
        self._listen_fd = listen_fd
        self._config = child.start.config
        self._num_needed = self._config.dp_min_size or self._config.dp_size
        self._health = Health()
        self._loop = asyncio.get_running_loop()
        self._links = [
            ManagerLink(fd, partial(self._on_message, index), partial(self._on_manager_gone, index))
            for index, fd in enumerate(manager_fds)
        ]
        hasher = PrefixHasher(self._config.page_size)
        self._block_tokens = hasher.block_tokens
        self._replicas = Replicas([link.send for link in self._links], hasher.block_tokens)
        has_choice = len(manager_fds) > 1 and self._config.use_prefix_cache
        self._streams = Streams(self._replicas, hasher if has_choice else None)
        names = model_names(self._config)
        self._service = Service(self._config, names, self._health, self._streams)
        self._keys = Keys(self._config.api_keys_file, os.environ.get(KEY_VARIABLE), LIMITED_PATHS)
        self._service.metrics.add(self._keys)
        self._samples = LoadSamples(self._replicas)
        self._front = self._make_front(self._keys.check)
        self._names = names
        self._connections = Connections()
        self._has_all_infos = asyncio.Event()
        self._drain_asked = asyncio.Event()
        child.on_drain = lambda: self._from_thread(self._drain_asked.set)
        child.on_failing = lambda message: self._from_thread(lambda: self._end(_reason(message)))
        child.on_replica_lost = lambda lost: self._from_thread(lambda: self._lose_replica(lost.replica, lost.reason))
        child.on_unresponsive = lambda process: self._from_thread(lambda: self._note_silence(process))
        child.on_rank_reports = lambda sent: self._from_thread(lambda: self._service.metrics.note_ranks(sent.ranks))
        child.on_progress = lambda message: self._from_thread(lambda: self._note_progress(message))

    def _make_front(self, key_check: KeyCheck) -> Front:
        handlers = generating_handlers(self._service)
        peers = Peers.read(os.environ, self._config.port) if self._config.data_dir else None
        self._batches = Batches(self._config, handlers, self._service.metrics, peers)
        self._tracing = make_tracing()
        further = []
        if self._config.status_page:
            further.append(page_router(self._service, key_check, self._batches, self._samples))
        application = make_application(self._service, key_check, handlers, self._batches, further)
        return Front(
            application,
            fast_paths=handlers if self._config.http_fast_path else {},
            known_paths=KNOWN_PATHS,
            key_check=key_check,
            origins=Origins(self._config.cors_origins),
            metrics=self._service.metrics,
            logs_requests=self._config.access_log,
            tracing=self._tracing,
        )

    def _from_thread(self, action: Callable[[], None]) -> None:
        call_from_thread(self._loop, action)

    async def run(self) -> None:
        """Serve until drained. Raises PortInUseError, ModelInvalidError."""
        listener = await self._listen()
        drain = asyncio.create_task(self._drain(listener))
        others: tuple[Coroutine[Any, Any, None], ...] = (
            self._start(),
            *(link.run() for link in self._links),
            self._beat(),
            self._batches.run(),
            self._keys.run(),
            *self._make_reporters(),
        )
        running = {drain, *map(asyncio.create_task, others)}
        while not drain.done():
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # whatever ends one of them in error ends the process

    def _make_reporters(self) -> Iterator[Coroutine[Any, Any, None]]:
        address, interval_s = self._config.statsd_addr, self._config.stats_report_seconds
        if address is not None:
            yield StatsdReporter(address, interval_s, self._replicas, lambda: self._streams.num_generations).run()
        if self._config.status_page:
            yield self._samples.run()

    async def _beat(self) -> None:
        """Mark the loop as busy since its last turn, so that a loop that hangs shows as a turn that never
        ends.
        """
        heap = HeapKeeper()
        while True:
            heap.look(time.monotonic())
            with self._child.busy():
                await asyncio.sleep(_HEARTBEAT_S)

    async def _listen(self) -> asyncio.Server:
        config = self._config
        http_config = uvicorn.Config(
            self._front,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level=config.uvicorn_log_level,
            access_log=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
        )
        limits = ConnectionLimits(
            config.receive_timeout_s, config.send_timeout_s, config.max_connections, config.access_log
        )
        factory = connection_factory(http_config, self._connections, limits)
        try:
            if self._listen_fd is not None:
                sock = socket.socket(fileno=self._listen_fd)
                if sock.family == socket.AF_UNIX:
                    listener = await self._loop.create_unix_server(factory, sock=sock, backlog=_BACKLOG)
                else:
                    listener = await self._loop.create_server(factory, sock=sock, backlog=_BACKLOG)
            else:
                listener = await self._loop.create_server(factory, config.host, config.port, backlog=_BACKLOG)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise PortInUseError(f"port {config.port} is in use") from error
        logger.info("event=listening host=%s port=%d", config.host, config.port)
        return listener

    async def _start(self) -> None:
        self._child.progress("load", "tokenizer")
        folders = Folders(self._child.start.model_dir, self._child.start.tokenizer_dir)
        loaded = await self._loop.run_in_executor(None, load, self._config, folders)
        self._health.detail = "waiting for the model"
        self._child.progress("wait", "for the manager")
        await self._has_all_infos.wait()
        info = merge_infos([replica.info for replica in self._replicas.all if replica.info])
        engine = make_engine(self._config, self._names, info, folders, loaded)
        logger.info(
            "event=dialect tool_format=%s reasoning=%s", engine.dialect.tools.name, engine.dialect.has_reasoning
        )
        limits = engine.limits
        stated = " ".join(f"{name}={value:g}" for name, value in describe_defaults(limits.defaults).items())
        source = "model" if loaded.defaults.values() else "none"
        logger.info("event=sampling_defaults generation_config=%s %s", source, stated)
        self._service.metrics.info = info
        self._service.engine = engine
        setup = Setup(self._config, self._names, info, folders)
        self._service.large_requests = LargeRequests(setup, self._service.budget)
        gc.collect()
        gc.freeze()  # what has lived until here lives on: the collector need not look at it again
        self._health.move(Phase.SERVING)
        self._child.ready()
        self._batches.begin_serving(info.max_streams)
        logger.info("event=serving model=%s max_request_tokens=%d", self._names[0], limits.max_request_tokens)

    # ------------------------------------------------------------ the manager

    def _on_message(self, index: int, message: ManagerToServer) -> None:
        replica = self._replicas.all[index]
        match message:
            case Deltas():
                self._streams.on_deltas(replica, message)
            case PromptLogprobs():
                self._streams.on_prompt_logprobs(message)
            case Refused():
                self._streams.on_refused(message)
            case Started():
                self._streams.on_started(message)
            case Stats():
                replica.stats = message
            case EngineInfo():
                replica.info = message
                replica.prefixes.max_blocks = message.num_kv_tokens // self._block_tokens
                if all(one.info for one in self._replicas.all):
                    self._has_all_infos.set()

    def _on_manager_gone(self, index: int) -> None:
        # The supervisor, which sees that a process has ended, says the same a moment earlier or later, and why.
        if self._replicas.all[index].is_lost:
            return
        if self._health.phase is Phase.STARTING or len(self._replicas.live) <= self._num_needed:
            self._fail("a manager process is gone")
        else:
            self._lose_replica(index, "its manager process is gone")

    def _lose_replica(self, index: int, reason: str) -> None:
        replica = self._replicas.all[index]
        if replica.is_lost:
            return
        replica.is_lost = True
        logger.error("event=replica_lost replica=%d left=%d reason=%r", index, len(self._replicas.live), reason)
        self._streams.fail_replica(replica, unavailable(f"The replica that ran this request has failed: {reason}."))

    def _end(self, reason: str) -> None:
        """Answer every request with `reason`, then report that the engine may end."""
        self._fail(reason)
        self._ending = self._loop.create_task(self._finish_answers())

    async def _finish_answers(self) -> None:
        await self._front.wait_idle()
        await self._batches.close()
        self._child.send(Drained())

    def _fail(self, reason: str) -> None:
        logger.error("event=failing reason=%r", reason)
        self._health.move(Phase.FAILING, reason)
        self._streams.fail_all(unavailable(f"The engine has failed: {reason}."))

    def _note_silence(self, process: str) -> None:
        self._health.silent_process = process

    def _note_progress(self, message: Progress) -> None:
        if self._health.phase is Phase.STARTING:
            self._health.detail = " ".join(part for part in (message.process, message.phase, message.detail) if part)

    # ------------------------------------------------------------ the end

    async def _drain(self, listener: asyncio.Server) -> None:
        """Wait for the supervisor's order, then stop being ready, refuse requests, close, and report `Drained`."""
        await self._drain_asked.wait()
        logger.info("event=draining requests=%d", self._streams.num_generations)
        self._connections.default_headers.append((b"connection", b"close"))
        self._batches.stop_feeding()
        if self._health.phase is Phase.SERVING:
            self._health.move(Phase.DRAINING)
            await asyncio.sleep(self._config.drain_endpoint_delay_s)
        self._health.move(Phase.REFUSING, "shutting down")
        try:
            async with asyncio.timeout(self._config.drain_timeout_s):
                await self._front.wait_idle()
                await self._batches.wait_idle()
        except TimeoutError:
            logger.warning("event=drain_timed_out requests=%d", self._streams.num_generations)
            self._streams.fail_all(unavailable("The engine is shutting down."))
        await self._batches.close()
        listener.close()
        try:
            await asyncio.wait_for(self._connections.close_all(), _ERROR_WRITE_S)
        except TimeoutError:
            logger.warning("event=connections_left_unread count=%d", len(self._connections.connections))
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.flush)
        self._child.send(Drained())
        logger.info("event=drained")


def call_from_thread(loop: asyncio.AbstractEventLoop, action: Callable[[], None]) -> None:
    """Have `loop` call `action`; nothing happens once it is closed: a message may come when the server has ended."""
    try:
        loop.call_soon_threadsafe(action)
    except RuntimeError:
        if not loop.is_closed():
            raise


def model_names(config: EngineConfig) -> tuple[str, ...]:
    """The names that requests may give, the first one being the main one."""
    name = config.served_model_name or config.model.rstrip("/").rpartition("/")[2]
    return tuple(dict.fromkeys((name, *config.model_aliases)))


def merge_infos(infos: Sequence[EngineInfo]) -> EngineInfo:
    """Return what all replicas together allow: a request must fit any of them, capacities add up."""
    if len(infos) == 1:
        return infos[0]
    return msgspec.structs.replace(
        infos[0],
        vocab_size=min(info.vocab_size for info in infos),
        max_request_tokens=min(min(info.max_request_tokens, info.num_kv_tokens) for info in infos),
        num_kv_tokens=sum(info.num_kv_tokens for info in infos),
        max_streams=sum(info.max_streams for info in infos),
    )


def _reason(message: Failing) -> str:
    names_it = message.reason.startswith((f"{message.process} ", f"{message.process}:"))
    return message.reason if names_it else f"{message.process}: {message.reason}"


def _allow_connections(wanted: int) -> None:
    """Raise the soft limit of open files, which is 1,024 in many places, towards one per connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = wanted + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < enough:
        limit = enough if hard == resource.RLIM_INFINITY else min(enough, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        if limit < enough:
            logger.warning("event=few_file_descriptors limit=%d max_connections=%d", limit, wanted)


def main(child: Child, link_fds: list[int]) -> None:
    """Entry of the process, for `run_child`: the links to the managers, and the socket that listens already.

    Without that socket it binds the port itself.
    """

    num_replicas = child.start.config.dp_size
    _allow_connections(child.start.config.max_connections)

    async def run() -> None:
        manager_fds, listen_fd = link_fds[:num_replicas], link_fds[num_replicas:]
        await Server(child, manager_fds, listen_fd[0] if listen_fd else None).run()

    uvloop.run(run())
