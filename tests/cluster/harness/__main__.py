"""`python -m tests.cluster.harness COMMAND`: what scripts/setup, scripts/images and scripts/quickstart call.

tools [SET ...]              install packages and build the cluster's commands; without sets, those of all tests
bases                        make the base images
up NAME [--nodes N]          boot a cluster that stays until `down NAME`
down NAME                    end it: every process, mount, address and control group
purge                        remove everything that was built, pulled or downloaded for clusters
images [TARGET ...]          build images; with --push NAME also push them, printing the names for pods
kubectl NAME ARGUMENT ...    run kubectl for it (helm likewise)
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

from tests.cluster.harness.cluster import Cluster
from tests.cluster.harness.errors import HarnessError
from tests.cluster.harness.images import (
    TARGETS,
    build_image,
    ensure_base_image,
    ensure_pause_image,
    image_name,
)
from tests.cluster.harness.paths import tool
from tests.cluster.harness.processes import RunFolder
from tests.cluster.harness.tools import ensure_tools, purge


def main() -> int:
    """Run one command; errors are one sentence on stderr and status 1. Ends with the reader of its output."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # it holds no connection that this could end, as a server would
    arguments = _parser().parse_args()
    try:
        match arguments.command:
            case "tools":
                ensure_tools(*arguments.sets)
            case "bases":
                ensure_pause_image()
                ensure_base_image()
            case "up":
                _up(arguments.name, arguments.nodes)
            case "down":
                RunFolder(arguments.name).stop()
            case "purge":
                purge()
            case "images":
                _images(arguments.targets or list(TARGETS), arguments.push, arguments.extras)
            case "kubectl" | "helm":
                _client(arguments.command, arguments.name, arguments.rest)
    except HarnessError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.harness", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("tools").add_argument("sets", nargs="*", metavar="SET")
    commands.add_parser("bases")
    commands.add_parser("purge")
    up = commands.add_parser("up")
    up.add_argument("name")
    up.add_argument("--nodes", type=int, default=1)
    commands.add_parser("down").add_argument("name")
    images = commands.add_parser("images")
    images.add_argument("targets", nargs="*", choices=[*TARGETS, []])
    images.add_argument("--push", metavar="NAME", help="the cluster whose registry gets them")
    images.add_argument("--extras", default="", help="extra dependencies of the engine image, say gpu")
    for client in ("kubectl", "helm"):
        command = commands.add_parser(client)
        command.add_argument("name")
        command.add_argument("rest", nargs=argparse.REMAINDER)
    return parser


def _up(name: str, num_nodes: int) -> None:
    """Boot a cluster, or leave one that runs as it is."""
    try:
        Cluster.attach(name)
    except HarnessError:
        Cluster.start(num_nodes, name, is_kept=True)


def _images(targets: list[str], cluster_name: str | None, extras: str) -> None:
    for target in targets:
        build_image(target, extras if target == "engine" else "")
    if cluster_name:
        cluster = Cluster.attach(cluster_name)
        for target in targets:
            print(cluster.push_image(image_name(target)), flush=True)


def _client(command: str, name: str, rest: list[str]) -> None:
    """Become kubectl or helm, in the network where the cluster can be reached."""
    cluster = Cluster.attach(name)
    argv = [*cluster.enter_network(), tool(command), f"--kubeconfig={cluster.kubeconfig}", *rest]
    os.execvp(argv[0], argv)


if __name__ == "__main__":
    sys.exit(main())
