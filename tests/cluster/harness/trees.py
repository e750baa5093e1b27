"""Empty machines made of namespaces: what a node, or the control plane's network, lives in.

A machine's first process holds its namespaces. When it is killed the kernel ends every process in it and
frees its mounts, addresses and links: that is how a node dies in a test, and why nothing is left behind.
Enter with nsenter, never with `ip netns exec`, which remounts /sys and hides control groups from kubelet.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tests.cluster.harness.errors import CommandFailed, HarnessError
from tests.cluster.harness.processes import RunFolder, start_time_of

_HOLD = ["sleep", "infinity"]
_START_DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True)
class Network:
    """A network namespace of its own, with a loopback interface and nothing else until links are added."""

    name: str
    pid: int

    @classmethod
    def create(cls, run: RunFolder, name: str) -> Network:
        """Make one, held by a process of the run."""
        holder = run.spawn(name, ["unshare", "--net", *_HOLD])
        network = cls(name, holder.pid)
        ours = _namespace(os.getpid(), "net")  # not that of pid 1, which may be hidden from us
        _wait_until(lambda: _namespace(holder.pid, "net") not in ("", ours), f"network {name}")
        network.ip("link", "set", "lo", "up")
        return network

    def enter(self) -> list[str]:
        """A prefix that puts a command into this network; it keeps our files and its own pid."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", "--"]

    def ip(self, *arguments: str) -> None:
        """Run ip(8) in it."""
        run_checked([*self.enter(), "ip", *arguments])


@dataclass(frozen=True, slots=True)
class Machine:
    """Network, mount and process namespaces of their own. `pid` is the first process, seen from outside."""

    name: str
    pid: int

    @classmethod
    def create(cls, run: RunFolder, name: str) -> Machine:
        """Make one, held by two recorded processes: unshare and, inside, the first process."""
        flags = ["--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        holder = run.spawn(name, ["unshare", *flags, *_HOLD])
        _wait_until(lambda: _first_child(holder.pid) is not None, f"machine {name}")
        pid = _first_child(holder.pid)
        if pid is None:
            raise HarnessError(f"the first process of machine {name} ended at once:\n{holder.log()}")
        run.record(f"{name}.first", pid)
        machine = cls(name, pid)
        machine.run("mkdir", "-p", "/run/netns")
        machine.run("mount", "-t", "tmpfs", "none", "/run/netns")
        machine.ip("link", "set", "lo", "up")
        return machine

    def enter(self) -> list[str]:
        """A prefix that puts a command into this machine, in another working directory."""
        return ["nsenter", "--target", str(self.pid), "--net", "--mount", "--pid", "--"]

    def run(self, *argv: str) -> str:
        """Run a command in it, checked, and return its stdout."""
        return run_checked([*self.enter(), *argv])

    def ip(self, *arguments: str) -> None:
        """Run ip(8) in it."""
        self.run("ip", *arguments)


def add_bridge(place: Network | Machine, name: str, address: str) -> None:
    """Add a bridge that is up and has an address, such as 10.244.1.1/24.

    Its hardware address is made from that one. Left to the kernel it is the lowest of the bridge's ports and
    changes as pods come and go; then whoever knows the old one loses every packet, for 20 s and more.
    """
    octets = address.partition("/")[0].split(".")
    hardware = ":".join(["0a", "58", *(f"{int(octet):02x}" for octet in octets)])
    place.ip("link", "add", name, "address", hardware, "type", "bridge")
    place.ip("addr", "add", address, "dev", name)
    place.ip("link", "set", name, "up")


def run_checked(
    argv: Sequence[str],
    stdin: str | None = None,
    timeout_s: float = 120.0,
    env: Mapping[str, str] | None = None,
) -> str:
    """Run a command and return its stdout; a non-zero status or no end in time raises `CommandFailed`."""
    try:
        done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=timeout_s, env=env)
    except subprocess.TimeoutExpired as error:
        raise CommandFailed(list(argv), -1, "", f"did not end within {timeout_s:.0f} s") from error
    if done.returncode != 0:
        raise CommandFailed(list(argv), done.returncode, done.stdout, done.stderr)
    return done.stdout


def _namespace(pid: int, kind: str) -> str:
    return subprocess.run(["readlink", f"/proc/{pid}/ns/{kind}"], capture_output=True, text=True).stdout


def _first_child(pid: int) -> int | None:
    """The pid of unshare's child once it holds its own mounts: it has become `sleep`."""
    children = subprocess.run(["pgrep", "-P", str(pid), "-x", "sleep"], capture_output=True, text=True).stdout.split()
    return int(children[0]) if children and start_time_of(int(children[0])) is not None else None


def _wait_until(predicate: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _START_DEADLINE_S
    while not predicate():
        if time.monotonic() > deadline:
            raise HarnessError(f"{what} did not start within {_START_DEADLINE_S} s")
        time.sleep(0.01)
