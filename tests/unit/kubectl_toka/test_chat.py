"""`kubectl toka chat` and `logs --follow` in processes of their own: streamed, in a terminal, and ended with all that
they started."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import psutil
import pytest
from kubectl_toka.chat import find_key
from kubectl_toka.kubectl import Kubectl, KubectlError

from tests.engine_process import ROOT
from tests.unit.kubectl_toka.conftest import World

LIMIT_S = 120.0
"""It only ends a hang."""
DEPLOYMENT = {
    "metadata": {"name": "chat", "namespace": "apps"},
    "spec": {"model": {"source": "hf://org/name"}, "auth": {"apiKeySecretRef": {"name": "keys"}}},
    "status": {"model": "tiny"},
}
SECRET = {"data": {"key": "czNjcjN0Cg=="}}


class Engine:
    """A server that speaks as much of the API as a chat needs, one word at a time, the second when it is let."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.go_on = threading.Event()
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                engine.bodies.append(body)
                if self.headers["Authorization"] != "Bearer s3cr3t":
                    return self._send(401, b'{"error": {"message": "Incorrect API key."}}')
                self.send_response(200)
                self.end_headers()
                self._say("Hello ")
                engine.go_on.wait(LIMIT_S)
                self._say("you")
                self.wfile.write(b"data: [DONE]\n\n")
                return None

            def _say(self, text: str) -> None:
                chunk = json.dumps({"choices": [{"delta": {"content": text}}]})
                self.wfile.write(f"data: {chunk}\n\n".encode())
                self.wfile.flush()

            def _send(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True


@pytest.fixture
def engine() -> Iterator[Engine]:
    started = Engine()
    thread = threading.Thread(target=started.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield started
    started.go_on.set()
    started.server.shutdown()
    thread.join()
    started.server.server_close()


@pytest.fixture
def cluster(world: World, engine: Engine) -> World:
    world.port = engine.server.server_port
    world.answers["get tokadeployments.toka.dev chat"] = DEPLOYMENT
    world.answers["get secret keys"] = SECRET
    return world


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kubectl_toka", *arguments]


def environment(world: World, **more: str) -> dict[str, str]:
    return {**os.environ, **world.environment, "PYTHONPATH": str(ROOT / "operator"), **more}


def heed_interrupts() -> None:
    """Take SIGINT as a terminal's programs do: a shell lets what runs in its background ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end_session(process: subprocess.Popen[Any]) -> None:
    """Kill a command that leads a session, and whatever of it outlives the command."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(LIMIT_S)


class Terminal:
    """A command with a terminal of its own; ended with everything it started on exit."""

    def __init__(self, world: World, *arguments: str) -> None:
        self._master, end = pty.openpty()
        self.process = subprocess.Popen(
            command(*arguments),
            env=environment(world),
            stdin=end,
            stdout=end,
            stderr=end,
            start_new_session=True,
            preexec_fn=heed_interrupts,
        )
        os.close(end)
        self.screen = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        end_session(self.process)
        os.close(self._master)

    def wait_for(self, text: str) -> None:
        """Wait until `text` stands on the screen behind what was waited for before."""
        self.read_until(text)
        self.screen = self.screen.partition(text)[2]

    def read_until(self, text: str) -> None:
        """Wait until `text` stands on the screen, and leave all of it there."""
        deadline = time.monotonic() + LIMIT_S
        while text not in self.screen:
            assert select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))[0], self.screen
            self.screen += os.read(self._master, 4096).decode()

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def children(self) -> list[psutil.Process]:
        found: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return found


