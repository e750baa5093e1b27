"""The machine decides: cgroups how large the cache is and how many threads run, the CPU its dtype."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from toka_engine.config import EngineConfig
from toka_engine.control_messages import RankInfo
from toka_engine.errors import ConfigError, DeviceUnavailableError, OutOfMemoryError
from toka_engine.model.devices import find_device, take_device
from toka_engine.model.memory import choose_num_pages, count_threads, read_limit_bytes
from toka_engine.model.model_config import read_model_config
from toka_engine.model.sizing import choose_dtype, choose_sizes

GIB = 1 << 30


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def meminfo(root: Path, kib: int) -> Path:
    path = root / "meminfo"
    path.write_text(f"MemTotal: {2 * kib} kB\nMemAvailable: {kib} kB\n")
    return path


def test_a_version_2_cgroup_limits_the_memory(tmp_path: Path) -> None:
    write(
        tmp_path,
        memory_dot_max=f"{4 * GIB}\n",
        memory_dot_current=f"{GIB}\n",
        memory_dot_stat="anon 1\ninactive_file 512\n",
    )
    assert read_limit_bytes(tmp_path, meminfo(tmp_path, 16 << 20)) == 3 * GIB + 512


def test_a_version_1_cgroup_limits_the_memory(tmp_path: Path) -> None:
    write(
        tmp_path,
        memory__memory_dot_limit_in_bytes=f"{4 * GIB}\n",
        memory__memory_dot_usage_in_bytes=f"{3 * GIB}\n",
    )
    assert read_limit_bytes(tmp_path, meminfo(tmp_path, 16 << 20)) == GIB


def test_without_a_limit_the_machine_decides(tmp_path: Path) -> None:
    write(tmp_path, memory_dot_max="max\n", memory_dot_current="5\n")
    assert read_limit_bytes(tmp_path, meminfo(tmp_path, 1024)) == 1 << 20


def test_the_machine_decides_where_it_has_less_than_the_limit(tmp_path: Path) -> None:
    write(tmp_path, memory_dot_max=f"{64 * GIB}\n", memory_dot_current="0\n")
    assert read_limit_bytes(tmp_path, meminfo(tmp_path, 1 << 20)) == GIB


def test_the_cache_gets_a_share_a_floor_and_what_the_user_says() -> None:
    assert choose_num_pages(2 * GIB, 1 << 20, 1, None, 16) == int(GIB * 0.6) >> 20
    assert choose_num_pages(500 * GIB, 1 << 20, 1, None, 16) == 768
    assert choose_num_pages(GIB // 2, 1 << 20, 40, None, 16) == 40
    assert choose_num_pages(GIB, 1 << 20, 40, 1000, 16) == 63


def test_a_cpu_quota_limits_the_threads(tmp_path: Path) -> None:
    allowed = len(os.sched_getaffinity(0))
    assert count_threads(tmp_path) == allowed
    write(tmp_path, cpu_dot_max="100000 100000\n")
    assert count_threads(tmp_path) == 1
    write(tmp_path, cpu_dot_max="max 100000\n")
    assert count_threads(tmp_path) == allowed


def test_a_version_1_cpu_quota_limits_the_threads(tmp_path: Path) -> None:
    write(tmp_path, cpu__cpu_dot_cfs_quota_us="50000\n", cpu__cpu_dot_cfs_period_us="100000\n")
    assert count_threads(tmp_path) == 1


@pytest.mark.parametrize(("asked", "given"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_dtype_is_the_one_that_the_user_says(asked: Literal["float32", "bfloat16"], given: torch.dtype) -> None:
    assert choose_dtype(EngineConfig(dtype=asked), torch.device("cpu")) is given


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """gpus((8, 0), (9, 0)): torch tells of GPUs with these compute capabilities; the indices that are set."""

    def pretend(*capabilities: tuple[int, int], free_bytes: int = 140 * GIB) -> list[int]:
        current: list[int] = []

        def find_properties(index: int) -> Any:
            assert current or len(capabilities) == 1, "a GPU was touched before the rank's own was set"
            major, minor = capabilities[index]
            return SimpleNamespace(
                name="NVIDIA H200", uuid=f"1234-{index}", major=major, minor=minor,
                multi_processor_count=132, total_memory=141 * GIB,
            )  # fmt: skip

        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        monkeypatch.setattr(torch.cuda, "get_device_properties", find_properties)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, 141 * GIB))
        return current

    return pretend


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_cannot_serve_ends_the_start_unless_the_cpu_is_asked_for(
    gpus: Callable[..., list[int]], device: Literal["auto", "cuda"]
) -> None:
    gpus((7, 5))
    with pytest.raises(DeviceUnavailableError, match=r"compute capability 7\.5"):
        find_device(EngineConfig(device=device))
    assert find_device(EngineConfig(device="cpu")).type == "cpu"


def test_one_gpu_is_taken(gpus: Callable[..., list[int]]) -> None:
    gpus((9, 0))
    assert find_device(EngineConfig()).type == "cuda"


def test_each_rank_takes_a_gpu_of_its_own_before_it_looks_at_any(gpus: Callable[..., list[int]]) -> None:
    current = gpus((9, 0), (9, 0))
    assert take_device(EngineConfig(dp_size=2), RankInfo(dp_rank=1, dp_size=2)) == torch.device("cuda", 1)
    assert current == [1]


def test_what_others_use_of_a_gpu_is_in_the_log_and_a_full_one_ends_the_start(
    gpus: Callable[..., list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    gpus((9, 0), free_bytes=101 * GIB)
    take_device(EngineConfig(), RankInfo())
    assert "event=gpu_in_use index=0 uuid=GPU-1234-0 by_others_gb=42.9" in caplog.text
    gpus((9, 0), free_bytes=GIB)
    with pytest.raises(DeviceUnavailableError, match=r"GPU-1234-0\) has 1\.1 of 151\.4 GB free"):
        take_device(EngineConfig(), RankInfo())


def test_replicas_on_unlike_gpus_are_warned_of_once(
    gpus: Callable[..., list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    for rank in range(2):
        gpus((9, 0), (10, 0))
        take_device(EngineConfig(dp_size=2), RankInfo(dp_rank=rank, dp_size=2))
    assert caplog.text.count("event=unlike_gpus") == 1


@pytest.mark.parametrize("index", [0, 1])
def test_fewer_gpus_than_ranks_are_refused_by_every_rank(gpus: Callable[..., list[int]], index: int) -> None:
    gpus((9, 0))
    with pytest.raises(DeviceUnavailableError, match=r"needs 2 GPUs, 1 can be used on this machine$"):
        find_device(EngineConfig(dp_size=2), index)


def test_a_list_of_visible_gpus_that_hides_too_many_is_named(
    gpus: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The driver takes what it does not understand for the end of the list, and says nothing."""
    gpus((9, 0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,x")
    words = r"needs 2 GPUs, 1 can be used on this machine \(CUDA_VISIBLE_DEVICES='0,x'\)$"
    with pytest.raises(DeviceUnavailableError, match=words):
        find_device(EngineConfig(tp_size=2))
    gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "first")
    with pytest.raises(DeviceUnavailableError, match=r"no CUDA device .* machine \(CUDA_VISIBLE_DEVICES='first'\)$"):
        find_device(EngineConfig(device="cuda"))
    assert [find_device(EngineConfig(tp_size=2), rank).type for rank in range(2)] == ["cpu", "cpu"]
    for hidden_on_purpose in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden_on_purpose)
        assert find_device(EngineConfig()).type == "cpu"
    assert [each.getMessage() for each in caplog.records] == [
        "event=no_gpu device=cpu reason=\"no CUDA device can be used (CUDA_VISIBLE_DEVICES='first')\""
    ]


