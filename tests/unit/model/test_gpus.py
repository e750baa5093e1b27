"""Which GPU a rank takes, and every reason for which GPUs are refused, with made-up facts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from toka_engine.config import EngineConfig
from toka_engine.errors import DeviceUnavailableError, ExitCode
from toka_engine.model.gpus import Gpu, check_free, choose_gpu, count_foreign_bytes, list_unlike

GIB = 1 << 30
H200 = Gpu(0, "NVIDIA H200", "GPU-a", (9, 0), 132, 140 * GIB)
A100 = Gpu(1, "NVIDIA A100-SXM4-80GB", "GPU-b", (8, 0), 108, 80 * GIB)
SLICE = Gpu(0, "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "GPU-c", (9, 0), 16, 10 * GIB)


def several(count: int) -> list[Gpu]:
    return [replace(H200, index=index, uuid=f"GPU-{index}") for index in range(count)]


def refuse(gpus: list[Gpu], **sizes: Any) -> str:
    """The one sentence with which every rank refuses."""
    config = EngineConfig(**sizes)
    sentences = set()
    for index in range(config.num_ranks):
        with pytest.raises(DeviceUnavailableError) as refusal:
            choose_gpu(gpus, config, index)
        assert refusal.value.exit_code == ExitCode.DEVICE_UNAVAILABLE
        sentences.add(str(refusal.value))
    (sentence,) = sentences
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(("dp_size", "tp_size"), [(1, 1), (2, 1), (1, 2), (4, 2), (8, 1), (1, 8)])
def test_each_rank_has_a_gpu_of_its_own_and_the_surplus_is_left(dp_size: int, tp_size: int) -> None:
    gpus, config = several(dp_size * tp_size + 1), EngineConfig(dp_size=dp_size, tp_size=tp_size)
    taken = [choose_gpu(gpus, config, index) for index in range(config.num_ranks)]
    assert taken == gpus[:-1]


def test_a_rank_takes_its_place_among_the_visible_gpus_whatever_their_order_is() -> None:
    reordered = [replace(gpu, index=index) for index, gpu in enumerate(reversed(several(4)))]
    assert [choose_gpu(reordered, EngineConfig(dp_size=4), index).uuid for index in range(4)] == [
        "GPU-3", "GPU-2", "GPU-1", "GPU-0",
    ]  # fmt: skip


@pytest.mark.parametrize("found", [0, 1, 3])
def test_too_few_gpus_are_refused_with_both_numbers(found: int) -> None:
    sentence = refuse(several(found), dp_size=2, tp_size=2)
    assert sentence == f"dp_size=2 x tp_size=2 needs 4 GPUs, {found} can be used on this machine"


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_a_gpu_without_bfloat16_is_named_and_so_is_the_way_without_it(capability: tuple[int, int]) -> None:
    gpus = [H200, replace(H200, index=1, name="Old One", capability=capability)]
    sentence = refuse(gpus, dp_size=2)
    for words in ("GPU 1 (Old One", "{}.{}".format(*capability), "bfloat16", "8.0", "device=cpu"):
        assert words in sentence


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_a_gpu_with_bfloat16_is_taken(capability: tuple[int, int]) -> None:
    assert choose_gpu([replace(H200, capability=capability)], EngineConfig(), 0).capability == capability


def test_unlike_gpus_in_one_replica_are_refused_and_both_are_named() -> None:
    assert refuse([H200, A100], tp_size=2) == (
        "tp_size=2 needs GPUs of one model: GPU 0 (NVIDIA H200, GPU-a) is unlike GPU 1 (NVIDIA A100-SXM4-80GB, GPU-b)"
    )


def test_unlike_gpus_in_two_stages_are_refused_and_so_are_slices() -> None:
    assert refuse([H200, A100], pp_size=2).startswith("pp_size=2 needs GPUs of one model: GPU 0 (NVIDIA H200")
    gpus = [*several(3), replace(A100, index=3)]
    assert refuse(gpus, pp_size=2, tp_size=2).startswith("pp_size=2 x tp_size=2 needs GPUs of one model: GPU 0")
    assert choose_gpu([*several(2), A100, replace(A100, index=3)], EngineConfig(dp_size=2, pp_size=2), 3).index == 3
    slices = [SLICE, replace(SLICE, index=1)]
    assert refuse(slices, pp_size=2).startswith("pp_size=2 needs whole GPUs: GPU 0 (NVIDIA H100 80GB HBM3 MIG")


def test_unlike_gpus_of_different_replicas_serve_and_are_told_of() -> None:
    gpus = [*several(2), A100, replace(A100, index=3)]
    assert choose_gpu(gpus, EngineConfig(dp_size=2, tp_size=2), 3) == gpus[3]
    assert list_unlike(gpus, EngineConfig(dp_size=2, tp_size=2)) == gpus[2:]
    assert list_unlike(gpus, EngineConfig(dp_size=2)) == []


def test_one_rank_may_have_a_mig_slice() -> None:
    assert choose_gpu([SLICE], EngineConfig(), 0) == SLICE


def test_several_ranks_with_mig_slices_are_refused_with_the_reason() -> None:
    assert "a process can use one MIG slice" in refuse([SLICE], dp_size=2)
    slices = [SLICE, replace(SLICE, index=1)]
    assert "tp_size=2 needs whole GPUs: GPU 0 (NVIDIA H100 80GB HBM3 MIG 1g.10gb" in refuse(slices, tp_size=2)


@pytest.mark.parametrize("free_gib", [0.0, 0.2, 1.8])
def test_a_gpu_that_a_second_engine_has_filled_is_refused(free_gib: float) -> None:
    with pytest.raises(DeviceUnavailableError, match=r"^GPU 0 \(NVIDIA H200, GPU-a\) has .* GB free: another process"):
        check_free(H200, int(free_gib * GIB))


def test_what_others_use_is_told_and_an_own_context_is_not_taken_for_another_process() -> None:
    check_free(H200, 2 * GIB)
    assert count_foreign_bytes(H200, 139 * GIB + GIB // 2) == 0
    assert count_foreign_bytes(H200, 100 * GIB) == 40 * GIB
