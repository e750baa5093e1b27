"""Stand-in for the manager process."""

from toka_engine.child import run_child

from tests.unit.engine.standins.behaviour import behave

run_child("manager", behave)
