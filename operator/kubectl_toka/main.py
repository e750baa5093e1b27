"""The command line of `kubectl toka`: its commands, flags and exit codes."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence

from kubectl_toka import chat, logs, rollouts, top, tree
from kubectl_toka.kubectl import Kubectl, KubectlError
from kubectl_toka.names import RESOURCE, pod_selector

COMMANDS = {
    "status": "the object, its conditions, revisions and pods as a tree, with causes",
    "logs": "logs of all its pods",
    "chat": "talk to its model",
    "restart": "replace all pods, as a rollout does it",
    "rollback": "go back to an earlier revision",
    "history": "the revisions that are remembered",
    "top": "requests and KV cache of each pod",
}
_NAME = re.compile(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?")


def main() -> None:
    """Entry point of the command `kubectl-toka`."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command; return the exit code."""
    options = make_parser().parse_args(arguments)
    try:
        _COMMANDS[options.command](Kubectl(global_flags(options)), options)
    except KubectlError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line. Flags of kubectl may stand anywhere."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-n", "--namespace", default=argparse.SUPPRESS, help="namespace of the object")
    common.add_argument("--context", default=argparse.SUPPRESS, help="context of the kubeconfig")
    common.add_argument("--kubeconfig", default=argparse.SUPPRESS, help="another kubeconfig")
    parser = argparse.ArgumentParser(prog="kubectl toka", description="TokaDeployments at a glance.", parents=[common])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    made = {name: commands.add_parser(name, help=words, parents=[common]) for name, words in COMMANDS.items()}
    made["status"].add_argument(
        "name", nargs="?", type=_name, help="of the TokaDeployment; default: all of the namespace"
    )
    for name in COMMANDS.keys() - {"status"}:
        made[name].add_argument("name", type=_name, help="of the TokaDeployment")
    which = made["logs"].add_mutually_exclusive_group()
    which.add_argument("-f", "--follow", action="store_true", help="go on, with pods that come later too")
    which.add_argument("-p", "--previous", action="store_true", help="of the containers before their restart")
    made["logs"].add_argument("--tail", type=int, default=100, help="lines of each pod to begin with (100)")
    made["chat"].add_argument("-m", "--message", help="ask this, and end; default: line by line from the terminal")
    made["chat"].add_argument("--max-tokens", type=int, help="longest answer")
    made["rollback"].add_argument("--to", help="name or number of the revision; default: the last one that served")
    return parser


def _name(text: str) -> str:
    """A name as Kubernetes has them, so that kubectl takes none for a flag of its own or for a selector."""
    if not _NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of an object")
    return text


def global_flags(options: argparse.Namespace) -> list[str]:
    """Flags of kubectl's own, for every call."""
    given = vars(options)
    return [f"--{name}={given[name]}" for name in ("namespace", "context", "kubeconfig") if name in given]


def _status(kubectl: Kubectl, options: argparse.Namespace) -> None:
    found = [kubectl.deployment(options.name)] if options.name else kubectl.list(RESOURCE)
    if not found:
        print("there is no TokaDeployment in this namespace", file=sys.stderr)
    for deployment in found:
        pods = kubectl.list("pods", pod_selector(deployment["metadata"]["name"]))
        print("\n".join(tree.make_tree(deployment, pods).lines()))


def _logs(kubectl: Kubectl, options: argparse.Namespace) -> None:
    kubectl.deployment(options.name)
    if options.follow:
        logs.Follower(kubectl, options.name, options.tail, sys.stdout).run()
    else:
        logs.print_logs(kubectl, options.name, options.tail, previous=options.previous)


_COMMANDS: dict[str, Callable[[Kubectl, argparse.Namespace], None]] = {
    "status": _status,
    "logs": _logs,
    "chat": lambda kubectl, options: chat.run(kubectl, options.name, options.message, options.max_tokens),
    "restart": lambda kubectl, options: print(rollouts.restart(kubectl, options.name)),
    "rollback": lambda kubectl, options: print(rollouts.rollback(kubectl, options.name, options.to)),
    "history": lambda kubectl, options: print(rollouts.history(kubectl, options.name)),
    "top": lambda kubectl, options: print(top.make_table(kubectl, options.name)),
}
