"""The GPU's path of penalties: tokens noted in pages, counted and applied there, without the host seeing one.

The real sampler, pages and planning run; in the model's place stands a table of logits by token, which needs neither
flashinfer nor a GPU. tests/gpu follows the same sequences with real models.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from toka_engine.messages import Step, Tokens
from toka_engine.model.attention_backend import AttentionShape, StepLayout
from toka_engine.model.sample_plan import plan_sampling
from toka_engine.model.slot_state import HostSlots

from tests.model.driving import Driver, ints
from tests.model.following_edits import follow_edited_choices, follow_edits
from tests.model.penalized import (
    CASES,
    Asked,
    follow_a_mixed_batch,
    follow_a_preempted_sequence,
    follow_choices_of_one_prompt,
    penalize,
    sampling_of,
)

VOCAB, SLOTS, PAGE_SIZE = 37, 12, 4
VOCAB_OF_EDITS = 67
"""All tokens of the cases of edits are in it."""
PROMPT = [5, 6, 7, 8, 9, 5, 10, 7, 5, 11, 11]


class TableRunner:
    """CudaRunner.launch with a look-up in the place of the forward: a token's logits like itself best."""

    def __init__(self, device: torch.device, vocab: int = VOCAB) -> None:
        from toka_engine.model.cuda.attention import CudaAttention
        from toka_engine.model.cuda.sampler import CudaSampler
        from toka_engine.model.kernels.device_slots import DeviceSlots

        shape = AttentionShape(1, 4, 2, 32, 1.0, torch.bfloat16, device)
        unplanned = SimpleNamespace(plan_queries=lambda *_: None)
        self.attention = CudaAttention(shape, kernels=unplanned)
        self.attention.allocate(100, PAGE_SIZE, SLOTS, 20)
        self.state = HostSlots(SLOTS)
        self.slots = DeviceSlots(SLOTS + 1, device)
        self.sample: Any = CudaSampler(3, self.slots, self.attention, SLOTS, vocab)
        random = torch.Generator().manual_seed(4)
        table = torch.randn(vocab, vocab, generator=random) + 3 * torch.eye(vocab)
        self.logits_of = table.to(device)  # fp32, as heads give them on a GPU

    def launch(self, step: Step) -> Any:
        from toka_engine.model.kernels.device_slots import gather_ids, pack_new_slots, set_slots
        from toka_engine.model.step_rows import find_sampled_rows

        device, attention = self.attention.shape.device, self.attention
        self.state.set_up(step)
        set_slots(self.slots, torch.from_numpy(pack_new_slots(step.new)).to(device))
        attention.append_pages(step.append_slots, step.append_indices, step.append_pages)
        attention.copy_pages(step.copy_from, step.copy_to)
        plan = plan_sampling(step, self.state)
        none = ints()
        lengths = self.state["length"][step.decode_slots]
        chunks = (step.prefill_slots, step.prefill_starts, step.prefill_lengths)
        attention.plan(StepLayout(step.decode_slots, lengths, *chunks, none, none, none, none))
        ids = torch.empty_like(attention.row_slots)
        prefill_tokens = torch.tensor(step.prefill_tokens, device=device)
        gather_ids(self.slots, attention.row_slots, prefill_tokens, step.decode_slots.size, ids)
        attention.write_tokens(ids)
        sampled = None
        if plan.slots.size:
            rows, logit_rows = find_sampled_rows(step)
            logits = self.logits_of[ids[torch.from_numpy(rows).to(device)].long()]
            shared = None if logit_rows is None else torch.from_numpy(logit_rows).to(device)
            sampled = self.sample(logits, shared, plan, self.state)
        self.state.advance(step)
        return step.number, sampled

    def finish(self, launched: Any) -> Tokens:
        number, sampled = launched
        if sampled is None:
            return Tokens(number, ints())
        logprobs = np.empty(0, np.float32) if sampled.logprobs is None else sampled.logprobs.cpu().numpy().copy()
        return Tokens(number, sampled.ids.cpu().numpy().copy(), logprobs)


@pytest.fixture
def driver(device) -> Driver:
    return make_driver(TableRunner(device))


@pytest.fixture
def edits_driver(device) -> Driver:
    return make_driver(TableRunner(device, VOCAB_OF_EDITS))


def make_driver(runner: TableRunner) -> Driver:
    worker: Any = SimpleNamespace(runner=runner, ready=SimpleNamespace(page_size=PAGE_SIZE))
    return Driver(worker)


@pytest.fixture
def few_at_a_time(driver: Driver, device) -> None:
    """Room for two samples with penalties: a step of more goes in parts."""
    from toka_engine.model.kernels.logit_penalties import PenaltyWorkspace

    driver._sample._penalty_work = PenaltyWorkspace.allocate(2, VOCAB, device)


def test_each_token_is_that_of_the_definition(driver: Driver) -> None:
    assert follow_a_mixed_batch(driver, [PROMPT, PROMPT[:3]], 13).num_changed > 25


def test_a_step_of_more_samples_than_there_is_room_for_goes_in_parts(driver: Driver, few_at_a_time: None) -> None:
    assert follow_a_mixed_batch(driver, [PROMPT, PROMPT[:3]], 7).num_changed > 10


def test_choices_of_one_prompt_see_its_tokens_before_and_after_the_copy_of_its_last_page(driver: Driver) -> None:
    assert follow_choices_of_one_prompt(driver, PROMPT, 8).num_changed > 10


def test_a_preempted_sequence_goes_on_as_if_nothing_had_happened(driver: Driver) -> None:
    undisturbed, again = follow_a_preempted_sequence(driver, PROMPT, 12)
    assert again.outputs[1] == undisturbed.outputs[0]


