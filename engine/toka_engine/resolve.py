"""Finds the files of the model and of its tokenizer before the other processes start.

A local folder is found at once by the supervisor. What may take long, a hub download or the conversion of the embedded
model, runs in a process of its own (`python -m toka_engine.resolve`), so that the supervisor stays small and answers
signals; it answers HTTP meanwhile (`waiting_room`). Loads neither weights nor torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from toka_engine import hub
from toka_engine.builtin import NAME, ensure_builtin, find_builtin
from toka_engine.child import Child, run_child
from toka_engine.config import EngineConfig
from toka_engine.control_messages import Resolved
from toka_engine.errors import ModelInvalidError, ModelNotFoundError
from toka_engine.waiting_room import WaitingRoom

Report = Callable[[str, str], None]
"""Takes a phase and one line of progress."""

BUILTIN_MODEL = f"builtin://{NAME}"
RECENT_S = 600.0
"""An engine that starts again within this time takes a complete snapshot as it is: the kubelet restarts a crashing
container every five minutes, and the hub is not to be asked each time."""


def find_local(config: EngineConfig) -> Resolved | None:
    """Return the folders if nothing must be fetched or converted. Raises ModelNotFoundError, ModelInvalidError."""
    model_dir = _find_folder(config.model)
    tokenizer_dir = model_dir if config.tokenizer is None else _find_folder(config.tokenizer)
    if model_dir is None or tokenizer_dir is None:
        return None
    return Resolved(str(model_dir), str(tokenizer_dir))


def resolve(
    config: EngineConfig,
    report: Report,
    *,
    max_age_s: float = 0.0,
    on_transfer: hub.TakeTransfer = lambda transfer: None,
) -> Resolved:
    """Return the folders, fetching or converting what is missing. Raises errors of the tree.

    What the hub gave less than `max_age_s` ago is taken without asking it.
    """
    fetch = partial(_fetch, report=report, max_age_s=max_age_s, on_transfer=on_transfer)
    model_dir = fetch(config.model, config.revision, hub.WEIGHTS)
    if not any(model_dir.glob("*.safetensors")):
        raise ModelInvalidError(f"{config.model} has no *.safetensors files")
    if config.tokenizer is None:
        return Resolved(str(model_dir), str(model_dir))
    return Resolved(str(model_dir), str(fetch(config.tokenizer, None, hub.TOKENIZER)))


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


def _fetch(
    name: str,
    revision: str | None,
    patterns: tuple[str, ...],
    *,
    report: Report,
    max_age_s: float,
    on_transfer: hub.TakeTransfer,
) -> Path:
    if folder := _find_folder(name):
        return folder
    if name == BUILTIN_MODEL:
        report("convert", "the embedded model, once; about half a minute")
        return ensure_builtin()
    report("download", name)
    return hub.download(
        name,
        revision,
        patterns,
        lambda line: report("download", line),
        max_age_s=max_age_s,
        on_transfer=on_transfer,
    )


def main(child: Child, link_fds: list[int]) -> None:
    """Body of the resolving process; its one link, if any, is the engine's listening socket."""
    with WaitingRoom(link_fds[0] if link_fds else None) as room:

        def report(phase: str, detail: str = "") -> None:
            room.note(phase, detail)
            child.progress(phase, detail)

        resolved = resolve(child.start.config, report, max_age_s=RECENT_S, on_transfer=room.note_transfer)
    child.send(resolved)


if __name__ == "__main__":
    run_child("resolve", main)
