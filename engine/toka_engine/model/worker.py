"""The model worker's process: load, size, warm up, then execute steps in order and send their tokens.

Owns the order of things and nothing else: weights are the loader's, a step's work is the runner's. Talks to the manager
over one link, to the supervisor through `child.Child`.
"""

from __future__ import annotations

import gc
import logging
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from toka_engine.channel import Channel
from toka_engine.child import Child
from toka_engine.config import EngineConfig
from toka_engine.errors import OutOfMemoryError, PeerClosedError
from toka_engine.messages import Grammar, ManagerToWorker, Step, Stop, WorkerReady
from toka_engine.model.architectures.registry import build_model
from toka_engine.model.attention_backend import AttentionShape
from toka_engine.model.backend import Launched, Runner
from toka_engine.model.devices import connect_ranks, find_device, select_backend, take_device
from toka_engine.model.grammar_compiler import GrammarCompiler
from toka_engine.model.loader import Weights
from toka_engine.model.memory import count_threads
from toka_engine.model.model_config import ModelConfig, read_model_config
from toka_engine.model.ranks import Ranks, SingleRank
from toka_engine.model.sharding import Sharding
from toka_engine.model.sizing import Sizes, choose_cache_dtype, choose_dtype, choose_fp8, read_available_bytes
from toka_engine.model.stage_links import StageLinks
from toka_engine.model.stages import choose_stage
from toka_engine.slot_parameters import SlotBatch

logger = logging.getLogger("toka.model")

Report: TypeAlias = Callable[[str, str], None]
"""(phase, detail) of the start."""


class Worker:
    """A loaded model with its sizes; made by `load_worker`."""

    def __init__(self, runner: Runner, ready: WorkerReady, links: StageLinks | None = None) -> None:
        """`ready` is final after `warm_up`. `links`: to the other pipeline stages."""
        self.runner = runner
        self.ready = ready
        self._beside = () if links is None else (links.following,)

    def warm_up(self) -> None:
        """Run the largest prefill and some decode steps on slot 0, whose pages nobody owns yet; settle the memory.

        Afterwards `ready` is final. Raises OutOfMemoryError.
        """
        try:
            for step in make_warm_up_steps(self.ready):
                self.runner.finish(self.runner.launch(step))
            self.ready = self.runner.prepare(self.ready)
        except torch.OutOfMemoryError as error:
            num_tokens = self.ready.num_pages * self.ready.page_size
            raise OutOfMemoryError(
                f"a KV cache of {num_tokens} tokens leaves too little memory for the largest step; lower "
                "kv_cache_num_tokens, max_tokens_per_forward or max_seqs_per_forward"
            ) from error

    def serve(self, link: Channel[ManagerToWorker], child: Child, compiler: GrammarCompiler) -> None:
        """Execute steps until `Stop`. The output rank sends their tokens. Raises PeerClosedError: no manager,
        or no other rank.
        """
        waiting: deque[ManagerToWorker] = deque()
        launched: deque[Launched] = deque()
        while True:
            if not waiting and not launched:
                waiting.extend(link.receive(beside=self._beside))
            else:
                waiting.extend(_receive_ready(link, bool(waiting) or bool(launched)))
            with child.busy():
                if waiting and len(launched) < self.runner.max_steps_in_flight:
                    match waiting.popleft():
                        case Step() as step:
                            child.begin_step()
                            launched.append(self.runner.launch(step))
                        case Grammar(number, source):
                            compiler.take(number, source)
                        case Stop():
                            return
                    if waiting and len(launched) < self.runner.max_steps_in_flight:
                        continue
                if not launched:
                    continue
                tokens = self.runner.finish(launched.popleft())
                child.end_step()
                if child.start.rank.is_output_rank:
                    link.send(tokens)


def _receive_ready(link: Channel[ManagerToWorker], has_work: bool) -> list[ManagerToWorker]:
    """Return the messages that have arrived; a closed link counts only when earlier steps are done."""
    try:
        return link.receive_ready()
    except PeerClosedError:
        if has_work:
            return []
        raise


