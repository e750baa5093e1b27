"""GPU ranks agree before they run: on bytes, on sizes, and on the way of exchange. No GPU is needed for that."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toka_engine.config import EngineConfig
from toka_engine.errors import ConfigError, DeviceUnavailableError, OutOfMemoryError, PeerClosedError
from toka_engine.model.attention_backend import AttentionShape
from toka_engine.model.config_fields import ConfigFields
from toka_engine.model.cuda import backend, gpu_ranks, nccl_exchange, rendezvous
from toka_engine.model.cuda.peer_links import LinkSizes, find_begins, make_links
from toka_engine.model.cuda.peer_memory import PeerMemoryError
from toka_engine.model.cuda.rendezvous import Rendezvous
from toka_engine.model.cuda.tensor_parallel import NcclParallel
from toka_engine.model.devices import find_device
from toka_engine.model.model_config import ModelConfig, parse_model_config
from toka_engine.model.sharding import Sharding


def make_model() -> ModelConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    fields = {"num_key_value_heads": 2, "vocab_size": 90, "max_position_embeddings": 4096, **sizes}
    return parse_model_config(ConfigFields({"architectures": ["LlamaForCausalLM"], **fields}, Path()))


def test_every_rank_gets_the_bytes_of_all_in_their_order_and_the_smallest_value(tmp_path: Path) -> None:
    def meet(rank: int) -> tuple[list[bytes], list[bytes], int]:
        met = Rendezvous(tmp_path / "meeting", rank, 3)
        first = met.gather(bytes([rank, 0, 255]))
        return first, met.gather(b"" if rank else b"of the first"), met.agree_min(5 - rank)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(meet, range(3)))
    expected = [bytes([rank, 0, 255]) for rank in range(3)], [b"of the first", b"", b""], 3
    assert found == [expected] * 3


def test_a_rank_that_never_comes_is_said_to_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_TIMEOUT", timedelta(milliseconds=50))
    with pytest.raises(PeerClosedError, match="rank 0 of 2 has lost another one"):
        Rendezvous(tmp_path / "meeting", 0, 2).gather(b"")


def test_the_gpu_with_the_least_free_memory_decides_on_the_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "read_available_bytes", lambda device: 10 << 30)
    model, seen = make_model(), []

    def agree_min(value: int) -> int:
        seen.append(value)
        return 1 << 20

    parallel: Any = SimpleNamespace(agree_min=agree_min, all_reduce_add_rms_norm=None, begin_sum=None)
    shape = AttentionShape.of(model, torch.bfloat16, torch.device("cuda"), Sharding(0, 2))
    sizes = [
        backend.CudaBackend(90, each).choose_sizes(EngineConfig(kv_cache_num_tokens=4096), model, shape)
        for each in (None, parallel)
    ]
    assert seen == [10 << 30]
    assert sizes[0].num_pages == sizes[1].num_pages == 4096 // sizes[0].page_size
    with pytest.raises(OutOfMemoryError, match="kv_cache_num_tokens may be up to"):
        backend.CudaBackend(90, parallel).choose_sizes(EngineConfig(kv_cache_num_tokens=65536), model, shape)


@pytest.mark.parametrize("is_set", [False, True])
def test_ranks_without_peer_memory_take_nccl_and_one_of_them_warns(
    is_set: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is enough that the variable is set for one of the ranks."""

    def fail(*_: object) -> None:
        raise PeerMemoryError("writes of the GPUs of ranks [1] to the GPU of rank 0 were lost")

    monkeypatch.setattr(gpu_ranks, "connect_peers", fail)
    monkeypatch.setattr(gpu_ranks, "NcclExchange", lambda sharding, gather: sharding)
    if is_set:
        monkeypatch.setenv(gpu_ranks.NO_PEER_MEMORY, "1")

    def connect(rank: int) -> Any:
        return gpu_ranks.GpuRanks(tmp_path / "meeting", rank, 2).connect(EngineConfig(), make_model(), 90)

    with caplog.at_level("WARNING"), ThreadPoolExecutor(2) as pool:
        found = list(pool.map(connect, range(2)))
    assert all(isinstance(each, NcclParallel) and not each.has_graphs for each in found)
    assert [each.width for each in found] == [48, 42]
    (warning,) = [record.getMessage() for record in caplog.records if "no_peer_memory" in record.getMessage()]
    assert ("is set" if is_set else "were lost") in warning


def test_gpus_that_nccl_cannot_connect_either_are_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU in reach the library's own functions run up to the connection, and say why there is none."""
    for name in nccl_exchange._SETTINGS:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DeviceUnavailableError, match="of 1 ranks reach each other neither directly nor by NCCL: nccl"):
        nccl_exchange.NcclExchange(Sharding(0, 1), lambda data: [data])


def test_too_little_shared_memory_for_nccl_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl_exchange.os, "statvfs", lambda path: SimpleNamespace(f_bavail=8192, f_frsize=4096))
    with pytest.raises(DeviceUnavailableError, match=r"32 MB of /dev/shm are free, 2 .* need 48 MB.*shm-size"):
        nccl_exchange.NcclExchange(Sharding(0, 2), lambda data: [data])


def test_sums_beside_products_are_refused_where_the_device_turns_out_to_be_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device(EngineConfig(tp_size=2)).type == "cpu"
    with pytest.raises(ConfigError, match="async_tp_threshold=4096 has no effect on a CPU"):
        find_device(EngineConfig(tp_size=2, async_tp_threshold=4096))


def test_boxes_are_cut_out_of_a_region_behind_all_else_and_take_memory_only_if_there_are_any() -> None:
    plain, boxed = LinkSizes(64, 32, 8, 90), LinkSizes(64, 32, 8, 90, overlapped_rows=32)
    without, begins = find_begins(2, plain), find_begins(2, boxed)
    assert without[-1] == without[-2] == begins[-2]
    assert begins[:-1] == without[:-1]
    assert begins[-1] - begins[-2] >= 2 * 32 * 64 * 2  # two turns of all rows, from one peer
    region = torch.arange(begins[-1] // 4, dtype=torch.int32)
    addresses = torch.tensor([1 << 20, 1 << 30])
    links = make_links(Sharding(1, 2), boxed, 90, 4, addresses, begins, region.view(torch.float32))
    assert links.boxes is not None
    at = links.boxes.find_box(owner=1, source=0, turn=3, row=5) - (1 << 30)
    assert int(links.boxes.words[1, 0, 5, 0]) == at // 4
    assert links.boxes.find_box(0, 1, 2, 0) == (1 << 20) + begins[-2]
    assert make_links(Sharding(1, 2), plain, 90, 4, addresses, without, region.view(torch.float32)).boxes is None
