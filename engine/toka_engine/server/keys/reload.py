"""Puts the keys of a file in force, at the start and whenever the file changes.

The file is looked at every second: it may lie behind links that are swapped, as a Secret's files do, or on a file
system that tells nobody of a change.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterator
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from toka_engine.errors import ConfigError
from toka_engine.server.keys.check import KeyCheck
from toka_engine.server.keys.file import KEY_VARIABLE, SETTING, ApiKey, KeyFileError, KeySource, read_variable

logger = logging.getLogger("toka.server.keys")

_LOOK_S = 1.0


class Keys(Collector):
    """The keys of this process, from the file or from the environment."""

    def __init__(self, path: str | None, variable: str | None, limited_paths: Collection[str]) -> None:
        """Read the keys. Raises ConfigError, which names the line or field."""
        self._source = KeySource(Path(path)) if path is not None else None
        keys = read_variable(variable)
        if self._source is not None:
            if keys:
                raise ConfigError(f"{SETTING} and the variable {KEY_VARIABLE} are both set: set one of them")
            keys = self._source.read_if_changed() or ()
            if self._source.is_readable_by_all:
                logger.warning("event=api_keys_exposed path=%s reason='every user may read it'", path)
            logger.info("event=api_keys_loaded keys=%d", len(keys))
        self.check = KeyCheck(keys, limited_paths)
        self._is_valid = True
        self._num_reloads = {"ok": 0, "failed": 0}

    async def run(self) -> None:
        """Follow the file for as long as the process lives."""
        if self._source is None:
            return
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                keys = await asyncio.to_thread(self._source.read_if_changed)
            except KeyFileError as error:
                self._is_valid = False
                self._num_reloads["failed"] += 1
                logger.error("event=api_keys_invalid kept=%d reason=%r", len(self.check.uses), str(error))
                continue
            if keys is not None:
                self._apply(keys)

    def _apply(self, keys: tuple[ApiKey, ...]) -> None:
        before = {name: use.entry for name, use in self.check.uses.items()}
        after = {entry.name: entry for entry in keys}
        self.check.replace(keys)
        self._is_valid = True
        self._num_reloads["ok"] += 1
        changed = [name for name in after.keys() & before.keys() if after[name] != before[name]]
        logger.info(
            "event=api_keys_reloaded keys=%d added=%s removed=%s changed=%s",
            len(keys),
            ",".join(sorted(after.keys() - before.keys())),
            ",".join(sorted(before.keys() - after.keys())),
            ",".join(sorted(changed)),
        )

    # ------------------------------------------------------------ metrics

    def collect(self) -> Iterator[Metric]:
        """Yield the series of the keys in force; none where requests need no key."""
        if not self.check.is_asking:
            return
        yield GaugeMetricFamily("toka_api_keys", "API keys in force.", value=len(self.check.uses))
        if self._source is not None:
            yield GaugeMetricFamily(
                "toka_api_keys_last_reload_successful",
                "1 while the keys in force are those of `api_keys_file`, 0 while that is broken.",
                value=float(self._is_valid),
            )
            reloads = CounterMetricFamily(
                "toka_api_keys_reloads", "Changes of `api_keys_file` that were read, by result.", labels=["result"]
            )
            for result, count in self._num_reloads.items():
                reloads.add_metric([result], count)
            yield reloads
        yield from self._collect_uses()

    def _collect_uses(self) -> Iterator[Metric]:
        running = GaugeMetricFamily(
            "toka_key_requests_running", "Requests that generate now, by the key's name.", labels=["key"]
        )
        requests = CounterMetricFamily(
            "toka_key_requests", "Requests with a key, those refused by its limits included.", labels=["key"]
        )
        refused = CounterMetricFamily(
            "toka_key_requests_refused", "Requests answered with 429 by a limit of their key.", labels=["key", "limit"]
        )
        prompts = CounterMetricFamily("toka_key_prompt_tokens", "Prompt tokens charged to a key.", labels=["key"])
        completions = CounterMetricFamily(
            "toka_key_completion_tokens", "Completion tokens charged to a key.", labels=["key"]
        )
        for name, use in self.check.uses.items():
            running.add_metric([name], use.num_running)
            requests.add_metric([name], use.num_requests)
            prompts.add_metric([name], use.prompt_tokens)
            completions.add_metric([name], use.completion_tokens)
            for limit, count in use.num_refused.items():
                refused.add_metric([name, limit], count)
        yield from (running, requests, refused, prompts, completions)
