"""Ranks that cannot meet say why, at once: the folder is gone, the disk is full, or there is no loopback interface."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from toka_engine.errors import DeviceUnavailableError, StorageError
from toka_engine.model.cpu import gloo_ranks
from toka_engine.model.cpu.gloo_ranks import GlooRanks
from toka_engine.model.cuda.rendezvous import Rendezvous

Meet = Callable[[Path, int, int], object]


@pytest.mark.timeout(60)  # torch's own store looks for a folder for five minutes
@pytest.mark.parametrize("meet", [GlooRanks, Rendezvous])
def test_a_folder_that_is_gone_is_named(meet: Meet, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(StorageError, match=rf"the ranks cannot meet in {missing}: No such file or directory"):
        meet(missing / "dp0_pp0", 0, 2)


@pytest.mark.parametrize("meet", [GlooRanks, Rendezvous])
def test_a_full_disk_is_named_and_taken_for_no_loss_of_a_rank(meet: Meet, tmp_path: Path) -> None:
    (tmp_path / "dp0_pp0").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=rf"the ranks cannot meet in {tmp_path}: No space left on device"):
        meet(tmp_path / "dp0_pp0", 0, 2)


def test_without_a_loopback_interface_ranks_on_cpus_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gloo_ranks, "_LOOPBACK", "192.0.2.1")  # an address of documents: no interface has it
    with pytest.raises(DeviceUnavailableError, match=r"talk over the loopback interface, and 192\.0\.2\.1 cannot be"):
        GlooRanks(tmp_path / "dp0_pp0", 0, 2)
