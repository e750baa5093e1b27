"""The benchmarks that drive a worker: their steps do what they say, and each prints the figures that it promises."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from toka_engine.benchmarks import hydragen, step
from toka_engine.benchmarks.decoding import DecodeBench, attention_skipped
from toka_engine.benchmarks.roofline import count_costs
from toka_engine.config import EngineConfig
from toka_engine.manager.core import Manager
from toka_engine.messages import Step
from toka_engine.model.cpu.attention import CpuAttention
from toka_engine.model.model_config import read_model_config
from toka_engine.model.worker import Worker

from tests.model.driving import Driver

Tiny = Callable[..., tuple[Any, Path]]
KEYS = ["--key", "device=cpu", "--key", "dtype=float32", "--key", "num_threads=1"]
LIMITS = ["--bytes-per-s", "1e10", "--flops-per-s", "1e11"]


@pytest.fixture
def driver(drive_tiny: Callable[..., tuple[Any, Driver]]) -> Driver:
    return drive_tiny()[1]


def fill(worker: Worker) -> torch.Tensor:
    """Give the slots the same last token and the KV cache the same contents each time; returns the cache."""
    attention = worker.runner.attention
    assert isinstance(attention, CpuAttention)
    worker.runner.state.last_tokens.fill_(7)
    return attention._cache.normal_(generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("num_groups", [1, 2])
def test_grouped_steps_compute_what_plain_ones_do(driver: Driver, num_groups: int) -> None:
    bench = DecodeBench(driver.worker, rows=5, shared=48, own=7, num_groups=num_groups, max_steps=3)
    assert (bench.shared, bench.num_pages) == (48, 3 * num_groups + 5)
    logits = []
    for is_grouped in (False, True):
        fill(driver.worker)
        bench.time(1, is_grouped)
        logits.append(driver.logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)
    assert (logits[0][0] - logits[0][4]).abs().max() > 1e-3, "rows have tokens of their own"


def test_a_block_runs_as_many_steps_as_asked_and_the_next_one_begins_anew(driver: Driver) -> None:
    bench = DecodeBench(driver.worker, rows=3, shared=16, own=4, max_steps=6)
    lengths = driver.worker.runner.state["length"]
    for num_steps in (6, 2):
        bench.time(num_steps, True)
        assert lengths[:3].tolist() == [16 + 4 + num_steps] * 3
    with pytest.raises(ValueError, match="7 steps"):
        bench.time(7, True)


@pytest.mark.parametrize(("rows", "shared", "own"), [(257, 0, 1), (2, 160, 4), (200, 0, 100)])
def test_what_does_not_fit_ends_with_a_sentence(driver: Driver, rows: int, shared: int, own: int) -> None:
    with pytest.raises(SystemExit, match=f"rows={rows}"):
        DecodeBench(driver.worker, rows, shared, own)


def test_a_step_without_attention_still_writes_its_keys_and_afterwards_attends_again(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = DecodeBench(driver.worker, rows=4, shared=32, own=5, max_steps=2)
    cache = fill(driver.worker)
    before = cache.clone()
    bench.time(1, True)
    usual, written = driver.logits, cache.clone()
    fill(driver.worker)
    with attention_skipped(driver.worker), monkeypatch.context() as patch:
        patch.delattr(CpuAttention, "_attend")
        bench.time(1, True)
        skipped = driver.logits
    assert torch.equal(cache[0], written[0]), "the first layer's keys do not depend on attention"
    assert not torch.equal(cache[0], before[0])
    fill(driver.worker)
    bench.time(1, True)
    torch.testing.assert_close(driver.logits, usual)
    assert (skipped - usual).abs().max() > 1e-3
    assert skipped.isfinite().all()


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_the_roofline_counts_the_numbers_that_a_models_matrices_have(make_tiny: Tiny, family: str) -> None:
    model, folder = make_tiny(family)
    matrices = {name: each.numel() for name, each in model.named_parameters() if each.ndim == 2}
    costs = count_costs(read_model_config(folder), 4)
    assert costs.layer_weights == sum(count for name, count in matrices.items() if ".layers." in name)
    assert costs.head_weights == matrices["lm_head.weight"]


@pytest.mark.slow
def test_the_sweep_measures_every_point_and_where_nothing_is_shared(
    make_tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = make_tiny()
    axes = ["--rows", "2,6", "--prefix", "32,64", "--suffix", "5", "--steps", "2", "--rounds", "2"]
    assert hydragen.main([str(folder), *axes, *KEYS, *LIMITS]) == 0
    machine, *lines = map(json.loads, capsys.readouterr().out.splitlines())
    assert (machine["kind"], machine["dtype"], machine["bytes_per_s"]) == ("machine", "float32", 1e10)
    points = [line for line in lines if line["kind"] == "point"]
    unshared = [line for line in lines if line["kind"] == "nothing_shared"]
    assert [(each["rows"], each["prefix"]) for each in points] == [(2, 32), (2, 64), (6, 32), (6, 64)]
    assert [each["rows"] for each in unshared] == [2, 6]
    for point in points:
        assert min(point[f"{way}_ms"] for way in ("on", "off", "without_attention")) > 0
        ratio = point["without_attention_cpu_ms"] / point["on_cpu_ms"]
        assert point["speed_of_no_attention"] == pytest.approx(ratio, abs=2e-3)
        # 2 layers x 2 heads of keys and values x 16 numbers of 4 bytes: 512 bytes for each key
        keys = point["prefix"] + point["rows"] * 5
        assert point["attention_roofline_ms"] == pytest.approx(keys * 512 / 1e10 * 1e3, abs=1e-4)
    for line in unshared:
        assert line["loss"] == pytest.approx(line["on_ms"] / line["off_ms"] - 1, abs=2e-3)
        assert line["cpu_loss"] == pytest.approx(line["cpu_on_ms"] / line["cpu_off_ms"] - 1, abs=2e-3)
        assert line["manager_cpu_on_ms"] > 0


def test_where_nothing_is_shared_all_rows_decode_at_once_and_in_no_group(
    make_tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = make_tiny()
    config = hydragen.complete_config(EngineConfig(device="cpu", dtype="float32"), "cpu", [(6, 0, 1)], 4)
    worker = step.start_worker(msgspec.structs.replace(config, num_threads=1), folder)
    steps: list[Step] = []
    plan = Manager.plan

    def note(manager: Manager) -> Step | None:
        planned = plan(manager)
        if planned is not None:
            steps.append(planned)
        return planned

    monkeypatch.setattr(Manager, "plan", note)
    turns = hydragen.run_unshared(worker, config, rows=6, num_steps=4)
    assert turns.step_s > 0
    assert [each.decode_slots.size for each in steps[-4:]] == [6] * 4
    assert all(each.group_first_rows.size == 0 for each in steps)
    with pytest.raises(SystemExit, match="rows=5000"):
        hydragen.check_rows(worker, config, [6, 5000])


def test_the_step_bench_compares_both_ways(make_tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = make_tiny()
    key = ["--key", "kv_cache_num_tokens=4096"]
    assert (
        step.main([str(folder), "--rows", "1,4", "--prefix", "0,32", "--suffix", "3", "--repeats", "2", *KEYS, *key])
        == 0
    )
    points = json.loads(capsys.readouterr().out)["points"]
    assert [(each["rows"], each["prefix"], "speedup" in each) for each in points] == [
        (1, 0, False), (1, 32, False), (4, 0, False), (4, 32, True),
    ]  # fmt: skip


def test_a_prefill_is_timed_over_the_pages_of_its_slot(driver: Driver) -> None:
    bench = DecodeBench(driver.worker, rows=1, shared=0, own=40, max_steps=3)
    cache = fill(driver.worker)
    before = cache.clone()
    assert bench.time_prefill(40) > 0
    pages = sorted(bench._table[0, : -(-40 // driver.page_size)].tolist())
    changed = (cache != before).flatten(2).any(2).any(0).nonzero().flatten().tolist()
    assert changed == pages


def test_a_mixed_step_writes_a_row_of_each_slot_and_the_prompt_of_the_last(driver: Driver) -> None:
    bench = DecodeBench(driver.worker, rows=3, shared=0, own=40, max_steps=2)
    cache = fill(driver.worker)
    before = cache.clone()
    assert bench.time_mixed(20, 2).step_s > 0
    size, table = driver.page_size, bench._table
    rows, prompt = table[:2, 40 // size : 41 // size + 1], table[2, : -(-20 // size)]
    written = {*rows.ravel().tolist(), *prompt.tolist()}
    changed = (cache != before).flatten(2).any(2).any(0).nonzero().flatten().tolist()
    assert changed == sorted(written)


def test_two_engines_are_compared_step_by_step(make_tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = make_tiny()
    sizes = ["--rows", "1,3", "--suffix", "8", "--prefill", "20", "--mixed", "5", "--repeats", "2"]
    assert step.main([str(folder), *sizes, *KEYS, "--versus", "use_hydragen=F"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    steps = [("decode", 1), ("decode", 3), ("prefill", 20), ("mixed", 1), ("mixed", 3)]
    assert [(point["step"], point["rows"]) for point in points] == steps
    assert all(point["tokens"] == 5 and point["second_host_ms"] > 0 for point in points[-2:])
    assert all(point["first_ms"] > 0 and point["second_ms"] > 0 and point["ratio"] > 0 for point in points)
