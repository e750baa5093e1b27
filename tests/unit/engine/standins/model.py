"""Stand-in for the model process."""

from toka_engine.child import run_child

from tests.unit.engine.standins.behaviour import behave

run_child("model", behave)
