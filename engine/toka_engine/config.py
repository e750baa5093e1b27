"""EngineConfig: one frozen object that holds every setting and every limit.

It is built by `entry` from the command line, checked here, and travels to each process in its `Start` message.
`None` means "decided by the process that knows": the model worker sizes what depends on the device and reports it in
`WorkerReady`. A key stands here only if it has an effect.
"""

from __future__ import annotations

import msgspec


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one engine. Names follow Tokasaurus where it has the same setting."""

    # model
    model: str = "builtin://smollm2"
    """Folder, hub name (org/name), or builtin://smollm2."""
    revision: str | None = None
    served_model_name: str | None = None
    """Name in the API; default: the tail of `model`."""
    model_aliases: tuple[str, ...] = ()
    tokenizer: str | None = None
    """Folder or hub name of another tokenizer; default: the model's."""
    dtype: str = "auto"
    """auto | bfloat16 | float32."""
    device: str = "auto"
    """auto | cpu | cuda."""

    # HTTP
    host: str = "0.0.0.0"
    port: int = 10210
    uvicorn_log_level: str = "info"
    receive_timeout_s: float = 10.0
    send_timeout_s: float = 60.0
    """How long a client may leave its answer unread before its connection is dropped."""
    max_body_bytes: int = 32 * 1024 * 1024
    max_connections: int = 4096
    drain_timeout_s: float = 120.0
    drain_endpoint_delay_s: float = 5.0
    """After SIGTERM: how long requests are still taken while the Service's endpoints move."""

    # limits of one request
    max_num_tokens_per_request: int | None = None
    """Prompt plus output; default: what the model's positions and the KV cache allow."""
    max_choices_per_request: int = 1024
    max_queued_requests: int = 65536
    """Waiting sequences beyond which new requests get 429."""
    max_topk_logprobs: int = 20

    # scheduling
    page_size: int = 16
    kv_cache_num_tokens: int | None = None
    """Default: sized from free memory after warm-up (GPU) or from the cgroup's limit (CPU)."""
    max_tokens_per_forward: int | None = None
    """Default: 8192 on a GPU, 128 on a CPU."""
    max_seqs_per_forward: int | None = None
    """Default: 4096 on a GPU, 256 on a CPU. Also the number of slots."""
    scheduling_steps_ahead: int = 2
    """Steps sent to the worker before the first one's tokens are back."""
    use_prefix_cache: bool = True
    use_hydragen: bool = True
    hydragen_min_group_size: int = 4
    hydragen_min_prefix_len: int = 128
    track_early_stopping: bool = True
    """Predict how long outputs get from those that finished; without it, each is taken to reach its limit."""

    # GPU
    use_cudagraphs: bool = True
    cudagraph_max_size: int = 512
    torch_compile: bool = False

    # reporting
    log_level: str = "INFO"
    stats_report_seconds: float = 10.0
    termination_log: str | None = None
    """File for the last words; default: /dev/termination-log where it can be written."""

    seed: int = 0
    """Of the sampler for requests without a seed of their own."""
    num_threads: int | None = None
    """CPU threads of the model worker; default: what the cgroup allows."""
