"""Headless Chromium, driven over its DevTools protocol through a pair of pipes: Debian's package `chromium`, no driver.

Fails where Chromium is not installed. Nothing here waits for a time: a page is asked until it has what is expected.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WAIT_S = 120.0
_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-sync",
    "--disable-extensions",
    "--disable-component-update",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
)


class Tab:
    """One page of a running browser."""

    def __init__(self, chromium: Chromium, session: str) -> None:
        self._chromium = chromium
        self._session = session
        self.complaints: list[str] = []
        """Errors of scripts, refusals of the page's policy, and whatever else the browser complains of."""
        self.requested: list[str] = []
        """The addresses that the page has asked for."""

    def ask(self, method: str, **parameters: Any) -> Any:
        return self._chromium.ask(method, self._session, **parameters)

    def take(self, event: dict[str, Any]) -> None:
        """Note an event of the browser."""
        parameters = event["params"]
        match event["method"]:
            case "Network.requestWillBeSent":
                self.requested.append(parameters["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(str(parameters["exceptionDetails"]))
            case "Log.entryAdded":
                self.complaints.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")

    def open(self, url: str) -> None:
        self.ask("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def value_of(self, expression: str) -> Any:
        """Return what a script's expression gives. Its own errors fail the test."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Return when the expression holds."""
        deadline = time.monotonic() + WAIT_S
        while not self.value_of(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"never: {expression}\n{self.value_of('document.body.innerText')}"
            time.sleep(0.05)

    def press(self, key: str, code: int) -> None:
        """Press and release a key."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def type(self, text: str) -> None:
        self.ask("Input.insertText", text=text)

    def look(self, width: int, height: int, *, is_dark: bool) -> None:
        """Show the page in a window of this size to a reader who likes it light or dark."""
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    def photograph(self, path: Path) -> None:
        """Write a picture of the whole page."""
        picture = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(picture["data"]))


class Chromium:
    """The browser's process and its two pipes."""

    def __init__(self, profile: Path) -> None:
        program = shutil.which("chromium") or shutil.which("chromium-browser")
        assert program is not None, "this test needs Chromium: apt-get install chromium"
        its_input, self._to = os.pipe()
        self._from, its_output = os.pipe()
        ends = (its_input, its_output)
        redirect = f'exec "$@" 3<&{its_input} 4>&{its_output}'
        command = ["bash", "-c", redirect, "bash", program, *_OPTIONS, "--remote-debugging-pipe"]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=ends,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for end in ends:
            os.close(end)
        self._number = 0
        self._received = b""
        self._tabs: dict[str, Tab] = {}

    def new_tab(self) -> Tab:
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = self._tabs[session] = Tab(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.ask(f"{domain}.enable")
        return tab

    def ask(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        """Send a command; return its result, after the events before it are noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        os.write(self._to, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        deadline = time.monotonic() + WAIT_S
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            if (tab := self._tabs.get(answer.get("sessionId", ""))) and "method" in answer:
                tab.take(answer)

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._received:
            readable, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            assert readable, "Chromium does not answer"
            data = os.read(self._from, 1024 * 1024)
            assert data, "Chromium has ended"
            self._received += data
        message, _, self._received = self._received.partition(b"\0")
        decoded: dict[str, Any] = json.loads(message)
        return decoded

    def close(self) -> None:
        for end in (self._to, self._from):
            os.close(end)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)  # it ends when its pipes do
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Chromium]:
    """Run a browser with an empty profile."""
    browser = Chromium(profile)
    try:
        yield browser
    finally:
        browser.close()
