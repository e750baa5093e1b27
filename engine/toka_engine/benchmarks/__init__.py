"""Benchmarks: each prints one JSON object and compares with a peer or a physical limit."""