def load_worker(
    config: EngineConfig,
    model_dir: Path,
    report: Report,
    ranks: Ranks | None = None,
    device: torch.device | None = None,
    links: StageLinks | None = None,
) -> Worker:
    """Load the model of `model_dir`, or this rank's part of it, and allocate everything.

    Without `ranks` there is one, without `links` there is one pipeline stage; without `device` it is the one that
    `config` means.
    Raises errors of the tree, OutOfMemoryError among them.
    """
    ranks = ranks or SingleRank()
    device = device or find_device(config)
    if device.type == "cpu":
        torch.set_num_threads(config.num_threads or max(1, count_threads() // config.num_ranks))
    model_config = read_model_config(model_dir)
    dtype, sharding = choose_dtype(config, device), Sharding(ranks.rank, ranks.size)
    sharding.check(
        model_config.num_heads, model_config.num_kv_heads, model_config.intermediate_size, model_config.vocab_size
    )
    stage = choose_stage(config, model_config, 0 if links is None else links.rank.pp_rank)
    backend = select_backend(device, config, ranks, model_config, links)
    cache_dtype = choose_cache_dtype(config, backend.ops.fp8 is not None, dtype)
    shape = AttentionShape.of(model_config, dtype, device, sharding, len(stage.layers), cache_dtype)
    try:
        report("load", f"{model_config.architecture} {dtype} on {device.type}")
        available = ranks.agree_min(read_available_bytes(device))
        if device.type == "cpu":
            available //= ranks.size * config.pp_size
        scheme, ops = model_config.quantization, backend.ops
        if not (computes_fp8 := choose_fp8(config, model_config, ops.fp8 is not None, dtype)):
            ops = replace(ops, fp8=None)
        stored = scheme, computes_fp8, cache_dtype != dtype
        with torch.inference_mode(), Weights(model_dir, device, dtype, available, *stored) as weights:
            model = build_model(model_config, weights, ops, ranks, stage)
            untaken = tuple(weights.list_untaken())
            if links is not None:
                untaken = links.find_untaken(untaken)
            if ranks.rank == 0:
                _report_weights(weights, untaken)
        gc.collect()
        sizes = backend.choose_sizes(config, model_config, shape)
        if config.torch_compile:
            report("compile", "the layers, with torch.compile")
        runner = backend.make_runner(model, shape, sizes, config)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(f"not enough memory for the model: {str(error).splitlines()[0]}") from error
    return Worker(runner, describe(model_config, sizes, shape), links)


def _report_weights(weights: Weights, untaken: Sequence[str]) -> None:
    """Log what the folder holds and the model does not compute with; alike tensors of all layers in one line."""
    counts = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in untaken)
    for name, count in counts.items():
        logger.warning("event=unused_tensor name=%s count=%d", name, count)
    if weights.num_quantised:
        logger.info("event=fp8 weights=%d rounded_at_load=%d", weights.num_quantised, weights.num_rounded)
    if weights.num_dequantised:
        dtype = str(weights.dtype).removeprefix("torch.")
        logger.warning("event=dequantised weights=%d stored=float8_e4m3fn computed=%s", weights.num_dequantised, dtype)
    if weights.num_unscaled:
        logger.warning("event=no_kv_scales count=%d used=1.0", weights.num_unscaled)


def describe(model: ModelConfig, sizes: Sizes, shape: AttentionShape) -> WorkerReady:
    """Make the report to the manager of a worker with these sizes."""
    return WorkerReady(
        vocab_size=model.vocab_size,
        max_positions=model.max_positions,
        num_pages=sizes.num_pages,
        page_size=sizes.page_size,
        max_seqs=sizes.max_seqs,
        max_tokens_per_forward=sizes.max_tokens_per_forward,
        max_pages_per_seq=sizes.max_pages_per_seq,
        device=shape.device.type,
        dtype=str(shape.dtype).removeprefix("torch."),
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
    )


def make_warm_up_steps(ready: WorkerReady) -> list[Step]:
    """A prefill on slot 0 and two decode steps, as large as the first pages of the cache allow."""
    capacity = min(ready.num_pages, ready.max_pages_per_seq) * ready.page_size
    length = max(1, min(ready.max_tokens_per_forward, capacity - 2))
    pages = np.arange(min(-(-(length + 2) // ready.page_size), ready.max_pages_per_seq), dtype=np.int32)
    slot = np.zeros(1, np.int32)
    prefill = Step(
        number=0,
        new=SlotBatch.of(slot),
        append_slots=np.zeros(pages.size, np.int32),
        append_indices=pages,
        append_pages=pages,
        prefill_slots=slot,
        prefill_starts=slot,
        prefill_lengths=slot + length,
        prefill_tokens=np.zeros(length, np.int32),
        fanout_slots=slot,
        fanout_chunks=slot,
    )
    num_decodes = min(2, capacity - length)
    return [prefill, *(Step(number=0, decode_slots=slot) for _ in range(num_decodes))]


def run_worker(child: Child, link_fds: list[int]) -> None:
    """The process's main: start, tell the manager and the supervisor, serve."""
    began_s = time.monotonic()
    link: Channel[ManagerToWorker] = Channel.from_fd(link_fds[0], ManagerToWorker)
    start = child.start
    device = take_device(start.config, start.rank)
    ranks = connect_ranks(start.rank, Path(start.rendezvous), device)
    links = StageLinks.from_fds(start.rank, *link_fds[1:]) if start.rank.pp_size > 1 else None
    worker = load_worker(start.config, Path(start.model_dir), child.progress, ranks, device, links)
    child.progress("warm-up", "the largest steps")
    worker.warm_up()
    gc.collect()
    gc.freeze()
    link.send(worker.ready)
    if device.type == "cuda":
        child.count_memory = lambda: torch.cuda.memory_reserved(device)
    child.ready(device.type)
    logger.info(
        "event=ready seconds=%.2f device=%s dtype=%s pages=%d page_size=%d threads=%d",
        time.monotonic() - began_s,
        worker.ready.device,
        worker.ready.dtype,
        worker.ready.num_pages,
        worker.ready.page_size,
        torch.get_num_threads(),
    )
    compiler = GrammarCompiler(Path(start.tokenizer_dir), worker.ready.vocab_size, worker.runner.grammars, link.send)
    worker.serve(link, child, compiler)