def test_pipeline_stages_of_several_ranks_run_on_cpus_alone_and_the_start_says_so(
    gpus: Callable[..., list[int]],
) -> None:
    current = gpus((9, 0), (9, 0), (9, 0), (9, 0))
    words = "^pp_size=2 tp_size=2: pipeline stages of several ranks run on CPUs in this version, with device=cpu$"
    with pytest.raises(ConfigError, match=words):
        take_device(EngineConfig(pp_size=2, tp_size=2), RankInfo(pp_rank=1, pp_size=2, tp_size=2))
    assert current == []
    assert find_device(EngineConfig(pp_size=2, tp_size=2, device="cpu")).type == "cpu"


def test_each_pipeline_stage_takes_a_gpu(gpus: Callable[..., list[int]]) -> None:
    current = gpus((9, 0), (9, 0))
    assert take_device(EngineConfig(pp_size=2), RankInfo(pp_rank=1, pp_size=2)) == torch.device("cuda", 1)
    assert current == [1]


def test_without_a_word_on_the_dtype_it_is_bfloat16_where_the_cpu_computes_with_it() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    flags = {*cpuinfo.read_text().split()} if cpuinfo.exists() else set()
    has_it = "avx512f" in flags and bool(flags & {"avx512_bf16", "amx_tile"})
    expected = torch.bfloat16 if has_it else torch.float32
    assert choose_dtype(EngineConfig(), torch.device("cpu")) is expected


