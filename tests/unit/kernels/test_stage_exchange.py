"""Rows and tokens reach the stage that waits for them, whichever stage is ahead; simulated on one device."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

BF16 = torch.bfloat16
WIDTH, MAX_ROWS, NUM_SLOTS = 96, 8, 40


@dataclass
class Stages:
    """The ports of all stages, and the memory that their addresses point into."""

    ports: list
    flags: torch.Tensor
    places: torch.Tensor
    tokens: torch.Tensor


def make_stages(
    device: torch.device,
    num_stages: int,
    num_places: int,
    is_open: bool = True,
    width: int = WIDTH,
    max_rows: int = MAX_ROWS,
) -> Stages:
    from toka_engine.model.kernels.stage_exchange import FLAG_WORDS, StagePorts

    flags = torch.zeros(num_stages, FLAG_WORDS, dtype=torch.int32, device=device)
    places = torch.zeros(num_stages, num_places, max_rows, width, dtype=BF16, device=device)
    tokens = torch.full((NUM_SLOTS,), -1, dtype=torch.int32, device=device)
    ports = []
    for index in range(num_stages):
        before, behind = (index - 1) % num_stages, (index + 1) % num_stages
        pointers = flags[before], flags[behind], places[behind], flags[0], tokens
        ports.append(
            StagePorts(
                index == 0, index == num_stages - 1, True, num_places, max_rows, width,
                torch.tensor([int(is_open), 0, 0], dtype=torch.int64, device=device), flags[index],
                places[index] if index else None,
                torch.tensor([each.data_ptr() for each in pointers], dtype=torch.int64, device=device),
                max_rows * width // 2,
            )
        )  # fmt: skip
    return Stages(ports, flags, places, tokens)


@pytest.mark.parametrize(("num_stages", "num_places"), [(2, 2), (2, 3), (4, 5)])
def test_rows_pass_all_stages_in_order_whichever_stage_is_ahead(device, generator, num_stages, num_places) -> None:
    from toka_engine.model.kernels.stage_exchange import begin_step, put_rows, send_tokens, take_rows

    stages, num_steps = make_stages(device, num_stages, num_places), 12
    chance = random.Random(num_stages)
    sizes = [chance.randint(1, MAX_ROWS) for _ in range(num_steps)]
    inputs = [torch.randn(size, WIDTH, generator=generator, device=device).to(BF16) for size in sizes]
    last_token = torch.zeros(NUM_SLOTS, dtype=torch.int32, device=device)
    done = [0] * num_stages

    def can_go(stage: int) -> bool:
        """Whether the kernels of the stage's next step, launched one after the other here, would not wait."""
        step = done[stage]
        has_rows = stage == 0 or done[stage - 1] > step
        # A place comes back as the stage behind begins the step after the one that was in it.
        has_place = stage == num_stages - 1 or done[stage + 1] >= step + 2 - num_places
        has_token = stage > 0 or done[-1] >= step + 1 - num_places
        return step < num_steps and has_rows and has_place and has_token

    def run_step(stage: int) -> None:
        ports, step = stages.ports[stage], done[stage]
        begin_step(ports, step + 1, max(0, step + 1 - num_places))
        if stage == 0:
            if step >= num_places:
                assert int(stages.tokens[3]) >= step - num_places
            rows = inputs[step].clone()
        else:
            rows = take_rows(ports, sizes[step])
        rows += stage + 1
        if stage < num_stages - 1:
            put_rows(ports, rows)
        else:
            expected = inputs[step].clone()
            for each in range(num_stages):
                expected += each + 1
            assert torch.equal(rows, expected), f"step {step}"
            last_token[3] = step
            slots = torch.tensor([3, 5], dtype=torch.int32, device=device)
            send_tokens(ports, slots, last_token)
            assert int(stages.tokens[3]) == step
        done[stage] += 1

    while done[-1] < num_steps:
        run_step(chance.choice([stage for stage in range(num_stages) if can_go(stage)]))
    assert int(stages.tokens[4]) == -1, "no other slot is written"


def launch_beside(device: torch.device, launch: Callable[[], None]) -> Callable[[], bool]:
    """Launch a kernel that waits; the result tells whether it has ended."""
    if device.type == "cuda":
        with torch.cuda.stream(torch.cuda.Stream()):
            launch()
            event = torch.cuda.Event()
            event.record()
        return event.query
    thread = threading.Thread(target=launch, daemon=True)
    thread.start()
    return lambda: not thread.is_alive()


