"""`kubectl toka chat`: a conversation with a model, streamed, through kubectl's port-forward to the Service.

Not through the API server's proxy: that takes the Authorization header for its own, so that an engine with keys would
refuse. The key comes from TOKA_API_KEY, else from the Secret that the object names, if the user may read it. It is
never printed.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from kubectl_toka.kubectl import Kubectl, KubectlError

Json = dict[str, Any]
_FORWARDING = re.compile(r"Forwarding from 127\.0\.0\.1:(\d+)")


@contextlib.contextmanager
def forwarded(kubectl: Kubectl, name: str, port: int) -> Iterator[int]:
    """Yield a port of this machine that leads to the Service's."""
    process = kubectl.start("port-forward", f"service/{name}", f":{port}", merges_errors=True)
    try:
        yield _read_port(process)
    finally:
        process.terminate()
        process.wait()


def _read_port(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        if match := _FORWARDING.search(line):
            return int(match[1])
        said.append(line.strip())
    raise KubectlError(" ".join(said) or "kubectl port-forward ended")


class Conversation:
    """Asks a model and keeps what was said."""

    def __init__(self, model: str, key: str | None) -> None:
        self._model, self._key = model, key
        self._messages: list[Json] = []

    def ask(self, port: int, text: str, max_tokens: int | None, out: TextIO) -> None:
        """Send a message to a local port and write the answer as it comes. Raises KubectlError with the engine's words.

        Of an answer that is stopped, what came of it is kept; a question without any is forgotten, because many models
        take no two in a row.
        """
        question, said = {"role": "user", "content": text}, list[str]()
        body: Json = {"model": self._model, "messages": [*self._messages, question], "stream": True}
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        connection = http.client.HTTPConnection("127.0.0.1", port)
        with contextlib.closing(connection):
            try:
                connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
                response = connection.getresponse()
                if response.status != 200:
                    raise KubectlError(f"the engine answers {response.status}: {_error(response.read())}")
                self._write(response, said, out)
            except (OSError, http.client.HTTPException) as error:
                raise KubectlError(f"the connection broke: {type(error).__name__}: {error}") from error
            finally:
                if answer := "".join(said):
                    self._messages += [question, {"role": "assistant", "content": answer}]

    def _write(self, response: http.client.HTTPResponse, said: list[str], out: TextIO) -> None:
        for event in read_events(response):
            if "error" in event:
                raise KubectlError(str(event["error"].get("message", event["error"])))
            for choice in event.get("choices") or []:
                text = (choice.get("delta") or {}).get("content") or ""
                said.append(text)
                out.write(text)
                out.flush()
        out.write("\n")


def read_events(response: http.client.HTTPResponse) -> Iterator[Json]:
    """The data of server-sent events, up to [DONE]."""
    for raw in response:
        line = raw.decode("utf-8").strip()
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data == "[DONE]":
            return
        if line.startswith("data:"):
            yield json.loads(data)


def run(kubectl: Kubectl, name: str, message: str | None, max_tokens: int | None) -> None:
    """Ask once, or line by line until the end of the input."""
    found = kubectl.deployment(name)
    model = (found.get("status") or {}).get("model") or name
    port = (found["spec"].get("service") or {}).get("port", 80)
    conversation, lines = Conversation(model, find_key(kubectl, found["spec"])), _lines(model)
    is_stopped = True
    while is_stopped:
        with forwarded(kubectl, name, port) as local:
            if message is not None:
                conversation.ask(local, message, max_tokens, sys.stdout)
                return
            is_stopped = _talk(conversation, local, lines, max_tokens)


def _talk(conversation: Conversation, port: int, lines: Iterator[str], max_tokens: int | None) -> bool:
    """Ask line by line, up to an answer that is stopped; whether one was: Ctrl-C ends the port-forward with it."""
    for line in lines:
        try:
            conversation.ask(port, line, max_tokens, sys.stdout)
        except KeyboardInterrupt:
            print(" (stopped)")
            return True
    return False


def _lines(model: str) -> Iterator[str]:
    is_terminal = sys.stdin.isatty()
    while True:
        if is_terminal:
            print(f"{model}> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            if is_terminal:
                print()
            return
        if line.strip():
            yield line.strip()


def find_key(kubectl: Kubectl, spec: Json) -> str | None:
    """The API key, if the engine asks for one; of several, the first. Raises KubectlError if it cannot be had."""
    reference = (spec.get("auth") or {}).get("apiKeySecretRef")
    if key := os.environ.get("TOKA_API_KEY"):
        return _check_key(key.strip(), "TOKA_API_KEY")
    if not reference:
        return None
    entry = reference.get("key", "key")
    secret = kubectl.get("secret", reference["name"])
    value = (secret.get("data") or {}).get(entry)
    if value is None:
        raise KubectlError(f"secret {reference['name']} has no key {entry}: set TOKA_API_KEY")
    return _check_key(_first_key(base64.b64decode(value)), f"entry {entry} of secret {reference['name']}")


def _first_key(file: bytes) -> str:
    """The key of a file of keys (docs/security.md): it has one alone, or JSON with several. Empty if it has none."""
    text = file.decode("utf-8-sig", errors="replace").strip()
    if not text.startswith("{"):
        return text
    try:
        return str(json.loads(text)["keys"][0]["key"])
    except (ValueError, KeyError, TypeError, IndexError):
        return ""


def _check_key(key: str, where: str) -> str:
    """The key, if it may stand in a header. What is wrong with one is told without it."""
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise KubectlError(f"{where} is no API key: set TOKA_API_KEY to one")
    return key


def _error(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:300].decode(errors="replace")
