"""Replicas of the operator differ where it matters: their names for the Lease, and when they ask for it."""

from __future__ import annotations

from toka_operator.lease import next_try_s
from toka_operator.settings import read_settings

REQUIRED = {"TOKA_ENGINE_IMAGE": "engine:1"}


def test_operators_of_one_host_have_names_of_their_own_for_the_lease() -> None:
    assert len({read_settings(REQUIRED).identity for _ in range(10)}) == 10


def test_an_identity_that_is_given_is_used_so_that_a_restarted_pod_has_its_lease_at_once() -> None:
    assert read_settings({**REQUIRED, "TOKA_IDENTITY": "toka-0"}).identity == "toka-0"


def test_those_that_wait_for_the_lease_do_not_ask_in_step_and_a_leader_renews_on_time() -> None:
    for lapses_in_s in (-30.0, 9.0):
        waits = [next_try_s(2.0, False, lapses_in_s) for _ in range(50)]
        assert len({*waits}) == 50
        assert all(2.0 <= wait <= 2.4 for wait in waits)
    assert next_try_s(2.0, True, 9.0) == 2.0


def test_those_that_wait_try_as_soon_as_the_lease_lapses() -> None:
    waits = [next_try_s(2.0, False, 0.5) for _ in range(50)]
    assert len({*waits}) == 50
    assert all(0.5 <= wait <= 0.9 for wait in waits)
