"""Checks that a worker follows the definition of logit edits token by token, on any device."""

from __future__ import annotations

import torch

from tests.model.driving import Driver
from tests.model.edited import make_edits, slot_edits
from tests.model.penalized import Asked, Follower, sampling_of

BIAS = {5: 3.0, 6: -2.5, 7: float("-inf"), 9: -100.0, 11: -8.0}
PAIRS = [[token, other] for token in range(64) for other in range(token % 2, 64, 2)]
"""Words that leave a token of the other parity alone behind each token."""
TRIPLES = [[token, other, token] for token in range(64) for other in range(1, 64, 2)]
CASES = {
    "plain": Asked(),
    "bias": Asked(edits=make_edits(BIAS)),
    "allowed": Asked(edits=make_edits(allowed=[3, 4, 30])),
    "min_tokens": Asked(edits=make_edits(ends=[5, 8, 11], min_tokens=5)),
    "all": Asked(0.4, 0.3, 1.15, make_edits(BIAS, [*range(4, 11), *range(12, 30)], [5, 12], 3)),
    "words": Asked(edits=make_edits(words=PAIRS)),
    "longer words": Asked(edits=make_edits({5: 1.0}, words=[*TRIPLES, *PAIRS[:80]], ends=[5], min_tokens=2)),
    "words and penalties": Asked(frequency=0.7, edits=make_edits(words=PAIRS)),
    "penalties": Asked(frequency=0.7),
    "bias and repetition": Asked(repetition=2.0, edits=make_edits({5: -6.0, 8: -4.0, 9: 5.0})),
}


def follow_edits(driver: Driver, prompts: list[list[int]], num_tokens: int, num_logprobs: int = -1) -> Follower:
    """One greedy sequence per case side by side, two steps in flight; `num_logprobs` in every other one."""
    driver.reset()
    follower = Follower(driver)
    asked = list(CASES.values())
    slots = list(range(len(asked)))
    for slot in slots:
        follower.begin(slot, prompts[slot % len(prompts)], asked[slot])
    logprobs = [num_logprobs if slot % 2 else -1 for slot in slots]
    setup = driver.add_slots(slots, num_logprobs=logprobs, **sampling_of(asked))
    setup["edits"] = slot_edits({slot: asked[slot].edits for slot in slots})
    tokens = driver.prefill({slot: follower.prompts[slot] for slot in slots}, **setup)
    follower.take(slots, tokens.ids.tolist())
    for _ in range(num_tokens - 1):
        tokens = driver.decode(slots)
        own = torch.log_softmax(driver.logits.cpu().double(), dim=1)
        follower.take(slots, tokens.ids.tolist())
        if num_logprobs >= 0:
            for slot in slots[1::2]:
                found = own[slot, int(tokens.ids[slot])]
                torch.testing.assert_close(float(tokens.logprobs[slot]), float(found), atol=2e-5, rtol=0)
    return follower


def follow_edited_choices(driver: Driver, prompt: list[int], num_tokens: int) -> Follower:
    """Three choices of one prompt, sampled from one row of logits: its edits are made once."""
    driver.reset()
    follower = Follower(driver)
    asked = Asked(edits=make_edits(BIAS, ends=[8], min_tokens=2))
    for slot in range(3):
        follower.begin(slot, prompt, asked)
    setup = driver.add_slots([0, 1, 2])
    setup["edits"] = slot_edits(dict.fromkeys(range(3), asked.edits))
    tokens = driver.prefill({0: prompt}, fanout={0: [0, 1, 2]}, **setup)
    follower.take([0, 1, 2], tokens.ids.tolist())
    for slot in (1, 2):
        driver.run(**driver.share_pages(slot, driver.pages[0], len(prompt)))
    follower.decode_ahead([0, 1, 2], num_tokens - 1)
    assert follower.outputs[0] == follower.outputs[1] == follower.outputs[2]
    return follower
