"""The folder where ranks meet: private, gone after its use, and never confused with one of an earlier start."""

from __future__ import annotations

import os
import stat
import tempfile
import time
from pathlib import Path

import pytest
from toka_engine.errors import StorageError
from toka_engine.rendezvous import Rendezvous


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def age(folder: Path) -> None:
    hour_ago = time.time() - 3600
    os.utime(folder, (hour_ago, hour_ago))


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
    left, fresh, strange = root / "toka-ranks-left", root / "toka-ranks-fresh", root / "something"
    for folder in (left, fresh, strange):
        folder.mkdir()
        (folder / "dp0").write_text("an earlier start")
    age(left)
    age(strange)
    rendezvous = Rendezvous()
    assert {path.name for path in root.iterdir()} == {fresh.name, strange.name, Path(rendezvous.folder).name}
    assert not list(Path(rendezvous.folder).iterdir())


def test_a_start_that_takes_long_keeps_its_folder_while_others_start(root: Path) -> None:
    slow = Rendezvous()
    age(Path(slow.folder))
    other = Rendezvous()
    assert Path(slow.folder).exists()
    slow.remove()
    assert [str(path) for path in root.iterdir()] == [other.folder]


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
