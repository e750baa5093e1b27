"""EngineConfig: one frozen object with every setting and every limit: type, bounds, default and meaning.

`command_line` reads this table: a field's annotation states its type and bounds (checked again on every process
boundary by the codec), and its `doc` is the line that `toka --help` prints. A key stands here only if it has an
effect; keys of Tokasaurus without one stand in `UNSUPPORTED_KEYS`. `None` means "decided by the process that knows":
the model worker sizes what depends on the device and reports it in `WorkerReady`. May not import anything of ours.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta


def doc(text: str) -> Meta:
    """The meaning of a field, as the command line's help prints it."""
    return Meta(description=text)


Name = Annotated[str, Meta(min_length=1, max_length=1024)]
PositiveInt = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
NumThreads = Annotated[int, Meta(ge=1, le=4096)]
Seconds = Annotated[float, Meta(ge=0, le=86400)]
PositiveSeconds = Annotated[float, Meta(gt=0, le=86400)]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
UvicornLogLevel = Literal["critical", "error", "warning", "info", "debug", "trace"]


GPU_TARGET_GAP_MS = 30.0
"""A step of an 8B model with 256 rows takes some 13 ms on an H200. Prompts have more than half of one this long, and
with over 700 tokens they are computed about as fast as with more. Steps of a 1B model are shorter in any case, by their
most tokens. On a CPU a step has few tokens, and is often longer than this without any of a prompt: no target there."""

