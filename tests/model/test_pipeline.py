"""Pipeline stages say what one stage says: logits, tokens, logprobs, for every sampling parameter.

The stages are threads here, over the links and the shared memory of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from toka_engine.config import EngineConfig
from toka_engine.errors import ConfigError, OutOfMemoryError, PeerClosedError, RanksDisagreeError
from toka_engine.messages import Tokens
from toka_engine.model.cpu.backend import make_ops
from toka_engine.model.cpu.stage_exchange import StageExchange
from toka_engine.model.loader import Weights
from toka_engine.model.ranks import Ranks, SingleRank
from toka_engine.model.residual import StreamEnd
from toka_engine.model.slot_state import HostSlots
from toka_engine.model.stage_links import StageLinks
from toka_engine.model.torch_norms import rms_norm

from tests.model.driving import Driver, ints, load
from tests.model.test_grammars import REGEX, add_grammar
from tests.model.test_grammars import generate as follow_grammar
from tests.model.test_logits import IDS, TOLERANCE
from tests.model.test_prompt_logprobs import score_in_chunks
from tests.model.test_tensor_parallel import PAGES_AND_HYDRAGEN, check_equal, generate_three, play, play_on
from tests.model.thread_stages import link_stages, run_stages

MakeTiny = Callable[..., tuple[Any, Path]]


def play_in_stages(folder: Path, pp_size: int, tp_size: int = 1, **settings: Any) -> list[Any]:
    """Return what the ranks of the last stage give."""

    def work(ranks: Ranks, links: StageLinks) -> tuple[list[torch.Tensor], list[Tokens]]:
        return play(Driver(load(folder, ranks, links, pp_size=pp_size, tp_size=tp_size, **settings)))

    return run_stages(pp_size, tp_size, work)[-1]


@pytest.mark.parametrize(
    ("family", "pp_size", "tp_size", "overrides"),
    [
        ("Llama", 2, 1, {"num_hidden_layers": 3, "attention_bias": True, "mlp_bias": True}),
        ("Llama", 2, 1, {"tie_word_embeddings": True, "vocab_size": 261}),
        ("Qwen2", 4, 1, {"num_hidden_layers": 5}),
        ("Qwen3", 2, 2, {"head_dim": 32}),
        ("Llama", 3, 2, {"num_hidden_layers": 3, "tie_word_embeddings": True}),
    ],
)
def test_stages_give_the_logits_and_the_tokens_of_one(
    family: str, pp_size: int, tp_size: int, overrides: dict[str, Any], make_tiny: MakeTiny
) -> None:
    _, folder = make_tiny(family, **overrides)
    [(expected_logits, expected)] = play_on(folder, 1)
    every = play_in_stages(folder, pp_size, tp_size)
    for step, whole in enumerate(expected_logits):
        joined = torch.cat([logits[step] for logits, _ in every], dim=1)
        assert (joined - whole).abs().max() <= (TOLERANCE if tp_size > 1 else 0), "a hand-over rounds nothing"
        for _, tokens in every:
            check_equal(tokens[step], expected[step])


@pytest.mark.parametrize("settings", PAGES_AND_HYDRAGEN)
def test_the_size_of_pages_and_hydragen_change_nothing(make_tiny: MakeTiny, settings: dict[str, Any]) -> None:
    _, folder = make_tiny()

    def generate(ranks: Ranks, links: StageLinks | None = None) -> list[list[int]]:
        return generate_three(Driver(load(folder, ranks, links, pp_size=2 if links else 1, **settings)))

    [[found]] = run_stages(2, 1, generate)[-1:]
    assert found == generate(SingleRank())


def test_stages_follow_a_grammar_as_one_does_and_only_the_last_knows_it(make_tiny: MakeTiny) -> None:
    _, folder = make_tiny()

    def run(ranks: Ranks, links: StageLinks | None = None) -> list[list[int]]:
        driver = Driver(load(folder, ranks, links, pp_size=2 if links else 1, seed=3))
        if links is None or links.rank.is_output_rank:
            add_grammar(driver, 3, "regex", REGEX)
        return follow_grammar(driver, [3, 3, 3, 3, 0, 3])

    [[found]] = run_stages(2, 1, run)[-1:]
    assert found == run(SingleRank())


def test_a_prompt_in_chunks_is_scored_in_stages_as_in_one(make_tiny: MakeTiny) -> None:
    _, folder = make_tiny(num_hidden_layers=3)

    def score(ranks: Ranks, links: StageLinks | None = None) -> list[Tokens]:
        driver = Driver(load(folder, ranks, links, pp_size=3 if links else 1))
        return score_in_chunks(driver, IDS[:20], [7, 1, 12], 3)

    [[found]] = run_stages(3, 1, score)[-1:]
    for ours, theirs in zip(found, score(SingleRank()), strict=True):
        assert ours.scored_logprobs.size > 0
        for name in ("scored_logprobs", "scored_ranks", "scored_top_tokens", "scored_top_logprobs"):
            assert getattr(ours, name).tolist() == getattr(theirs, name).tolist()


def test_a_stage_reads_the_tensors_of_its_layers_alone_and_all_are_read(
    make_tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    taken: dict[int, set[str]] = {}
    take = Weights.take

    def note(self: Weights, name: str, *arguments: Any) -> torch.Tensor:
        taken.setdefault(id(self), set()).add(name)
        return take(self, name, *arguments)

    monkeypatch.setattr(Weights, "take", note)
    _, folder = make_tiny(num_hidden_layers=5, tie_word_embeddings=True)
    run_stages(3, 1, lambda ranks, links: load(folder, ranks, links, pp_size=3, pp_layer_split=(2, 1, 2)))
    by_stage = sorted(taken.values(), key=lambda names: min(name for name in names if ".layers." in name))
    layers = [{name.split(".")[2] for name in names if ".layers." in name} for names in by_stage]
    assert layers == [{"0", "1"}, {"2"}, {"3", "4"}]
    assert ["model.embed_tokens.weight" in names for names in by_stage] == [True, False, True]
    assert ["model.norm.weight" in names for names in by_stage] == [False, False, True]
    assert "unused_tensor" not in caplog.text


def test_the_end_of_a_stage_sums_what_ranks_have_by_the_kernel_that_also_norms_where_there_is_one() -> None:
    """GPU ranks have no all-reduce alone."""
    parts = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    weight, asked = torch.ones(2), []

    def all_reduce_add_rms_norm(
        partial: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        assert torch.equal(partial, parts[:1])
        asked.append(weight)
        residual += parts.sum(0)
        return rms_norm(residual, weight, eps)

    class TwoRanks(SingleRank):
        size = 2

        def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("it is fused")

    ops = replace(make_ops(), all_reduce_add_rms_norm=all_reduce_add_rms_norm)
    found = StreamEnd(ops, weight, TwoRanks()).finish(parts[:1], torch.tensor([[0.5, 0.25]]))
    assert found.tolist() == [[11.5, 22.25]]
    assert asked == [weight]


def test_a_tensor_that_no_stage_reads_is_named_once(make_tiny: MakeTiny, caplog: pytest.LogCaptureFixture) -> None:
    from safetensors.torch import load_file, save_file

    _, folder = make_tiny()
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.layers.0.extra.weight": torch.zeros(2)}, folder / "model.safetensors")
    run_stages(2, 1, lambda ranks, links: load(folder, ranks, links, pp_size=2))
    assert [each.getMessage() for each in caplog.records if "unused_tensor" in each.getMessage()] == [
        "event=unused_tensor name=model.layers.*.extra.weight count=1"
    ]


def test_stages_have_equal_sizes_although_one_has_less_memory(
    make_tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = make_tiny(num_hidden_layers=3)
    left = iter([3 << 30, 2 << 30] * 10)
    for module in ("toka_engine.model.cpu.backend", "toka_engine.model.worker"):
        monkeypatch.setattr(f"{module}.read_available_bytes", lambda device: next(left))

    def work(ranks: Ranks, links: StageLinks) -> Any:
        worker = load(folder, ranks, links, pp_size=2, kv_cache_num_tokens=None)
        worker.warm_up()
        return msgspec.structs.replace(worker.ready, num_layers=0)

    [[first], [second]] = run_stages(2, 1, work)
    assert first == second


@pytest.mark.parametrize(("pp_size", "tp_size", "left"), [(2, 1, "4.0"), (1, 2, "4.0"), (2, 2, "2.0")])
def test_ranks_on_cpus_divide_the_memory_that_all_of_them_see(
    pp_size: int, tp_size: int, left: str, make_tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = make_tiny()
    for module in ("toka_engine.model.cpu.backend", "toka_engine.model.worker"):
        monkeypatch.setattr(f"{module}.read_available_bytes", lambda device: 8 * 10**9)

    def work(ranks: Ranks, links: StageLinks) -> None:
        beside = links if pp_size > 1 else None
        load(folder, ranks, beside, pp_size=pp_size, tp_size=tp_size, kv_cache_num_tokens=10**9)

    with pytest.raises(OutOfMemoryError, match=rf"{left} GB of memory are available beside the weights"):
        run_stages(pp_size, tp_size, work)


def test_tokens_that_no_step_waits_for_are_taken_all_the_same() -> None:
    """Prompts whose outputs have one token: no step has decode rows for long, and one comes in the end."""
    first_links, last_links = link_stages(2).values()
    with ThreadPoolExecutor() as pool:
        connecting = pool.submit(StageExchange, first_links, 4, 8, 16, torch.float32)
        last = StageExchange(last_links, 4, 8, 16, torch.float32)
        first = connecting.result()
    state, num_steps = HostSlots(2), 3000
    for number in range(1, num_steps + 1):
        last.send_tokens(number, ints(0, 1), torch.tensor([number, 7], dtype=torch.int32))
        if number % 4 == 0:
            first.receive_tokens(0, state)
    assert not last_links.following.has_unsent
    assert state.last_tokens.tolist() == [num_steps, 7]
    first.receive_tokens(num_steps, state)


@pytest.mark.parametrize("num_stages", [2, 3, 5])
def test_stages_gather_what_each_of_them_gives_in_order(num_stages: int) -> None:
    def work(ranks: Ranks, links: StageLinks) -> list[list[bytes]]:
        return [links.gather(f"{turn} {links.rank.pp_rank}".encode()) for turn in range(3)]

    expected = [[f"{turn} {stage}".encode() for stage in range(num_stages)] for turn in range(3)]
    assert run_stages(num_stages, 1, work) == [[expected]] * num_stages


@pytest.mark.parametrize("values", [(5, 7, 9), (7, 5, 9), (9, 7, 5)])
def test_stages_agree_on_the_smallest_value_whichever_of_them_has_it(values: tuple[int, ...]) -> None:
    found = run_stages(3, 1, lambda ranks, links: links.agree_min(values[links.rank.pp_rank]))
    assert found == [[5], [5], [5]]


def test_a_stage_notices_that_a_neighbour_is_gone() -> None:
    for gone, left in ((0, 1), (1, 0)):
        links = list(link_stages(2).values())
        for end in links[gone].sockets:
            end.close()
        with pytest.raises(PeerClosedError):
            links[left].agree_min(1)


def test_stages_at_different_steps_end_with_both_values(make_tiny: MakeTiny) -> None:
    _, folder = make_tiny()

    def work(ranks: Ranks, links: StageLinks) -> None:
        driver = Driver(load(folder, ranks, links, pp_size=2))
        prompt = IDS[: 5 + links.rank.pp_rank]
        driver.prefill({0: prompt})

    words = (
        r"the ranks disagree on a step: model_pp0 has number=1 decode_rows=0 prefill_tokens=5 samples=1, "
        r"model_pp1 has number=1 decode_rows=0 prefill_tokens=6 samples=1"
    )
    with pytest.raises(RanksDisagreeError, match=words):
        run_stages(2, 1, work)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pp_size": 3}, "pp_size=3 is more than num_hidden_layers=2 of the model"),
        (
            {"pp_size": 2, "pp_layer_split": (1, 2)},
            "pp_layer_split=1,2 adds up to 3, num_hidden_layers=2 of the model",
        ),
    ],
)
def test_a_split_that_cannot_be_is_refused_with_both_numbers_before_weights_are_read(
    settings: dict[str, Any], message: str, make_tiny: MakeTiny
) -> None:
    _, folder = make_tiny()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=message):
        load(folder, None, None, **settings)


def test_steps_ahead_follow_the_stages() -> None:
    assert EngineConfig().choose_steps_ahead(is_cpu=True) == 2
    assert EngineConfig().choose_steps_ahead(is_cpu=False) == 3
    assert EngineConfig(pp_size=2).choose_steps_ahead(is_cpu=True) == 4
