"""`kubectl toka logs`: the logs of all engine pods of an object, each line with its pod's name.

With `--follow` pods that come later are followed too, and containers that restart again: kubectl's own watch says when.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import TextIO

from kubectl_toka.kubectl import Kubectl, KubectlError
from kubectl_toka.names import ENGINE_CONTAINER, pod_selector

_LOOK_S = 0.2
_AGAIN_S = 1.0
_WATCH_FORMAT = '--output=jsonpath={.metadata.name}{"\\n"}'


def print_logs(kubectl: Kubectl, name: str, tail: int, *, previous: bool) -> None:
    """Print the last lines of each pod. Raises KubectlError where no pod has any."""
    pods = [pod["metadata"]["name"] for pod in kubectl.list("pods", pod_selector(name))]
    if not pods:
        raise KubectlError(f"{name} has no pods")
    refusals = []
    for pod in pods:
        flags = ["--previous"] if previous else []
        try:
            text = kubectl.run("logs", pod, f"--container={ENGINE_CONTAINER}", f"--tail={tail}", *flags)
        except KubectlError as error:
            refusals.append(f"{pod}: {error}")
            continue
        sys.stdout.writelines(f"{pod} {line}\n" for line in text.splitlines())
    for refusal in refusals:
        print(refusal, file=sys.stderr)
    if len(refusals) == len(pods):
        raise KubectlError("no pod has a log")


class Follower:
    """Follows every pod of an object until it is stopped or a watch of pods fails."""

    def __init__(self, kubectl: Kubectl, name: str, tail: int, out: TextIO) -> None:
        self._kubectl, self._name, self._tail, self._out = kubectl, name, tail, out
        self._lock = threading.Lock()
        self._watch: subprocess.Popen[str] | None = None
        self._readers: dict[str, subprocess.Popen[str]] = {}
        self._seen: set[str] = set()
        self._error: Exception | None = None
        self._is_over = threading.Event()

    def run(self) -> None:
        """Follow; raises KubectlError when a watch fails. A KeyboardInterrupt ends all that was started."""
        following = threading.Thread(target=self._follow_all, daemon=True)
        try:
            following.start()
            while following.is_alive():  # this thread looks for Ctrl-C: one that comes just before a read would be lost
                following.join(_LOOK_S)
            if self._error is not None:
                raise self._error
        finally:
            with self._lock:
                self._is_over.set()
                for process in (self._watch, *self._readers.values()):
                    if process is not None:
                        process.terminate()

    def _follow_all(self) -> None:
        """Watch again and again: the API server ends each watch within an hour."""
        try:
            while not self._is_over.is_set():
                self._follow_watch()
                self._is_over.wait(_AGAIN_S)
        except (OSError, KubectlError) as error:  # raised in the main thread
            self._error = error

    def _follow_watch(self) -> None:
        selector = f"--selector={pod_selector(self._name)}"
        with self._lock:
            if self._is_over.is_set():
                return
            self._watch = watch = self._kubectl.start("get", "pods", selector, "--watch", _WATCH_FORMAT)
        assert watch.stdout is not None
        assert watch.stderr is not None
        with watch.stdout, watch.stderr:
            for line in watch.stdout:
                self._follow(line.strip())
            if watch.wait() != 0:
                raise KubectlError(watch.stderr.read().strip() or "kubectl get --watch ended")

    def _follow(self, pod: str) -> None:
        """Begin to follow a pod that nobody follows: it is new, or its container ended, or has only now begun."""
        with self._lock:
            if not pod or pod in self._readers or self._is_over.is_set():
                return
            tail = "--tail=0" if pod in self._seen else f"--tail={self._tail}"
            flags = (f"--container={ENGINE_CONTAINER}", "--follow", tail)
            self._readers[pod] = self._kubectl.start("logs", pod, *flags)
        threading.Thread(target=self._copy, args=(pod,), daemon=True).start()

    def _copy(self, pod: str) -> None:
        process = self._readers[pod]
        assert process.stdout is not None
        for line in process.stdout:
            with self._lock:
                self._seen.add(pod)
                self._out.write(f"{pod} {line}")
                self._out.flush()
        process.wait()
        with self._lock:
            del self._readers[pod]