_PRODUCTS = """
import psutil
import torch
from toka_engine.model.cpu.backend import make_ops

def resident_mib():
    return psutil.Process().memory_info().rss / 2**20

torch.set_num_threads(1)
dtype = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
make_linear = make_ops().make_linear
linears = [make_linear(torch.ones(out, 576, dtype=dtype), None) for out in (576, 960, 1536)]
for rows in range(1, 5):
    [linear(torch.ones(rows, 576, dtype=dtype)) for linear in linears]
before = resident_mib()
for rows in range(5, 160):
    [linear(torch.ones(rows, 576, dtype=dtype)) for linear in linears]
print(int(resident_mib() - before))
"""


@pytest.mark.slow
def test_products_of_ever_new_sizes_do_not_pile_up_in_onednns_caches() -> None:
    done = subprocess.run([sys.executable, "-c", _PRODUCTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100


def test_replicas_on_one_cpu_share_its_memory(make_tiny: Callable[..., tuple[Any, Path]]) -> None:
    _, folder = make_tiny(max_position_embeddings=512)
    model, cpu = read_model_config(folder), torch.device("cpu")

    def tokens_of(dp_size: int) -> int:
        sizes = choose_sizes(EngineConfig(dp_size=dp_size), model, cpu, kv_bytes_per_token=64 << 10, available=3 * GIB)
        return sizes.num_pages * sizes.page_size

    assert tokens_of(1) > 1.9 * tokens_of(2)
    config = EngineConfig(dp_size=2, kv_cache_num_tokens=2 * GIB // (64 << 10))
    with pytest.raises(OutOfMemoryError, match="may be up to"):
        choose_sizes(config, model, cpu, kv_bytes_per_token=64 << 10, available=3 * GIB)


@pytest.mark.parametrize(("longest", "num_pages"), [(None, 32), (100, 7), (100_000, 32)])
def test_tables_of_pages_are_as_long_as_the_longest_request(
    make_tiny: Callable[..., tuple[Any, Path]], longest: int | None, num_pages: int
) -> None:
    _, folder = make_tiny(max_position_embeddings=512)
    config = EngineConfig(max_num_tokens_per_request=longest, kv_cache_num_tokens=4096)
    sizes = choose_sizes(config, read_model_config(folder), torch.device("cpu"), 64, available=1 << 34)
    assert sizes.max_pages_per_seq == num_pages
