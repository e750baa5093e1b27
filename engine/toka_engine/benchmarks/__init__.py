"""Benchmarks: each prints JSON and compares with a peer or a physical limit; `plot` draws what they printed."""
