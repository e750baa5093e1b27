"""Masks of allowed tokens on the GPU's path: the kernel, and the real sampler with rows of every kind side by side."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from toka_engine.model.sample_plan import Sampled, SamplePlan
from toka_engine.model.slot_state import HostSlots

from tests.marks import rest_is_slow
from tests.model.driving import Driver
from tests.unit.kernels.test_penalty_kernels import PAGE_SIZE, VOCAB, TableRunner

SAMPLING: dict[str, list[float]] = {  # by slot; slots 4 and 5 have no grammar
    "temperature": [0, 1.0, 0.8, 1.2, 0, 1.0, 0, 0.9],
    "seed": [-1, -1, 6, -1, -1, 8, -1, 9],
    "top_k": [0, 0, 0, 3, 0, 0, 0, 0],
    "top_p": [1, 1, 1, 1, 1, 1, 1, 0.8],
    "presence_penalty": [0, 0, 0, 0, 0, 0, 0.7, 0],
    "grammar": [1, 1, 1, 1, 0, 0, 1, 1],
}
SLOTS = len(SAMPLING["grammar"])


def unpack(words: np.ndarray[Any, Any], vocab_size: int) -> np.ndarray[Any, Any]:
    return np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, :vocab_size].astype(bool)


@pytest.mark.parametrize("vocab_size", [1, 37, 4096, 9001])
def test_a_mask_bars_the_tokens_whose_bit_is_zero_and_no_other_row(vocab_size: int, device: torch.device) -> None:
    from toka_engine.model.kernels.masking import apply_masks

    random = np.random.default_rng(3)
    logits = torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(2))
    words = random.integers(-(2**31), 2**31, (4, -(-vocab_size // 32)), dtype=np.int64).astype(np.int32)
    words[3] = words[0]
    logit_rows, samples = [4, 0, 2, 1, 4], [0, -1, 2, 4]  # samples 0 and 4 share a row, and a mask
    expected = logits.clone()
    for mask, sample in zip(unpack(words, vocab_size), samples, strict=True):
        if sample >= 0:
            expected[logit_rows[sample]][torch.from_numpy(~mask)] = float("-inf")
    changed = logits.to(device)
    int32 = lambda values: torch.tensor(values, dtype=torch.int32, device=device)  # noqa: E731
    apply_masks(changed, int32(logit_rows), int32(samples), torch.from_numpy(words).to(device))
    assert torch.equal(changed.cpu(), expected)


class Masked:
    """The sampler, with masks drawn at random for the rows that have a grammar; keeps what it was given and gave."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.steps: list[tuple[SamplePlan, torch.Tensor, np.ndarray[Any, Any], Sampled]] = []
        self._random = np.random.default_rng(11)

    def __call__(self, logits: torch.Tensor, rows: torch.Tensor | None, plan: SamplePlan, state: HostSlots) -> Sampled:
        before = (logits if rows is None else logits[rows.long()]).cpu().clone()
        count = plan.grammatical.size
        shape = count, -(-VOCAB // 32)
        masks = self._random.integers(-(2**31), 2**31, shape, dtype=np.int64).astype(np.int32)
        masks[:, 0] |= 32
        allowed = unpack(masks.copy(), VOCAB)
        if count:
            plan = replace(plan, masks=masks)
        sampled = self.sampler(logits, rows, plan, state)
        logprobs = None if sampled.logprobs is None else sampled.logprobs.clone()  # buffers are used again
        self.steps.append((plan, before, allowed, replace(sampled, ids=sampled.ids.clone(), logprobs=logprobs)))
        return sampled


@pytest.mark.parametrize("num_logprobs", rest_is_slow([2], [-1, 0, 2]))
def test_rows_with_a_mask_sample_what_it_allows_and_the_others_what_they_like(
    num_logprobs: int, device: torch.device
) -> None:
    worker: Any = SimpleNamespace(runner=TableRunner(device), ready=SimpleNamespace(page_size=PAGE_SIZE))
    masked = Masked(worker.runner.sample)
    worker.runner.sample = masked
    driver = Driver(worker)
    asked = [num_logprobs if slot % 3 else -1 for slot in range(SLOTS)]
    new = driver.add_slots(list(range(SLOTS)), **SAMPLING, num_logprobs=asked)
    driver.prefill({slot: [5, 6, 7 + slot] for slot in range(SLOTS)}, **new)
    for _ in range(6):
        driver.decode(list(range(SLOTS)))
    num_barred = 0
    for plan, logits, allowed, sampled in masked.steps:
        ids = sampled.ids.cpu().numpy()
        greedy = set(plan.greedy.tolist())
        penalized = set() if plan.penalties is None else set(plan.penalties.rows.tolist())
        for row, mask in zip(plan.grammatical.tolist(), allowed, strict=True):
            assert mask[ids[row]], row
            best = int(logits[row].argmax())
            num_barred += not mask[best]
            if row in greedy and row not in penalized:
                barred = torch.from_numpy(~mask)
                assert ids[row] == int(logits[row].masked_fill(barred, float("-inf")).argmax())
        for row in greedy.difference(plan.grammatical.tolist()):
            assert ids[row] == int(logits[row].argmax())
        if plan.has_logprobs:
            assert sampled.logprobs is not None
            expected = torch.log_softmax(logits, dim=1)[torch.arange(ids.size), torch.from_numpy(ids).long()]
            rows = np.flatnonzero(np.array(asked)[plan.slots] >= 0)
            np.testing.assert_allclose(sampled.logprobs.cpu().numpy()[rows], expected.numpy()[rows], atol=1e-4)
    assert num_barred > 5
