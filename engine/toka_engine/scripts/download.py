"""`toka-download model=NAME [revision=...] [tokenizer=NAME]`: fetch a model's files ahead of the engine's start.

Progress goes to stderr; the last line on stdout is the folder, ready for `toka model=FOLDER`. Exit codes are those of
`toka`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, NoReturn

import msgspec

from toka_engine.command_line import format_keys, parse_struct
from toka_engine.config import EngineConfig, Name, doc
from toka_engine.errors import REASONS, TokaError
from toka_engine.output import run_command
from toka_engine.resolve import resolve


class DownloadConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Keys of `toka-download`."""

    model: Annotated[Name, doc("hub name (org/name), or builtin://smollm2")]
    revision: Annotated[Name | None, doc("branch, tag or commit; default: main")] = None
    tokenizer: Annotated[Name | None, doc("hub name of another tokenizer; default: the model's")] = None


def main() -> None:
    """Entry point of the command `toka-download`."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _end_at_once)
    run_command(lambda: run(sys.argv[1:]))


def _end_at_once(signum: int, frame: FrameType | None) -> NoReturn:
    """End without waiting for connections, also as process 1 of a container. What has been fetched is gone on with."""
    os._exit(128 + signum)


def run(arguments: Sequence[str]) -> int:
    """Fetch what `arguments` name; return the exit code."""
    if {"--help", "-h"} & {*arguments}:
        print("usage: toka-download model=NAME [key=value ...]\n\n" + format_keys(DownloadConfig))
        return 0
    try:
        keys = parse_struct(DownloadConfig, arguments, "toka-download")
        config = EngineConfig(model=keys.model, revision=keys.revision, tokenizer=keys.tokenizer)
        resolved = resolve(config, _report)
    except TokaError as error:
        print(f"toka-download: {REASONS[error.exit_code]}: {error}", file=sys.stderr)
        return error.exit_code
    print(resolved.model_dir)
    return 0


def _report(phase: str, detail: str) -> None:
    print(f"{phase}: {detail}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
