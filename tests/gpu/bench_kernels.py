# ruff: noqa: B023 (each closure is called before the loop goes on)
"""Times each kernel of the GPU path at the shapes of the 1B model, beside what its bytes cost at 4.2 TB/s."""

from __future__ import annotations

from collections.abc import Callable

import torch
from toka_engine.model.kernels.activation import silu_mul
from toka_engine.model.kernels.device_slots import DeviceSlots
from toka_engine.model.kernels.filtering import apply_filters
from toka_engine.model.kernels.norm import add_rms_norm
from toka_engine.model.kernels.rope_append import rope_append
from toka_engine.model.kernels.sampling import Samples, Workspace, block_stats, sample_tokens
from toka_engine.model.kernels.seeded_sampling import add_noise
from toka_engine.model.kernels.top_k_gathering import gather_best
from toka_engine.model.kernels.top_p_rejection import sample_by_rejection
from toka_engine.output import run_command
from triton.testing import do_bench

DEVICE = torch.device("cuda")
BYTES_PER_S = 4.2e12


def report(name: str, run: Callable[[], None], num_bytes: float) -> None:
    took_us = do_bench(run, warmup=10, rep=40, return_mode="median") * 1e3
    print(f"{name:50s} {took_us:9.1f} us   bound {num_bytes / BYTES_PER_S * 1e6:9.1f} us", flush=True)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).bfloat16()


FILTERS = ((0, 0.95, 0.0, -1), (50, 1.0, 0.0, -1), (0, 1.0, 0.05, -1), (20, 0.95, 0.0, -1), (0, 0.95, 0.0, 7))
"""top_k, top_p, min_p and seed (-1: none) of all rows at a time."""


def main() -> None:
    for rows in (1, 256, 4096):
        x, residual, weight = random(rows, 2048), random(rows, 2048), random(2048)
        report(f"add_rms_norm {rows}", lambda: add_rms_norm(x, residual, weight, 1e-5), rows * 2048 * 8)
        gate_up = random(rows, 16384)
        report(f"silu_mul {rows}", lambda: silu_mul(gate_up), rows * 8192 * 6)
        packed = random(rows, 48, 64)
        q, k, v = packed.split((32, 8, 8), dim=1)
        cache = random(2, 8192, 8, 16, 64).transpose(2, 3)
        angles = torch.randn(1024, 64, device=DEVICE)
        slots = torch.arange(rows, dtype=torch.int32, device=DEVICE)
        positions = torch.full_like(slots, 5)
        table = torch.arange(rows, dtype=torch.int32, device=DEVICE)[:, None].expand(rows, 64).contiguous()
        out = torch.empty(rows, 32, 64, dtype=torch.bfloat16, device=DEVICE)
        report(
            f"rope_append {rows}",
            lambda: rope_append(q, k, v, angles, slots, positions, table, cache[0], cache[1], out),
            rows * (48 + 48) * 64 * 2,
        )
    vocab = 128256
    for rows in (1, 64, 1024, 4096):
        logits = torch.randn(rows, vocab, device=DEVICE) * 3
        index = torch.arange(rows, dtype=torch.int32, device=DEVICE)
        samples, state = Samples(index, index), DeviceSlots(rows, DEVICE)
        state["temperature"].fill_(0.8)
        work = Workspace.allocate(rows, vocab, DEVICE)
        ids, logprobs = torch.empty_like(index), torch.empty(rows, device=DEVICE)
        seed = torch.tensor([1, 2], device=DEVICE)
        pass_bytes = rows * vocab * 4
        report(f"block_stats {rows}", lambda: block_stats(logits, samples, state, work, False), pass_bytes)
        report(f"block_stats+plain {rows}", lambda: block_stats(logits, samples, state, work, True), pass_bytes)
        report(
            f"draw {rows}", lambda: sample_tokens(logits, samples, state, work, seed, ids, None, False), rows * 16384
        )
        report(
            f"draw+logprobs {rows}", lambda: sample_tokens(logits, samples, state, work, seed, ids, logprobs, False), 0
        )
        report(f"gumbel {rows}", lambda: add_noise(logits, samples, index, state, work), pass_bytes)
        kept = work.scaled_sum.clone()

        def apply_all() -> None:
            work.scaled_sum.copy_(kept)
            work.token.fill_(-1)
            work.num_gathered.zero_()
            sample_by_rejection(logits, samples, index, state, work, seed)
            gather_best(logits, samples, index, state, work)
            apply_filters(logits, samples, index, state, work)

        for asked in FILTERS:
            for field, value in zip(
                (state["top_k"], state["top_p"], state["min_p"], state["seed"]), asked, strict=True
            ):
                field.fill_(value)
            report(f"top_k, top_p, min_p, seed {asked} {rows}", apply_all, pass_bytes)


if __name__ == "__main__":
    run_command(main)
