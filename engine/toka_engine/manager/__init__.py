"""The manager process: slots, KV pages, prefix tree, admission, scheduling. Plain Python and numpy, no
torch."""
