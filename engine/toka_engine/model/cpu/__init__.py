"""The CPU backend: operators, paged attention and sampler in plain torch and numpy."""
