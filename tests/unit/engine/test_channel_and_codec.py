"""Messages over real socket pairs: whole, in order, and to the last one before the end."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toka_engine.channel import Channel, broadcast, socket_pair, wait
from toka_engine.codec import Decoder, encode
from toka_engine.errors import MessageError, PeerClosedError
from toka_engine.messages import (
    Cancel,
    Deltas,
    ManagerToServer,
    ManagerToWorker,
    ServerToManager,
    Step,
    Stop,
    Submit,
    Tokens,
    WorkerToManager,
)
from toka_engine.slot_parameters import Sampling

int32s = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=50).map(lambda values: np.array(values, np.int32))
int64s = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=50).map(lambda values: np.array(values, np.int64))
floats = st.lists(st.floats(width=32), max_size=50).map(lambda values: np.array(values, np.float32))


def pair() -> tuple[Channel[Any], Channel[Any]]:
    left, right = socket_pair()
    return Channel(left, ServerToManager), Channel(right, ServerToManager)


def assert_same(one: msgspec.Struct, other: msgspec.Struct) -> None:
    assert type(one) is type(other)
    for name in one.__struct_fields__:
        first, second = getattr(one, name), getattr(other, name)
        if isinstance(first, np.ndarray):
            assert first.dtype == second.dtype
            assert np.array_equal(first, second, equal_nan=first.dtype.kind == "f")
        else:
            assert first == second


@given(int32s, st.integers(1, 100), st.lists(st.integers(0, 2**31), max_size=5))
def test_a_submit_survives_the_wire(prompt: Any, num_choices: int, stop_ids: list[int]) -> None:
    message = Submit(7, num_choices, prompt, 20, Sampling(seed=2**63 - 1, top_p=0.5), tuple(stop_ids), True)
    assert_same(Decoder[Any](ServerToManager).decode(encode(message)), message)


@given(int64s, int32s, floats)
def test_deltas_survive_the_wire(streams: Any, tokens: Any, logprobs: Any) -> None:
    message = Deltas(streams=streams, tokens=tokens, logprobs=logprobs, ended_reasons=np.array([1, 2], np.uint8))
    assert_same(Decoder[Any](ManagerToServer).decode(encode(message)), message)


@given(int32s, floats)
def test_tokens_survive_the_wire(ids: Any, logprobs: Any) -> None:
    assert_same(Decoder[Any](WorkerToManager).decode(encode(Tokens(3, ids, logprobs))), Tokens(3, ids, logprobs))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_message_error(data: bytes) -> None:
    decoder: Decoder[Any] = Decoder(ManagerToWorker)
    try:
        assert isinstance(decoder.decode(data), Step | Stop)
    except MessageError:
        return


@pytest.mark.parametrize("array", [np.zeros((2, 2), np.int32), np.zeros(2, np.float64), np.zeros(2, object)])
def test_what_is_no_flat_array_of_a_known_type_is_not_sent(array: Any) -> None:
    with pytest.raises(MessageError):
        encode(Cancel(array))


def test_decoded_arrays_cannot_be_written() -> None:
    decoded = Decoder[Any](ServerToManager).decode(encode(Cancel(np.array([1], np.int64))))
    with pytest.raises(ValueError, match="read-only"):
        decoded.streams[0] = 2


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=20))
def test_messages_of_any_size_arrive_whole_and_in_order(sizes: list[int]) -> None:
    sender, receiver = pair()
    for number, size in enumerate(sizes):
        sender.send(Cancel(np.full(size, number, np.int64)))
    received: list[Any] = []
    while len(received) < len(sizes):
        received += receiver.receive(10.0)
    assert [message.streams.tolist() for message in received] == [[n] * size for n, size in enumerate(sizes)]
    sender.close()
    receiver.close()


def test_a_broadcast_reaches_every_peer_in_order_with_what_is_sent_to_it_alone() -> None:
    pairs = [pair() for _ in range(3)]
    senders = [sender for sender, _ in pairs]
    for number in range(5):
        broadcast(senders, Cancel(np.array([number], np.int64)))
        senders[1].send(Cancel(np.array([-number], np.int64)))
    for index, (sender, receiver) in enumerate(pairs):
        received: list[Any] = []
        while len(received) < (10 if index == 1 else 5):
            received += receiver.receive(10.0)
        told = [int(message.streams[0]) for message in received]
        assert told == ([sign * number for number in range(5) for sign in (1, -1)] if index == 1 else list(range(5)))
        sender.close()
        receiver.close()


def test_send_never_blocks_and_wait_sends_what_is_left() -> None:
    sender, receiver = pair()
    count = 200
    for number in range(count):
        sender.send(Cancel(np.full(100_000, number, np.int64)))
    assert sender.has_unsent
    received: list[Any] = []

    def receive() -> None:
        while len(received) < count:
            received.extend(receiver.receive(10.0))

    reader = threading.Thread(target=receive)
    reader.start()
    while sender.has_unsent:
        wait([sender], 0.01)
    reader.join(60.0)
    assert [int(message.streams[0]) for message in received] == list(range(count))
    sender.close()
    receiver.close()


class LingeringSocket(socket.socket):
    """A real socket whose every write gives the other threads time to come in between."""

    def send(self, data: Any, flags: int = 0) -> int:
        sent = super().send(data, flags)
        time.sleep(0.0005)
        return sent


def test_threads_that_write_at_once_do_not_mix_their_messages() -> None:
    left, right = socket_pair()
    sender: Channel[Any] = Channel(LingeringSocket(fileno=left.detach()), ServerToManager)
    receiver: Channel[Any] = Channel(right, ServerToManager)
    num_threads, count = 3, 50
    problems: list[BaseException] = []

    def watched(work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException as problem:
                problems.append(problem)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def send(number: int) -> None:
        for index in range(count):
            sender.send(Cancel(np.full(1 + 20_000 * (index % 3), number * count + index, np.int64)))

    senders = [watched(lambda number=number: send(number)) for number in range(num_threads)]

    def write_rest() -> None:
        while sender.has_unsent or any(thread.is_alive() for thread in senders):
            wait([sender], 0.001)

    writer = watched(write_rest)
    received: list[list[int]] = []
    while len(received) < num_threads * count and (messages := receiver.receive(10.0)):
        received += [message.streams.tolist() for message in messages]
    for thread in (*senders, writer):
        thread.join(60.0)
    assert not problems
    for number in range(num_threads):
        of_thread = [values for values in received if values[0] // count == number]
        assert of_thread == [[number * count + index] * (1 + 20_000 * (index % 3)) for index in range(count)]
    sender.close()
    receiver.close()


def test_everything_sent_before_the_end_arrives_and_then_the_end_is_told() -> None:
    sender, receiver = pair()
    for number in range(100):
        sender.send(Cancel(np.array([number], np.int64)))
    sender.close()
    received: list[Any] = []
    while len(received) < 100:
        received += receiver.receive(10.0)
    with pytest.raises(PeerClosedError):
        receiver.receive(10.0)
    receiver.close()


def test_sending_to_a_closed_peer_is_told() -> None:
    sender, receiver = pair()
    receiver.close()
    with pytest.raises(PeerClosedError):
        sender.send(Stop())
    sender.close()


def test_receiving_gives_up_after_its_timeout() -> None:
    sender, receiver = pair()
    assert receiver.receive(0.01) == []
    sender.close()
    receiver.close()


def test_a_frame_that_claims_to_be_huge_is_refused() -> None:
    left, right = socket_pair()
    receiver: Channel[Any] = Channel(right, ServerToManager)
    left.sendall(struct.pack("<I", 2**31))
    with pytest.raises(MessageError, match="frame of 2147483648 bytes"):
        receiver.receive(10.0)
    left.close()
    receiver.close()
