"""An engine of a benchmark's own: `toka` as a process, its readiness, what its /metrics say. Knows no workload."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import aiohttp

_READY_TIMEOUT_S = 600.0
_REPORT_S = 0.4
"""Longer than the manager takes from one report to the next."""
_IDLE_TIMEOUT_S = 60.0
_HELD = ("toka_running", "toka_waiting", "toka_kv_pages_used", "toka_requests_running")
_PEAK_PERIOD_S = 0.1


def measure_machine(settings: Sequence[str]) -> dict[str, Any]:
    """The report of `machine` for an engine with these settings. Raises SystemExit with its exit code."""
    command = [sys.executable, "-m", "toka_engine.benchmarks.machine", *settings]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@contextmanager
def running_engine(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """`toka` with these arguments, which name its port; ended on exit.

    Raises SystemExit if something listens there: it would be measured in the engine's place.
    """
    port = int(dict(argument.split("=", 1) for argument in arguments)["port"])
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise SystemExit(f"port: {port} is in use")
    engine = subprocess.Popen([sys.executable, "-m", "toka_engine", *arguments], stdout=sys.stderr)
    try:
        yield engine
    finally:
        engine.terminate()
        try:
            engine.wait(timeout=30)
        except subprocess.TimeoutExpired:
            engine.kill()
            engine.wait()


async def wait_until_ready(base_url: str, engine: subprocess.Popen[bytes]) -> float:
    """Seconds until /readyz says so. Raises SystemExit when the engine ends first."""
    began = time.perf_counter()
    async with aiohttp.ClientSession(base_url) as session:
        while time.perf_counter() - began < _READY_TIMEOUT_S:
            if engine.poll() is not None:
                raise SystemExit(f"the engine ended with code {engine.returncode}")
            try:
                async with session.get("/readyz") as response:
                    if response.status == 200:
                        return time.perf_counter() - began
            except aiohttp.ClientError:
                pass  # not listening yet
            await asyncio.sleep(0.05)  # another process starts: there is no event to wait for
    raise SystemExit(f"the engine was not ready after {_READY_TIMEOUT_S:.0f} s")


async def read_model(base_url: str) -> str:
    """The name of the model that the engine serves."""
    async with aiohttp.ClientSession(base_url) as session, session.get("/v1/models") as response:
        return str((await response.json())["data"][0]["id"])


async def read_metrics(base_url: str) -> dict[str, float]:
    """Every sample without labels of /metrics, by name."""
    async with aiohttp.ClientSession(base_url) as session:
        return await _read_metrics(session)


async def _read_metrics(session: aiohttp.ClientSession) -> dict[str, float]:
    async with session.get("/metrics") as response:
        text = await response.text()
    return {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", text, re.MULTILINE)}


async def wait_idle(base_url: str) -> dict[str, float]:
    """Wait until nothing is held, and all of it is reported; return whatever still is held after too long."""
    until = time.monotonic() + _IDLE_TIMEOUT_S
    was_idle = False
    while True:
        metrics = await read_metrics(base_url)
        held = {name: metrics[name] for name in _HELD if metrics.get(name)}
        if (not held and was_idle) or time.monotonic() > until:
            return held
        was_idle = not held
        await asyncio.sleep(_REPORT_S)  # what began and ended since the last report is in the next one


class PeakWatch:
    """The most sequences that ran at once, as far as /metrics tell, which the manager renews four times a second."""

    def __init__(self, base_url: str) -> None:
        self.peak_running = 0
        self._base_url = base_url

    async def watch(self) -> None:
        """Until it is cancelled."""
        async with aiohttp.ClientSession(self._base_url) as session:
            while True:
                metrics = await _read_metrics(session)
                self.peak_running = max(self.peak_running, int(metrics.get("toka_running", 0)))
                await asyncio.sleep(_PEAK_PERIOD_S)