MAX_RANKS = 8
"""The largest number of model workers of one engine."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one engine. Names follow Tokasaurus where it has the same setting."""

    # model
    model: Annotated[Name, doc("folder, hub name (org/name), or builtin://smollm2")] = "builtin://smollm2"
    revision: Annotated[Name | None, doc("branch, tag or commit of a hub model; default: main")] = None
    served_model_name: Annotated[Name | None, doc("name in the API; default: the tail of `model`")] = None
    model_aliases: Annotated[tuple[Name, ...], doc("more names that requests may use, as a,b,c")] = ()
    tokenizer: Annotated[Name | None, doc("folder or hub name of another tokenizer; default: the model's")] = None
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"], doc("auto: bfloat16 where the device computes it fast")
    ] = "auto"
    quantization: Annotated[
        Literal["auto", "fp8", "none"],
        doc("fp8: linear layers compute in 8-bit floats, on a GPU that can; auto: as the checkpoint is stored"),
    ] = "auto"
    kv_cache_dtype: Annotated[
        Literal["auto", "fp8"],
        doc("fp8: keys and values are kept as 8-bit floats, on a GPU that has them; auto: as `dtype`"),
    ] = "auto"
    device: Annotated[Literal["auto", "cpu", "cuda"], doc("auto: a GPU where there is one")] = "auto"

    generation_config: Annotated[
        Literal["auto", "none"],
        doc("auto: requests that leave temperature, top_p, top_k, min_p or repetition_penalty out get the model's own"),
    ] = "auto"

    # chat
    tool_format: Annotated[
        Literal["auto", "hermes", "qwen_xml", "llama_json", "pythonic", "generic"],
        doc("how the model writes calls; auto: as its chat template says, generic where that knows no tools"),
    ] = "auto"
    reasoning_field: Annotated[
        Literal["reasoning_content", "reasoning", "none"],
        doc("name of the field for the text between <think> tags in chat answers; none: it stays in the content"),
    ] = "reasoning_content"

    response_store_bytes: Annotated[Count, doc("memory for kept answers of /v1/responses; 0: none is kept")] = (
        64 * 1024 * 1024
    )

    # HTTP
    host: Annotated[Name, doc("address to listen on")] = "0.0.0.0"
    port: Annotated[int, Meta(ge=1, le=65535), doc("port to listen on")] = 10210
    uvicorn_log_level: Annotated[UvicornLogLevel, doc("level of the HTTP server's own log")] = "info"
    access_log: Annotated[bool, doc("log a line per request: id, status, tokens, times; no text, no keys")] = True
    http_fast_path: Annotated[
        bool, doc("answer POSTs of completions and chat without FastAPI's router; F: the same answers, later")
    ] = True
    cors_origins: Annotated[
        tuple[Name, ...], doc("origins of web pages that may read answers, as https://a.org,https://b.org; *: all")
    ] = ()
    unknown_fields: Annotated[
        Literal["refuse", "report"],
        doc("a request's unknown field: a 400 that names it, or named in x-toka-ignored and without effect"),
    ] = "refuse"
    api_keys_file: Annotated[
        Name | None, doc("file of API keys with names and limits, read again when it changes; see docs/security.md")
    ] = None
    status_page: Annotated[bool, doc("a page at / with readiness, load, batches and a playground")] = True
    receive_timeout_s: Annotated[PositiveSeconds, doc("a request's header and body must be here by then")] = 10.0
    send_timeout_s: Annotated[
        PositiveSeconds, doc("a connection whose client leaves its answer unread so long is dropped")
    ] = 60.0
    max_body_bytes: Annotated[PositiveInt, doc("larger bodies get 413")] = 32 * 1024 * 1024
    max_connections: Annotated[PositiveInt, doc("open connections; more are refused")] = 16384
    drain_timeout_s: Annotated[Seconds, doc("after SIGTERM: how long running requests may go on")] = 120.0
    drain_endpoint_delay_s: Annotated[
        Seconds, doc("after SIGTERM: how long requests are still taken while the Service's endpoints move")
    ] = 5.0

    # limits of one request
    max_num_tokens_per_request: Annotated[
        PositiveInt | None,
        doc("prompt plus output; default: what the model's positions and the KV cache allow"),
    ] = None
    max_choices_per_request: Annotated[PositiveInt, doc("n of one request")] = 1024
    max_queued_requests: Annotated[PositiveInt, doc("waiting sequences beyond which new requests get 429")] = 65536
    max_topk_logprobs: Annotated[Count, doc("top logprobs per token that a request may ask for")] = 20

    # files and batches
    data_dir: Annotated[
        Name | None, doc("folder that keeps /v1/files and /v1/batches over restarts; default: there are none")
    ] = None
    max_file_bytes: Annotated[PositiveInt, doc("larger uploads get 413")] = 200 * 1024 * 1024
    max_stored_bytes: Annotated[
        Annotated[int, Meta(ge=1, le=2**60)], doc("bytes of the files that one API key may keep; more get 507")
    ] = 4 * 1024**3
    max_stored_files: Annotated[PositiveInt, doc("files that one API key may keep; more get 507")] = 10_000
    min_free_disk_bytes: Annotated[
        Annotated[int, Meta(ge=0, le=2**60)], doc("uploads that would leave less of the disk free get 507")
    ] = 256 * 1024**2
    upload_timeout_s: Annotated[PositiveSeconds, doc("an upload must be here whole by then")] = 3600.0
    max_batch_lines: Annotated[PositiveInt, doc("lines of one batch's input")] = 50_000

    # scheduling
    page_size: Annotated[int, Meta(ge=1, le=1024), doc("tokens of one page of KV cache")] = 16
    kv_cache_num_tokens: Annotated[
        PositiveInt | None,
        doc("size of the KV cache; default: from free memory after warm-up (GPU) or the cgroup's limit (CPU)"),
    ] = None
    max_tokens_per_forward: Annotated[
        PositiveInt | None, doc("tokens of one step; default: 8192 on a GPU, 128 on a CPU")
    ] = None
    max_seqs_per_forward: Annotated[
        PositiveInt | None, doc("sequences that run at once; default: 4096 on a GPU, 256 on a CPU")
    ] = None
    max_prefill_tokens_per_forward: Annotated[
        PositiveInt | None,
        doc("prompt tokens of one step; default on a GPU: half a step beside running streams, so that these wait less"),
    ] = None
    target_gap_ms: Annotated[
        Annotated[float, Meta(ge=0, le=60_000)] | None,
        doc(
            "prompts leave the tokens of streamed answers so far apart; 0: no target; default: 30 on a GPU, 0 on a CPU"
        ),
    ] = None
    scheduling_steps_ahead: Annotated[
        Annotated[int, Meta(ge=1, le=64)] | None,
        doc("steps sent before the first one's tokens are back; default: 3 on a GPU, 2 on a CPU, more with pp_size"),
    ] = None
    use_prefix_cache: Annotated[bool, doc("keep the KV pages of prompts and share them by content")] = True
    use_hydragen: Annotated[bool, doc("compute attention over shared prefixes once, where that pays")] = True
    hydragen_min_group_size: Annotated[int, Meta(ge=2, le=2**31 - 1), doc("sequences that share a prefix")] = 4
    hydragen_min_prefix_len: Annotated[PositiveInt, doc("tokens of the shared prefix")] = 128
    track_early_stopping: Annotated[
        bool, doc("predict output lengths from those that finished; F: each is taken to reach its limit")
    ] = True

    # GPU
    use_cudagraphs: Annotated[bool, doc("replay decode steps as CUDA graphs")] = True
    cudagraph_max_size: Annotated[PositiveInt, doc("largest decode batch that is captured")] = 4096
    cudagraph_max_prefill_size: Annotated[
        Annotated[int, Meta(ge=0, le=1 << 16)] | None,
        doc(
            "most tokens of a step with prompts whose layers are captured; 0: none; default: by the layers, up to 1024"
        ),
    ] = None

    # parallelism
    dp_size: Annotated[
        int,
        Meta(ge=1, le=8),
        doc("replicas of the model behind one port, each on a GPU of its own (or a share of the CPUs)"),
    ] = 1
    dp_min_size: Annotated[
        Annotated[int, Meta(ge=1, le=8)] | None,
        doc("replicas that must be left for the engine to go on when one fails; default: all of them"),
    ] = None
    tp_size: Annotated[
        int, Meta(ge=1, le=8), doc("ranks that hold the model together, each with a part of every layer and a GPU")
    ] = 1
    async_tp_threshold: Annotated[
        PositiveInt | None,
        doc(
            "tokens of a step from which on GPU ranks exchange sums while products run; default: none; with tp_size "
            "above 1"
        ),
    ] = None
    pp_size: Annotated[
        int, Meta(ge=1, le=8), doc("pipeline stages, each with some of the layers and a GPU; on GPUs not with tp_size")
    ] = 1
    pp_layer_split: Annotated[
        tuple[PositiveInt, ...] | None, doc("layers of each stage, as 17,15; default: stages of equal work")
    ] = None
    pp_num_buffer_stages: Annotated[
        int,
        Meta(ge=0, le=8),
        doc("sets of sequences beside one for each stage, so that no stage waits for tokens on their way"),
    ] = 1

    # torch.compile
    torch_compile: Annotated[
        bool, doc("compile the layers before ready; needs a compiler, starts slower; see docs/tuning.md")
    ] = False
    torch_compile_config: Annotated[
        Literal["default", "max-autotune-no-cudagraphs"],
        doc("mode of torch_compile=T; the second, on a GPU alone, also tries several kernels for each product"),
    ] = "default"

    # reporting
    log_level: Annotated[LogLevel, doc("level of every component's log")] = "INFO"
    log_procs: Annotated[
        tuple[Name, ...], doc("processes that log more than warnings, as server,manager,model; default: all of them")
    ] = ()
    stats_report_seconds: Annotated[PositiveSeconds, doc("seconds between two lines of statistics")] = 10.0
    statsd_addr: Annotated[
        Name | None, doc("host:port of a statsd server that gets the statistics by UDP; also statsd_server_url")
    ] = None
    vllm_metric_names: Annotated[
        bool, doc("/metrics also has vLLM's names, for its dashboards, scalers and routers; docs/observability.md")
    ] = True
    termination_log: Annotated[
        Name | None, doc("file for the exit message; default: /dev/termination-log where it can be written")
    ] = None

    seed: Annotated[
        Annotated[int, Meta(ge=0, le=2**63 - 1)] | None,
        doc("of the noise for requests without a seed; default: other noise at every start and in every replica"),
    ] = None
    num_threads: Annotated[
        NumThreads | None, doc("CPU threads of each model worker; default: its share of what the cgroup allows")
    ] = None

    @property
    def num_ranks(self) -> int:
        """Model workers, each with a GPU of its own or a share of the CPUs."""
        return self.dp_size * self.pp_size * self.tp_size

    @property
    def num_lanes(self) -> int:
        """Sets of running sequences that take turns, so that each pipeline stage has a step of another one."""
        return self.pp_size + self.pp_num_buffer_stages if self.pp_size > 1 else 1

    def choose_target_gap_ms(self, is_cpu: bool) -> float:
        """Return the target for gaps between tokens of streamed answers; 0: none."""
        if self.target_gap_ms is None:
            return 0.0 if is_cpu else GPU_TARGET_GAP_MS
        return self.target_gap_ms

    def choose_steps_ahead(self, is_cpu: bool) -> int:
        """Return how many steps are sent before the first one's tokens are back."""
        return self.scheduling_steps_ahead or self.num_lanes + (1 if is_cpu else 2)


