"""Sends the engine's statistics to a statsd server: one UDP datagram per report.

Totals go as counters, by how much they have grown since the last report; the rest as gauges. A report that cannot be
sent is lost; what its counters would have said is in the next one.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from toka_engine.addresses import parse_udp_address
from toka_engine.server.metrics import GAUGES, TOTALS
from toka_engine.server.replicas import Replicas

logger = logging.getLogger("toka.server.statsd")


class StatsdReporter:
    """Reports until it is cancelled."""

    def __init__(self, address: str, interval_s: float, replicas: Replicas, num_requests: Callable[[], int]) -> None:
        self._host, self._port = parse_udp_address(address, "statsd_addr")
        self._interval_s = interval_s
        self._replicas = replicas
        self._num_requests = num_requests
        self._sent = dict.fromkeys(TOTALS, 0.0)
        self._is_failing = False

    async def run(self) -> None:
        """Send a report every few seconds."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._interval_s)
            lines, totals = self._report()
            try:
                found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_DGRAM)
                family, kind, protocol, _, address = found[0]
                with socket.socket(family, kind, protocol) as sock:
                    sock.setblocking(False)
                    sock.sendto(b"\n".join(lines), address)
            except OSError as error:
                if not self._is_failing:
                    logger.warning("event=statsd_failed host=%r port=%d error=%r", self._host, self._port, str(error))
                self._is_failing = True
            else:
                self._sent, self._is_failing = totals, False

    def _report(self) -> tuple[list[bytes], dict[str, float]]:
        """Return the lines of a report, and the totals that it brings the receiver to."""
        live = [replica.stats for replica in self._replicas.live if replica.stats]
        ever = [replica.stats for replica in self._replicas.all if replica.stats]
        lines = [b"toka.requests_running:%d|g" % self._num_requests()]
        for name in GAUGES:
            lines.append(b"toka.%s:%d|g" % (name.encode(), sum(getattr(stats, name) for stats in live)))
        totals = {name: float(sum(getattr(stats, name) for stats in ever)) for name in TOTALS}
        for name, total in totals.items():
            grown = total - self._sent[name]
            lines.append(b"toka.%s:%s|c" % (name.removesuffix("_total").encode(), f"{grown:.6g}".encode()))
        return lines, totals
