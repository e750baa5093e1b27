"""flashinfer's compiled attention kernels: which the engine needs, where they are found, how they are built.

`modules` is the one table, which both the engine (`kernels.paged`) and the build read; `python -m
toka_engine.model.compiled OUT_DIR` builds it, with no GPU, and our own kernels too (see `ahead`). An image layer copies
this folder with `errors` and `memory` alone, so that a change elsewhere compiles nothing of flashinfer's again: nothing
else of ours may be imported here, but where our own kernels are asked for.
"""
