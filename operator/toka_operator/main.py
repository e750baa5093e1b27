"""Start-up of the operator process: settings, logging, threads, kopf. Nothing else."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import TextIO

from toka_operator import __version__
from toka_operator.errors import SettingsError
from toka_operator.settings import Settings, read_settings

HELP = """\
usage: toka-operator [--help | --version]

Reconciles TokaDeployments in the cluster of KUBECONFIG, or in the one that it runs in; charts/toka installs it.
Settings are environment variables:
  TOKA_ENGINE_IMAGE                  required: the image of engines whose spec names none
  TOKA_NAMESPACE                     default: where the Lease lives
  TOKA_WATCH_NAMESPACES              as a,b,c; empty: the whole cluster
  TOKA_LEASE_NAME                    toka-operator: operators that share one are replicas of each other
  TOKA_IDENTITY                      this replica's name for the Lease; unset: one that no other operator has
  TOKA_LEASE_DURATION_SECONDS        10
  TOKA_LEASE_RENEW_DEADLINE_SECONDS  7: below the duration
  TOKA_LEASE_RETRY_SECONDS           2: below the deadline
  TOKA_WATCH_SECONDS                 25: how soon each watch is renewed; one that is silent for 5 longer is given up
  TOKA_TAKEN_NAME_RETRY_SECONDS      30: how soon a child's name that another object holds is tried again
  TOKA_ABSENT_KIND_RETRY_SECONDS     30: how soon PodMonitors, HTTPRoutes or InferencePools, where the cluster has none,
                                     are looked for again
  TOKA_ALLOW_HOST_PATH               false: whether podTemplate may mount folders of the node
  TOKA_READ_DOWNLOADS                false: whether engines that load are asked how far their download is
  TOKA_POD_MONITORS                  false: whether a PodMonitor is made for each object, where the cluster has them
  TOKA_POD_MONITOR_LABELS            as a=b,c=d: labels of PodMonitors, by which a Prometheus selects them
  TOKA_ROUTES                        false: whether spec.routing makes InferencePools and HTTPRoutes
  TOKA_WATCH_NODES                   false: whether nodes may be watched: pods leave a cordoned one when others serve
  TOKA_WORKERS                       8: objects that are worked on at once
  TOKA_HEALTH_PORT                   8080: /livez, /readyz and /metrics
  TOKA_LOG_LEVEL                     INFO, or DEBUG, WARNING, ERROR
"""


def main() -> int:
    """Run until SIGTERM. Return the exit code: 0 after a signal, 2 for bad settings."""
    if arguments := sys.argv[1:]:
        return _answer(arguments)
    try:
        settings = read_settings(os.environ)
    except SettingsError as error:
        _say(f"toka-operator: {error}", sys.stderr)
        return 2
    _set_up_logging(settings)
    return _serve(settings)


def _serve(settings: Settings) -> int:
    """Run the operator. kopf and the Kubernetes client take a second and a half to import: --help needs neither."""
    import kopf

    from toka_operator.handlers import register
    from toka_operator.runtime import Runtime

    runtime = Runtime(settings)
    registry = kopf.OperatorRegistry()
    register(registry, runtime)
    try:
        kopf.run(registry=registry, standalone=True, clusterwide=True)
    finally:
        runtime.stop()
    return 0


def _answer(arguments: Sequence[str]) -> int:
    if {"--help", "-h"} & {*arguments}:
        _say(HELP.rstrip(), sys.stdout)
        return 0
    if "--version" in arguments:
        _say(f"toka-operator {__version__}", sys.stdout)
        return 0
    _say(
        f"toka-operator: unknown argument {arguments[0]!r}: settings are environment variables, see --help", sys.stderr
    )
    return 2


def _say(text: str, stream: TextIO) -> None:
    """Print `text`; quietly where nobody reads any more, which the exit code does not change."""
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # the interpreter flushes once more when it ends
        os.close(nowhere)


def _set_up_logging(settings: Settings) -> None:
    """One line of key=value per record; kopf's own chatter only from WARNING on."""
    layout = "time=%(asctime)s level=%(levelname)s logger=%(name)s %(message)s"
    logging.basicConfig(stream=sys.stderr, format=layout, level=settings.log_level)
    for name in ("kopf", "kubernetes", "urllib3", "aiohttp", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
