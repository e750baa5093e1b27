"""Stand-in for the model process."""

from tests.unit.engine.standins.behaviour import behave
from toka_engine.child import run_child

run_child("model", behave)
