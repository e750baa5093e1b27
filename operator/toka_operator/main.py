"""Start-up of the operator process: settings, logging, threads, kopf. Nothing else."""

from __future__ import annotations

import contextlib
import logging
import os
import sys

import kopf

from toka_operator.errors import SettingsError
from toka_operator.handlers import register
from toka_operator.runtime import Runtime
from toka_operator.settings import Settings, read_settings


def main() -> int:
    """Runs until SIGTERM. Returns the exit code: 0 after a signal, 2 for bad settings."""
    try:
        settings = read_settings(os.environ)
    except SettingsError as error:
        with contextlib.suppress(BrokenPipeError):  # nobody reads why: the exit code still says it
            print(f"toka-operator: {error}", file=sys.stderr)
        return 2
    _set_up_logging(settings)
    runtime = Runtime(settings)
    registry = kopf.OperatorRegistry()
    register(registry, runtime)
    try:
        kopf.run(registry=registry, standalone=True, clusterwide=True)
    finally:
        runtime.stop()
    return 0


def _set_up_logging(settings: Settings) -> None:
    """One line of key=value per record; kopf's own chatter only from WARNING on."""
    layout = "time=%(asctime)s level=%(levelname)s logger=%(name)s %(message)s"
    logging.basicConfig(stream=sys.stderr, format=layout, level=settings.log_level)
    for name in ("kopf", "kubernetes", "urllib3", "aiohttp", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
