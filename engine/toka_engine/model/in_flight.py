"""The number of steps in flight on a GPU, and the size of rings of buffers that follows from it."""

MAX_STEPS_IN_FLIGHT = 2
"""Steps that may be launched before the first one's tokens are on the host."""
RING_SIZE = 4
"""Buffers in rotation wherever a step in flight may still use the one it got. More than MAX_STEPS_IN_FLIGHT."""
