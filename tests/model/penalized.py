"""Penalties by their definition, and the check that a worker follows it token by token, on any device.

The reference is a loop over the tokens that a sequence has, so plain that it can be compared with the words of OpenAI's
and transformers' documentation.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from toka_engine.messages import LogitEdits
from toka_engine.slot_parameters import SlotBatch

from tests.model.driving import Driver, ints
from tests.model.edited import edit


@dataclass(frozen=True)
class Asked:
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    edits: LogitEdits | None = None
    """Made before penalties, by the definition in `tests.model.edited`."""


PLAIN = Asked()
CASES = {
    "plain": PLAIN,
    "presence": Asked(presence=1.5),
    "frequency": Asked(frequency=0.7),
    "repetition": Asked(repetition=1.3),
    "all": Asked(presence=0.4, frequency=0.3, repetition=1.15),
    "rewards": Asked(presence=-1.0, frequency=-0.2, repetition=0.9),
}


def penalize(logits: torch.Tensor, prompt: list[int], generated: list[int], asked: Asked) -> torch.Tensor:
    """A changed copy of logits [vocab], in fp32."""
    changed = edit(logits.float().clone(), asked.edits, generated) if asked.edits else logits.float().clone()
    for token in {*prompt, *generated}:
        value = changed[token]
        changed[token] = value / asked.repetition if value > 0 else value * asked.repetition
    for token, count in Counter(generated).items():
        changed[token] -= asked.frequency * count
        changed[token] -= asked.presence
    return changed


def sampling_of(asked: list[Asked]) -> dict[str, list[float]]:
    """The sampling parameters that `Driver.add_slots` takes."""
    return {
        f"{name}_penalty": [getattr(each, name) for each in asked] for name in ("presence", "frequency", "repetition")
    }


class Follower:
    """Runs greedy sequences and compares each token with the definition over the logits that the sampler was given."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.prompts: dict[int, list[int]] = {}
        self.outputs: dict[int, list[int]] = {}
        self.asked: dict[int, Asked] = {}
        self.num_changed = 0
        """Tokens that would have been others without penalties."""

    def begin(self, slot: int, prompt: list[int], asked: Asked, outputs: list[int] | None = None) -> None:
        """Note a sequence; `outputs`: what it has generated before it comes to this slot."""
        self.prompts[slot], self.asked[slot] = prompt, asked
        self.outputs[slot] = list(outputs or [])

    def take(self, slots: list[int], ids: list[int], of_sampler: torch.Tensor | None = None) -> None:
        """Check what a step sampled for `slots`; driver.logits, or those given, have a row for each."""
        rows = (self.driver.logits if of_sampler is None else of_sampler).cpu()
        for slot, token, logits in zip(slots, ids, rows, strict=True):
            expected = penalize(logits, self.prompts[slot], self.outputs[slot], self.asked[slot])
            assert token == int(expected.argmax()), (slot, len(self.outputs[slot]))
            self.num_changed += token != int(logits.argmax())
            self.outputs[slot].append(token)

    def prefill(self, slot: int, ids: list[int], **new: object) -> None:
        """The (rest of the) slot's tokens in one chunk, then its next token."""
        setup = new or self.driver.add_slots([slot], **sampling_of([self.asked[slot]]))
        self.take([slot], self.driver.prefill({slot: ids}, **setup).ids.tolist())

    def decode(self, slots: list[int], num_steps: int) -> None:
        for _ in range(num_steps):
            self.take(slots, self.driver.decode(slots).ids.tolist())

    def decode_ahead(self, slots: list[int], num_steps: int) -> None:
        """Decodes with each two steps launched before the tokens of either are asked for."""
        for _ in range(num_steps // 2):
            launched = [(self.driver.launch_decode(slots), self.driver.logits) for _ in range(2)]
            for step, logits in launched:
                self.take(slots, self.driver.worker.runner.finish(step).ids.tolist(), logits)


def follow_a_mixed_batch(driver: Driver, prompts: list[list[int]], num_tokens: int) -> Follower:
    """One sequence per case side by side, those without penalties among them; the same prompts in turn. One step is
    always on its way when the next one is launched."""
    driver.reset()
    follower = Follower(driver)
    asked = list(CASES.values())
    slots = list(range(len(asked)))
    for slot in slots:
        follower.begin(slot, prompts[slot % len(prompts)], asked[slot])
    setup = driver.add_slots(slots, **sampling_of(asked))
    follower.take(slots, driver.prefill({slot: follower.prompts[slot] for slot in slots}, **setup).ids.tolist())
    follower.decode_ahead(slots, num_tokens - 1)
    return follower


def follow_choices_of_one_prompt(driver: Driver, prompt: list[int], num_tokens: int) -> Follower:
    """Three choices sampled from one chunk, two of which then get a copy of the prompt's last page."""
    driver.reset()
    follower = Follower(driver)
    asked = Asked(presence=2.0, frequency=1.0, repetition=3.0)
    num_full, last = divmod(len(prompt), driver.page_size)
    assert last > 0
    for slot in range(3):
        follower.begin(slot, prompt, asked)
    setup = driver.add_slots([0, 1, 2], **sampling_of([asked] * 3))
    follower.take([0, 1, 2], driver.prefill({0: prompt}, fanout={0: [0, 1, 2]}, **setup).ids.tolist())
    source = driver.pages[0][num_full]
    for slot in (1, 2):
        copied = driver.share_pages(slot, driver.pages[0][:num_full], len(prompt))
        page = int(copied["append_pages"][-1])
        driver.run(**copied, copy_from=ints(source), copy_to=ints(page))
    follower.decode([0, 1, 2], num_tokens - 1)
    assert follower.outputs[0] == follower.outputs[1] == follower.outputs[2]
    return follower


def follow_a_preempted_sequence(driver: Driver, prompt: list[int], num_tokens: int) -> tuple[Follower, Follower]:
    """The same sequence undisturbed, and taken out in the middle: prefilled again on pages that it finds again."""
    driver.reset()
    asked = Asked(presence=2.0, frequency=1.0, repetition=1.5)
    undisturbed = Follower(driver)
    undisturbed.begin(0, prompt, asked)
    undisturbed.prefill(0, prompt)
    undisturbed.decode([0], num_tokens - 1)
    kept = undisturbed.outputs[0][: num_tokens // 2]
    known = prompt + kept
    num_found = (len(known) - 1) // driver.page_size
    assert num_found * driver.page_size > len(prompt), "some generated tokens are found, others prefilled"
    again = Follower(driver)
    again.begin(1, prompt, asked, kept)
    setup = driver.add_slots([1], num_found * driver.page_size, num_sampled=len(kept), **sampling_of([asked]))
    driver.run(**setup, **driver.share_pages(1, driver.pages[0][:num_found], num_found * driver.page_size))
    again.prefill(1, known[num_found * driver.page_size :], new=SlotBatch())
    again.decode([1], num_tokens - len(kept) - 1)
    return undisturbed, again