def test_counts_reach_beyond_what_one_program_reads_and_leave_nothing_behind(device) -> None:
    from toka_engine.model.kernels.logit_penalties import PenaltyInputs, PenaltyWorkspace, apply_penalties

    random = np.random.default_rng(5)
    lengths, num_generated = [2100, 1, 1024, 40], [1500, 0, 1024, 7]
    page_size, columns = 64, 33
    page_tokens = random.integers(0, VOCAB, (4 * columns, page_size))
    table = random.permutation(4 * columns).reshape(4, columns)
    asked = [CASES[name] for name in ("all", "presence", "repetition", "rewards")]
    logits = (torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(6)) * 3).to(device, torch.bfloat16)

    def int32(values: Any) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, np.int32)).to(device)

    rows = [5, 0, 3, 3]
    inputs = PenaltyInputs(
        int32(rows),
        int32([3, 1, 0, 2]),
        int32(lengths),
        int32(num_generated),
        *(torch.tensor(values, device=device) for values in sampling_of(asked).values()),
    )
    work = PenaltyWorkspace.allocate(5, VOCAB, device)
    before = logits.clone()
    for _ in range(2):
        changed = apply_penalties(logits, inputs, max(lengths), int32(table), int32(page_tokens), work)
        for index, (source, length, count) in enumerate(zip([3, 1, 0, 2], lengths, num_generated, strict=True)):
            tokens = page_tokens[table[source]].reshape(-1)[:length].tolist()
            expected = penalize(
                logits[rows[index]].cpu(), tokens[: length - count], tokens[length - count :], asked[index]
            )
            torch.testing.assert_close(changed[index].cpu(), expected, atol=1e-4, rtol=1e-5)
    assert not bool(work.counts.any())
    assert torch.equal(logits, before)


def test_logprobs_seeds_and_filters_of_a_mixed_step(driver: Driver) -> None:
    """All rows keep their place, and their logprobs are of the model's own distribution."""
    asked = [Asked(), CASES["all"], Asked(), CASES["repetition"], CASES["presence"]]
    slots = list(range(5))
    setup = driver.add_slots(
        slots,
        temperature=[0.0, 1.0, 1.0, 1.5, 0.0],
        top_k=[0, 2, 3, 0, 0],
        seed=[-1, 5, 6, -1, -1],
        num_logprobs=[-1, 0, 0, -1, 0],
        **sampling_of(asked),
    )
    outputs = [driver.prefill(dict.fromkeys(slots, PROMPT), **setup)]
    logits = [driver.logits.cpu()]
    for _ in range(5):
        outputs.append(driver.decode(slots))
        logits.append(driver.logits.cpu())
    history = [[int(tokens.ids[slot]) for tokens in outputs] for slot in slots]
    for step, (tokens, rows) in enumerate(zip(outputs, logits, strict=True)):
        own = torch.log_softmax(rows.double(), dim=1)
        for slot in (1, 2, 4):
            assert tokens.logprobs[slot] == pytest.approx(float(own[slot, tokens.ids[slot]]), abs=1e-4)
        for slot, kept in ((1, 2), (2, 3), (4, 1)):
            changed = penalize(rows[slot], PROMPT, history[slot][:step], asked[slot])
            assert tokens.ids[slot] in changed.topk(kept).indices.tolist()
        assert tokens.ids[0] == int(rows[0].argmax())
    assert history[1] == draw_alone(driver, asked[1])


def draw_alone(driver: Driver, asked: Asked) -> list[int]:
    """The seeded row of the mixed step with nobody beside it."""
    driver.reset()
    setup = driver.add_slots([6], temperature=1.0, top_k=2, seed=5, num_logprobs=0, **sampling_of([asked]))
    output = [int(driver.prefill({6: PROMPT}, **setup).ids[0])]
    return output + [int(driver.decode([6]).ids[0]) for _ in range(5)]


def test_a_row_that_is_not_finite_gives_minus_one_and_leaves_the_others(driver: Driver) -> None:
    runner: Any = driver.worker.runner
    runner.logits_of[20, 3] = float("nan")
    asked = [CASES["all"]] * 3
    setup = driver.add_slots([0, 1, 2], **sampling_of(asked))
    ids = driver.prefill({0: [4, 20], 1: [20, 4], 2: [4, 5]}, **setup).ids.tolist()
    assert ids[0] == -1
    assert min(ids[1:]) >= 0


@pytest.mark.parametrize("num_logprobs", [-1, 0])
def test_edits_are_those_of_the_definition_in_place_and_in_copies(edits_driver: Driver, num_logprobs: int) -> None:
    assert follow_edits(edits_driver, [PROMPT, PROMPT[:3]], 6, num_logprobs).num_changed > 3


def test_edits_of_more_samples_than_there_is_room_for_go_in_parts(edits_driver: Driver, few_at_a_time: None) -> None:
    assert follow_edits(edits_driver, [PROMPT, PROMPT[:3]], 3, 0).num_changed > 0


def test_edits_of_choices_that_share_their_logits_are_made_once(driver: Driver) -> None:
    assert follow_edited_choices(driver, PROMPT[:8], 6).num_changed > 0


def test_a_greedy_token_has_the_very_logprob_of_the_first_of_the_tops(driver: Driver) -> None:
    setup = driver.add_slots([0, 1], num_logprobs=[2, 0])
    driver.prefill({0: PROMPT, 1: PROMPT[:5]}, **setup)
    for _ in range(3):
        _, sampled = driver.launch_decode([0, 1])
        own = torch.log_softmax(driver.logits.double(), dim=1).amax(dim=1)
        assert sampled.logprobs[0] == sampled.top_logprobs[0, 0]
        torch.testing.assert_close(sampled.logprobs.double(), own, atol=1e-5, rtol=0)