def ask(world: World, *arguments: str, **more: str) -> tuple[int, str, str]:
    """The exit code of a command without a terminal, and what it wrote."""
    asked = subprocess.Popen(
        command(*arguments),
        env=environment(world, **more),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, errors = asked.communicate(timeout=LIMIT_S)
    finally:
        end_session(asked)
    return asked.returncode, out, errors


def test_a_chat_in_a_terminal_streams_and_remembers(cluster: World, engine: Engine) -> None:
    with Terminal(cluster, "chat", "chat") as terminal:
        terminal.wait_for("tiny> ")
        terminal.type("Hi\n")
        terminal.wait_for("Hello ")  # the rest is not said before it is let
        engine.go_on.set()
        terminal.wait_for("you")
        terminal.wait_for("tiny> ")
        terminal.type("And?\n")
        terminal.wait_for("Hello you")
        terminal.wait_for("tiny> ")
        children = terminal.children()
        assert children
        terminal.type("\x04")
        assert terminal.process.wait(LIMIT_S) == 0
        assert not psutil.wait_procs(children, LIMIT_S)[1], "the port-forward outlives the chat"
    assert [message["content"] for message in engine.bodies[1]["messages"]] == ["Hi", "Hello you", "And?"]
    assert engine.bodies[0]["model"] == "tiny"


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(cluster: World, engine: Engine) -> None:
    with Terminal(cluster, "chat", "chat") as terminal:
        terminal.wait_for("tiny> ")
        terminal.type("Hi\n")
        terminal.wait_for("Hello ")
        os.killpg(terminal.process.pid, signal.SIGINT)  # as a terminal does: to all of its foreground
        terminal.wait_for("(stopped)")
        terminal.wait_for("tiny> ")
        engine.go_on.set()
        terminal.type("And?\n")
        terminal.wait_for("Hello you")
        terminal.wait_for("tiny> ")
        terminal.type("\x04")
        assert terminal.process.wait(LIMIT_S) == 0
    assert sum("port-forward" in call for call in cluster.calls()) == 2, "the first one got the Ctrl-C too"
    assert [(m["role"], m["content"]) for m in engine.bodies[1]["messages"]] == [
        ("user", "Hi"),
        ("assistant", "Hello "),
        ("user", "And?"),
    ]


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("sk-1\n", "sk-1"),
        ('{"keys": [\n {"name": "a", "key": "sk-2"},\n {"name": "b", "key": "sk-3"}]}', "sk-2"),
        ('{"keys": []}', None),
        ("sk-4\nsk-5", None),
        ("sk-6 \u00e4", None),
    ],
)
def test_a_file_of_keys_gives_its_first_and_a_broken_one_is_not_quoted(
    world: World, monkeypatch: pytest.MonkeyPatch, file: str, key: str | None
) -> None:
    world.answers["get secret keys"] = {"data": {"key": base64.b64encode(file.encode()).decode()}}
    for name, value in world.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TOKA_API_KEY", raising=False)
    spec = {"auth": {"apiKeySecretRef": {"name": "keys"}}}
    if key is not None:
        assert find_key(Kubectl([]), spec) == key
        return
    with pytest.raises(KubectlError, match="entry key of secret keys is no API key") as raised:
        find_key(Kubectl([]), spec)
    assert "sk-" not in str(raised.value)


def test_one_question_is_answered_on_stdout(cluster: World, engine: Engine) -> None:
    engine.go_on.set()
    code, out, errors = ask(cluster, "chat", "chat", "-m", "Hi", "--max-tokens", "5")
    assert (code, out) == (0, "Hello you\n"), errors
    assert engine.bodies[0]["max_tokens"] == 5


def test_a_key_that_is_refused_is_told_in_the_engines_words(cluster: World, engine: Engine) -> None:
    code, _, errors = ask(cluster, "chat", "chat", "-m", "Hi", TOKA_API_KEY="wrong")
    assert (code, errors) == (1, "error: the engine answers 401: Incorrect API key.\n")


def test_followed_logs_end_with_ctrl_c_and_leave_nothing(world: World) -> None:
    world.answers["get tokadeployments.toka.dev chat"] = DEPLOYMENT
    world.answers["--watch"] = "chat-0\nchat-1\nchat-0"
    world.answers["logs chat-0"] = "first"
    world.answers["logs chat-1"] = "second"
    with Terminal(world, "logs", "chat", "-f") as terminal:
        terminal.read_until("chat-0 first")
        terminal.read_until("chat-1 second")
        children = terminal.children()
        assert children
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.process.wait(LIMIT_S) == 130
        assert not psutil.wait_procs(children, LIMIT_S)[1]


def test_a_test_that_ends_early_leaves_no_process_behind(cluster: World) -> None:
    with Terminal(cluster, "chat", "chat") as terminal:
        terminal.wait_for("tiny> ")
        children = terminal.children()
        assert children
    assert terminal.process.returncode == -signal.SIGKILL
    assert not psutil.wait_procs(children, LIMIT_S)[1]