def describe_sizes(config: EngineConfig) -> str:
    """Return the numbers of replicas, stages and ranks as a sentence has them; the stages where there are several."""
    stages = f" x pp_size={config.pp_size}" if config.pp_size > 1 else ""
    return f"dp_size={config.dp_size}{stages} x tp_size={config.tp_size}"


class UnsupportedKey(NamedTuple):
    """A Tokasaurus key that we do not implement. Only `accepted`, which describes what we already do, may be passed."""

    accepted: Any
    sentence: str


ALIASES = {"statsd_server_url": "statsd_addr"}
"""Other names of keys, as Tokasaurus has them."""

UNSUPPORTED_KEYS: dict[str, UnsupportedKey] = {
    "trust_remote_code": UnsupportedKey(False, "code from a model folder is never run; architectures are built in"),
    "rope_scaling": UnsupportedKey(None, "RoPE scaling is read from the model's own config.json"),
    "enable_chosen_logprobs": UnsupportedKey(True, "each request asks for logprobs itself"),
    "local_proc_name": UnsupportedKey("server", "the supervisor runs in the foreground; attach a debugger by pid"),
    "dmanager": UnsupportedKey(False, "the supervisor runs in the foreground; attach a debugger by pid"),
    "dmodel": UnsupportedKey(False, "the supervisor runs in the foreground; attach a debugger by pid"),
    "uvsh": UnsupportedKey(False, "set uvicorn_log_level=warning"),
    "prefill_round_up_multiple": UnsupportedKey(None, "prefill chunks are cut by max_tokens_per_forward alone"),
    "stop_string_num_token_lookback": UnsupportedKey(None, "stop strings are found in the whole text"),
    "early_stopping_buffer_size": UnsupportedKey(None, "the prediction of output lengths is not tunable yet"),
    "early_stopping_num_prediction_buckets": UnsupportedKey(
        None, "the prediction of output lengths is not tunable yet"
    ),
    "early_stopping_initial_wait": UnsupportedKey(None, "the prediction of output lengths is not tunable yet"),
    "early_stopping_init_mean": UnsupportedKey(None, "the prediction of output lengths is not tunable yet"),
    "early_stopping_init_std": UnsupportedKey(None, "the prediction of output lengths is not tunable yet"),
    "enable_precise_onboard": UnsupportedKey(True, "admission always simulates the future use of the KV cache"),
    "precise_onboard_batch_size": UnsupportedKey(None, "the simulation takes all sequences at once"),
    "greedy_prefill": UnsupportedKey(True, "prefill fills what decode leaves of each step"),
    "use_spec_allocation": UnsupportedKey(True, "set track_early_stopping=F to admit by the limits alone"),
    "spec_allocation_std_buffer_scale": UnsupportedKey(None, "the prediction of output lengths is not tunable yet"),
    "spec_allocation_target_kv_cache_utilization": UnsupportedKey(1.0, "set kv_cache_num_tokens instead"),
    "cudagraph_step": UnsupportedKey(None, "the sizes of captured batches are not tunable yet"),
    "cudagraph_max_kv_indices_per_seq": UnsupportedKey(None, "captured batches take sequences of any length"),
    "allocator_sanity_checks": UnsupportedKey(False, "the tests check the allocator against a model"),
    "bump_city_population_me": UnsupportedKey(False, "it has no meaning here"),
    "cartridge_dir": UnsupportedKey(None, "cartridges are not built yet"),
}
