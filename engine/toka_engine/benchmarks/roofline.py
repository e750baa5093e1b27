"""Computes how fast a machine of two limits could serve a workload at best. Pure arithmetic over the model's sizes.

The limits are bytes/s and FLOP/s. Each part of the work (the layers' products, the head, attention to a row's own
keys, attention to shared keys, attention of prompts) takes the longer of its bytes and its FLOPs; the parts follow one
another. Bytes: the products' weights once a step, and the keys and values that decode rows read, those of a shared
prefix once for its group. FLOPs: products and attention. Left out, so that no engine reaches the bound: norms,
activations, logits and sampling, writes of keys and values, the limits of the cache and of a step's tokens, and all
that the host does.

The schedule is the best one: as few steps as the longest output, the engine's rows and the client's concurrency allow;
every prompt computed once, a shared prefix once for all. A decode row's first token comes with its prompt's last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from toka_engine.model.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class Limits:
    """The machine's limits, for the model's number type."""

    bytes_per_s: float
    flops_per_s: float

    def seconds(self, num_bytes: float, num_flops: float) -> float:
        """The longer of the two."""
        return max(num_bytes / self.bytes_per_s, num_flops / self.flops_per_s)


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """The work that one model asks of a machine."""

    layer_weights: int
    """Numbers in the matrices of all layers."""
    head_weights: int
    bytes_per_number: int
    kv_bytes_per_token: int
    flops_per_pair: int
    """The operations of attention, in all layers, for one query token and one key."""

    def products(self, num_weights: int, num_steps: int, num_rows: int, limits: Limits) -> float:
        """Seconds of `num_rows` rows in `num_steps` steps through matrices of `num_weights` numbers."""
        return limits.seconds(num_steps * num_weights * self.bytes_per_number, 2 * num_weights * num_rows)

    def attention(self, num_keys: int, num_pairs: int, limits: Limits) -> float:
        """Seconds to read `num_keys` keys and values and to attend `num_pairs` times."""
        return limits.seconds(num_keys * self.kv_bytes_per_token, num_pairs * self.flops_per_pair)


def count_costs(config: ModelConfig, bytes_per_number: int) -> ModelCosts:
    """The costs of a dense decoder (Llama, Qwen2, Qwen3)."""
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention_weights = config.hidden_size * (2 * heads + 2 * kv_heads)
    mlp_weights = 3 * config.hidden_size * config.intermediate_size
    return ModelCosts(
        layer_weights=config.num_layers * (attention_weights + mlp_weights),
        head_weights=config.vocab_size * config.hidden_size,
        bytes_per_number=bytes_per_number,
        kv_bytes_per_token=2 * config.num_layers * kv_heads * bytes_per_number,
        flops_per_pair=4 * config.num_layers * heads,
    )


@dataclass(frozen=True, slots=True)
class Sizes:
    """One request: tokens of its prompt, of each output, and how many outputs."""

    prompt: int
    output: int
    choices: int = 1


@dataclass(frozen=True, slots=True)
class Work:
    """The work of a workload's best schedule."""

    num_steps: int
    num_rows: int
    """Tokens that go through the layers."""
    num_head_rows: int
    own_keys: int
    """Read by one decode row each, over all steps."""
    shared_keys: int
    """Read once for all rows of a group, over all steps."""
    shared_pairs: int
    prompt_keys: int
    prompt_pairs: int


def count_work(requests: Sequence[Sizes], shared: int, concurrency: int, max_rows: int) -> Work:
    """The work of `requests` whose first `shared` tokens (fewer than any prompt has) are the same.

    `concurrency`: requests that the client has open at once; `max_rows`: sequences that run at once.
    """
    later = [request.choices * (request.output - 1) for request in requests]  # decode rows of each request
    num_later = sum(later)
    longest = max(request.output - 1 for request in requests)
    num_decode_steps = max(
        longest,
        _ceil(num_later, max_rows),
        _ceil(sum(request.output - 1 for request in requests), concurrency),
    )
    num_steps = max(longest + 1, num_decode_steps, _ceil(sum(request.output for request in requests), concurrency))
    own_keys, shared_keys, shared_pairs = 0, shared * num_decode_steps, shared * num_later
    prompt_keys, prompt_pairs = shared, _triangle(shared)
    for request, rows in zip(requests, later, strict=True):
        own_prompt, steps = request.prompt - shared, request.output - 1
        own_keys += request.choices * _triangle(steps)
        if request.choices == 1:
            own_keys += own_prompt * steps
        else:
            shared_keys += own_prompt * max(steps, _ceil(rows, max_rows))
            shared_pairs += own_prompt * rows
        prompt_keys += request.prompt
        prompt_pairs += own_prompt * shared + _triangle(own_prompt)
    return Work(
        num_steps=num_steps,
        num_rows=shared + sum(request.prompt - shared for request in requests) + num_later,
        num_head_rows=len(requests) + num_later,
        own_keys=own_keys,
        shared_keys=shared_keys,
        shared_pairs=shared_pairs,
        prompt_keys=prompt_keys,
        prompt_pairs=prompt_pairs,
    )


def best_seconds(costs: ModelCosts, work: Work, limits: Limits) -> dict[str, float]:
    """Seconds of each part; their sum is the bound."""
    return {
        "layers": costs.products(costs.layer_weights, work.num_steps, work.num_rows, limits),
        "head": costs.products(costs.head_weights, work.num_steps, work.num_head_rows, limits),
        "own_attention": costs.attention(work.own_keys, work.own_keys, limits),
        "shared_attention": costs.attention(work.shared_keys, work.shared_pairs, limits),
        "prompt_attention": costs.attention(work.prompt_keys, work.prompt_pairs, limits),
    }


def decode_attention_seconds(
    costs: ModelCosts, num_rows: int, shared: int, own: int, is_grouped: bool, limits: Limits
) -> float:
    """Attention of one decode step: rows of `shared` + `own` keys each, the shared ones read once if `is_grouped`."""
    if not is_grouped:
        return costs.attention(num_rows * (shared + own), num_rows * (shared + own), limits)
    return costs.attention(shared, num_rows * shared, limits) + costs.attention(num_rows * own, num_rows * own, limits)


def _triangle(count: int) -> int:
    """1 + 2 + ... + count."""
    return count * (count + 1) // 2


def _ceil(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)
