"""`toka-ping prompt='Hello world' max_tokens=100 chat=True`: ask a running engine and print the answer as it comes.

Uses the standard library only, so it runs wherever Python does. The key, if the server wants one, is read from the
environment variable TOKA_API_KEY.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from toka_engine.command_line import format_keys, parse_struct
from toka_engine.config import doc
from toka_engine.errors import ConfigError
from toka_engine.output import run_command


class PingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Keys of `toka-ping`."""

    prompt: Annotated[str, doc("what to ask")] = "Hello world"
    max_tokens: Annotated[int, Meta(ge=1), doc("length of the answer")] = 100
    chat: Annotated[bool, doc("T: through the model's chat template; F: continue the text")] = True
    temperature: Annotated[float, Meta(ge=0), doc("0: always the likeliest token")] = 0.0
    model: Annotated[str | None, doc("default: the server's first")] = None
    host: Annotated[str, doc("of the server")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535), doc("of the server")] = 10210
    timeout_s: Annotated[float, Meta(gt=0), doc("longest silence")] = 600.0


class ServerError(Exception):
    """The server refused the request, or there is none."""


def main() -> None:
    """Entry point of the command `toka-ping`."""
    run_command(lambda: run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Ask what `arguments` say and print the answer; 2 for a bad key, 1 where the server gives no answer."""
    if {"--help", "-h"} & {*arguments}:
        print("usage: toka-ping [key=value ...]\n\n" + format_keys(PingConfig))
        return 0
    try:
        config = parse_struct(PingConfig, arguments, "toka-ping")
    except ConfigError as error:
        print(f"toka-ping: {error}", file=sys.stderr)
        return error.exit_code
    connection = http.client.HTTPConnection(config.host, config.port, timeout=config.timeout_s)
    try:
        for text in ask(config, connection):
            print(text, end="", flush=True)
        print()
    except (ServerError, OSError, http.client.HTTPException) as error:
        print(f"toka-ping: {config.host}:{config.port}: {error or type(error).__name__}", file=sys.stderr)
        return 1
    finally:
        connection.close()
    return 0


def ask(config: PingConfig, connection: http.client.HTTPConnection) -> Iterator[str]:
    """Yield the answer's text as it comes. Raises ServerError, OSError or HTTPException."""
    model = config.model or _first_model(connection)
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
        "stream": True,
    }
    if config.chat:
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": config.prompt}]
    else:
        path, body["prompt"] = "/v1/completions", config.prompt
    response = _send(connection, "POST", path, body)
    for line in response:
        event = line.decode("utf-8").strip().removeprefix("data:").strip()
        if event == "[DONE]":
            return
        if event:
            yield _text_of(json.loads(event), config.chat)


def _text_of(event: dict[str, Any], is_chat: bool) -> str:
    if "error" in event:
        raise ServerError(event["error"].get("message", event["error"]))
    if not event.get("choices"):
        return ""
    choice = event["choices"][0]
    return (choice["delta"].get("content") if is_chat else choice["text"]) or ""


def _first_model(connection: http.client.HTTPConnection) -> str:
    models = json.loads(_send(connection, "GET", "/v1/models").read())
    return str(models["data"][0]["id"])


def _send(
    connection: http.client.HTTPConnection, method: str, path: str, body: dict[str, Any] | None = None
) -> http.client.HTTPResponse:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("TOKA_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    response = connection.getresponse()
    if response.status != http.client.OK:
        raise ServerError(f"{response.status}: {response.read(2000).decode('utf-8', 'replace')}")
    return response


if __name__ == "__main__":
    main()
