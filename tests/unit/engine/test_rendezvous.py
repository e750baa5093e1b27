"""The folder where ranks meet: private, gone after its use, and never confused with one of an earlier start."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from toka_engine.errors import StorageError
from toka_engine.rendezvous import Rendezvous


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_it_is_for_this_user_alone_and_gone_after_its_use(root: Path) -> None:
    rendezvous = Rendezvous()
    folder = Path(rendezvous.folder)
    assert folder.parent == root
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (folder / "dp0").write_text("met here")
    rendezvous.remove()
    rendezvous.remove()
    assert not list(root.iterdir())


def test_the_next_start_removes_what_a_killed_supervisor_left_and_nothing_else(root: Path) -> None:
    left, strange = root / "toka-ranks-left", root / "something"
    for folder in (left, strange):
        folder.mkdir()
        (folder / "dp0").write_text("an earlier start")
    rendezvous = Rendezvous()
    assert {path.name for path in root.iterdir()} == {strange.name, Path(rendezvous.folder).name}
    assert not list(Path(rendezvous.folder).iterdir())


def test_a_start_that_takes_long_keeps_its_folder_while_others_start(root: Path) -> None:
    slow = Rendezvous()
    other = Rendezvous()
    assert Path(slow.folder).exists()
    slow.remove()
    assert [str(path) for path in root.iterdir()] == [other.folder]


def remove(folder: str) -> None:
    Path(folder).rmdir()


def replace(folder: str) -> None:
    """Another start has removed the folder, and a third one has been given its name."""
    Path(folder).rename(Path(folder).with_name("moved"))
    Path(folder).mkdir()


@pytest.mark.parametrize("interfere", [remove, replace])
@pytest.mark.parametrize("is_open", [False, True])
def test_a_folder_that_another_start_removes_before_it_is_locked_is_made_again(
    root: Path, monkeypatch: pytest.MonkeyPatch, interfere: Callable[[str], None], is_open: bool
) -> None:
    """Before this start has opened it, or between that and the lock."""
    module, name = (os, "open") if is_open else (tempfile, "mkdtemp")
    call, seen = getattr(module, name), []

    def call_and_interfere(*arguments: object, **named: object) -> object:
        found = call(*arguments, **named)
        folder = str(arguments[0] if is_open else found)
        if not seen and "toka-ranks-" in folder:
            seen.append(folder)
            interfere(folder)
        return found

    monkeypatch.setattr(module, name, call_and_interfere)
    rendezvous = Rendezvous()
    assert Path(rendezvous.folder).is_dir()
    assert seen[0] != rendezvous.folder or (interfere is replace and not is_open)
    rendezvous.remove()
    assert not Path(rendezvous.folder).exists()


def test_starts_at_the_same_time_take_no_folder_from_each_other(root: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        every = list(pool.map(lambda _: Rendezvous(), range(64)))
    assert all(Path(each.folder).is_dir() for each in every)
    for each in every:
        each.remove()
    assert not list(root.iterdir())


def test_a_link_that_somebody_put_there_is_not_followed(root: Path) -> None:
    target = root / "target"
    target.mkdir()
    (target / "file").write_text("keep")
    (root / "toka-ranks-link").symlink_to(target)
    os.utime(root / "toka-ranks-link", (0, 0), follow_symlinks=False)
    Rendezvous()
    assert (target / "file").exists()


def test_without_a_writable_folder_the_start_ends_with_a_sentence(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(root / "missing"))
    with pytest.raises(StorageError, match="no folder can be made for the ranks to find each other"):
        Rendezvous()
