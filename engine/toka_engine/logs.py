"""Sets up the log of a process: its level, and the component that each line names."""

from __future__ import annotations

import logging
import sys

from toka_engine.config import EngineConfig

COMPONENTS = ("supervisor", "resolve", "server", "manager", "model")
"""The names that `log_procs` takes, besides one of several managers or model workers (model_tp1)."""


def set_up_logging(config: EngineConfig, component: str) -> None:
    """Log to standard error, at the level that `config` has for this process."""
    logging.basicConfig(
        level=level_of(config, component),
        stream=sys.stderr,
        format=f"%(asctime)s level=%(levelname)s component={component} logger=%(name)s %(message)s",
    )


def level_of(config: EngineConfig, component: str) -> str:
    """Return the level of a component's log: processes that `log_procs` leaves out only warn."""
    wanted = config.log_procs
    if not wanted or component in wanted or component.partition("_")[0] in wanted:
        return config.log_level
    numbers = logging.getLevelNamesMapping()
    return max(config.log_level, "WARNING", key=lambda level: numbers[level])
