"""Finds the files of the model and of its tokenizer before the other processes start.

A local folder is found at once by the supervisor. What may take long, a hub download or the conversion of the embedded
model, runs in a process of its own (`python -m toka_engine.resolve`), so that the supervisor stays small and answers
signals. Loads neither weights nor torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from toka_engine import hub
from toka_engine.builtin import NAME, ensure_builtin, find_builtin
from toka_engine.child import Child, run_child
from toka_engine.config import EngineConfig
from toka_engine.control_messages import Resolved
from toka_engine.errors import ModelInvalidError, ModelNotFoundError

Report = Callable[[str, str], None]
"""Takes a phase and one line of progress."""

BUILTIN_MODEL = f"builtin://{NAME}"


def find_local(config: EngineConfig) -> Resolved | None:
    """Return the folders if nothing must be fetched or converted. Raises ModelNotFoundError, ModelInvalidError."""
    model_dir = _find_folder(config.model)
    tokenizer_dir = model_dir if config.tokenizer is None else _find_folder(config.tokenizer)
    if model_dir is None or tokenizer_dir is None:
        return None
    return Resolved(str(model_dir), str(tokenizer_dir))


def resolve(config: EngineConfig, report: Report) -> Resolved:
    """Return the folders, fetching or converting what is missing. Raises errors of the tree."""
    model_dir = _fetch(config.model, config.revision, hub.WEIGHTS, report)
    if not any(model_dir.glob("*.safetensors")):
        raise ModelInvalidError(f"{config.model} has no *.safetensors files")
    if config.tokenizer is None:
        return Resolved(str(model_dir), str(model_dir))
    return Resolved(str(model_dir), str(_fetch(config.tokenizer, None, hub.TOKENIZER, report)))


def _find_folder(name: str) -> Path | None:
    if name == BUILTIN_MODEL:
        return find_builtin()
    if name.startswith("builtin://"):
        raise ModelNotFoundError(f"{name}: the only embedded model is {BUILTIN_MODEL}")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise ModelInvalidError(f"{name} is not a folder")
    if name.startswith(("/", ".", "~")):
        raise ModelNotFoundError(f"there is no folder {name}")
    return None


def _fetch(name: str, revision: str | None, patterns: tuple[str, ...], report: Report) -> Path:
    if folder := _find_folder(name):
        return folder
    if name == BUILTIN_MODEL:
        report("convert", "the embedded model, once; about half a minute")
        return ensure_builtin()
    report("download", name)
    return hub.download(name, revision, patterns, lambda line: report("download", line))


def main(child: Child, link_fds: list[int]) -> None:
    """Body of the resolving process: it has no links."""
    child.send(resolve(child.start.config, child.progress))


if __name__ == "__main__":
    run_child("resolve", main)