@pytest.mark.parametrize(
    ("stage", "num_begun", "after", "flag", "needed"),
    [
        (1, 0, 0, "ROWS", 1),
        (1, 3, 0, "ROWS", 4),
        (0, 2, 0, "PLACES", 1),
        (0, 4, 0, "PLACES", 3),
        (0, 0, 5, "TOKENS", 5),
    ],
)
def test_a_step_begins_when_what_it_waits_for_is_there_and_no_sooner(
    device, stage: int, num_begun: int, after: int, flag: str, needed: int
) -> None:
    """Rows of the stage before, a place in the stage behind, of which there are two, or tokens of the last one."""
    from toka_engine.model.kernels import stage_exchange

    stages = make_stages(device, 2, 2)
    ports, at = stages.ports[stage], getattr(stage_exchange, f"{flag}_FLAG")
    ports.state[1] = num_begun
    has_ended = launch_beside(device, lambda: stage_exchange.begin_step(ports, 9, after))
    try:
        for value in range(needed):
            stages.flags[stage, at] = value
            threading.Event().wait(0.05)
            assert not has_ended(), f"it began at {value}"
    finally:
        stages.flags[stage, at] = needed
    while not has_ended():
        threading.Event().wait(0.001)
    assert ports.state.tolist() == [1, num_begun + 1, 9]
    given_back = stages.flags[0, stage_exchange.PLACES_FLAG] if stage else num_begun
    assert int(given_back) == num_begun, "the place of the step before is free, that of this one is not"


def test_a_step_with_more_tokens_than_a_program_has_threads_sends_them_all(device) -> None:
    from toka_engine.model.kernels.stage_exchange import TOKENS_FLAG, begin_step, put_rows, send_tokens

    stages = make_stages(device, 2, 2)
    first, last = stages.ports
    stages.tokens = torch.zeros(1000, dtype=torch.int32, device=device)
    last.addresses[4] = stages.tokens.data_ptr()
    begin_step(first, 2**31 + 5, 0)
    put_rows(first, torch.zeros(1, WIDTH, device=device).to(BF16))
    begin_step(last, 2**31 + 5, 0)
    last_token = torch.arange(1000, dtype=torch.int32, device=device) * 3
    slots = torch.arange(999, 400, -1, dtype=torch.int32, device=device)
    send_tokens(last, slots, last_token)
    assert torch.equal(stages.tokens[401:], last_token[401:])
    assert not stages.tokens[:401].any()
    assert int(stages.flags[0, TOKENS_FLAG]) == 5 - 2**31, "numbers go round after 32 bits"


def test_the_first_stage_goes_on_where_numbers_have_gone_round(device) -> None:
    from toka_engine.model.kernels.stage_exchange import TOKENS_FLAG, begin_step

    first = make_stages(device, 2, 3).ports[0]
    first.flags[TOKENS_FLAG] = 3 - 2**31
    begin_step(first, 2**31 + 4, 2**31 + 3)
    begin_step(first, 2**31 + 5, 2**31 - 1)
    assert first.state.tolist() == [1, 2, 5 - 2**31]


def test_a_stage_that_is_not_open_neither_waits_nor_sends(device) -> None:
    from toka_engine.model.kernels.stage_exchange import begin_step, put_rows, send_tokens, take_rows

    stages = make_stages(device, 3, 2, is_open=False)
    rows = torch.ones(4, WIDTH, device=device).to(BF16)
    for _ in range(4):
        for ports in reversed(stages.ports):
            begin_step(ports, 7, 6)
            if not ports.is_first:
                assert not take_rows(ports, 4).any()
            if not ports.is_last:
                put_rows(ports, rows)
        send_tokens(stages.ports[-1], torch.zeros(1, dtype=torch.int32, device=device), torch.ones_like(stages.tokens))
    assert not stages.flags.any()
    assert not stages.places.any()
    assert all(ports.state.tolist() == [0, 0, 0] for ports in stages.ports)


def test_a_rank_that_hands_no_rows_over_raises_its_flags_alone(device) -> None:
    from dataclasses import replace

    from toka_engine.model.kernels.stage_exchange import ROWS_FLAG, begin_step, put_rows, take_rows

    stages = make_stages(device, 2, 2)
    first = replace(stages.ports[0], has_rows=False)
    last = replace(stages.ports[1], has_rows=False, places=None)
    begin_step(first, 1, 0)
    put_rows(first, torch.ones(4, WIDTH, device=device).to(BF16))
    assert int(stages.flags[1, ROWS_FLAG]) == 1
    assert not stages.places.any()
    begin_step(last, 1, 0)
    assert not take_rows(last, 4).any()


def test_rows_of_another_width_or_too_many_are_refused(device) -> None:
    from toka_engine.model.kernels.stage_exchange import put_rows

    first = make_stages(device, 2, 2).ports[0]
    for shape in ((MAX_ROWS + 1, WIDTH), (1, WIDTH + 2)):
        with pytest.raises(AssertionError, match="are not what the places are for"):
            put_rows(first, torch.zeros(shape, device=device).to(BF16))
