"""Executes steps on a GPU without waiting for it: inputs are uploaded through pinned memory in the order of one stream,
and tokens are copied back on a side stream while the next step runs.

Decode-only steps replay CUDA graphs (`decode_graphs`), to which the host only writes a packet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec
import numpy as np
import torch

from toka_engine.config import EngineConfig
from toka_engine.messages import Int32s, Step, Tokens, WorkerReady
from toka_engine.model.backend import Launched
from toka_engine.model.causal import CausalModel
from toka_engine.model.cuda.attention import CudaAttention
from toka_engine.model.cuda.decode_graphs import DecodeGraphs
from toka_engine.model.cuda.grammar_rows import GrammarRows, MaskStaging
from toka_engine.model.cuda.graph_sizes import choose_layer_rows
from toka_engine.model.cuda.layer_graphs import LayerGraphs
from toka_engine.model.cuda.memory_fit import fit_cache, make_largest_steps, take_spare
from toka_engine.model.cuda.sampler import CudaSampler, Sampler
from toka_engine.model.cuda.staging import Staging
from toka_engine.model.cuda.tensor_parallel import TensorParallel
from toka_engine.model.cuda.triton_cache import log_compiled
from toka_engine.model.cuda.warm_up import make_rest_plans, measure_steps
from toka_engine.model.in_flight import MAX_STEPS_IN_FLIGHT, RING_SIZE
from toka_engine.model.kernels.decode_attention_short import ShortLaunchConfig
from toka_engine.model.kernels.device_slots import DeviceSlots, gather_ids, pack_new_slots, set_slots
from toka_engine.model.memory import count_threads
from toka_engine.model.prompt_scores import PromptScores, message_fields, plan_scores, score_prompt
from toka_engine.model.sample_plan import Sample, Sampled, SamplePlan, plan_sampling
from toka_engine.model.slot_grammars import SlotGrammars
from toka_engine.model.slot_state import HostSlots
from toka_engine.model.step_rows import find_sampled_rows, make_layout
from toka_engine.noise import settled_seed
from toka_engine.slot_parameters import MAX_GRAMMAR_STREAMS

_READ_BYTES_PER_S = 3e12
_EAGER_OVERHEAD_S = 4e-3
"""Extra time of a small step without graphs; shared prefixes that need one must save as much."""
_GROUP_OVERHEAD_S = 2e-4
"""Time that the merges of a step with groups take."""
_NO_APPENDS = (np.empty(0, np.int32),) * 3


@dataclass(frozen=True, slots=True)
class CudaLaunched(Launched):
    """A step in the stream; `done` is recorded after the copies of its results to the host."""

    done: torch.cuda.Event
    ids: torch.Tensor | None = None  # pinned
    logprobs: torch.Tensor | None = None
    top_tokens: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None
    ring_index: int | None = None
    """Index of the packet whose step writes its tokens to host memory; they are then all of its results."""


class CudaRunner:
    """A backend.Runner whose `launch` returns while the device works. Its `state` is the host's mirror."""

    max_steps_in_flight = MAX_STEPS_IN_FLIGHT

    def __init__(
        self,
        model: CausalModel,
        attention: CudaAttention,
        max_seqs: int,
        config: EngineConfig,
        parallel: TensorParallel | None = None,
    ) -> None:
        """`parallel`: what this rank shares with others, if there are any."""
        device, vocab_size = attention.shape.device, model.config.vocab_size
        self._slots = DeviceSlots(max_seqs + 1, device)  # one more: padding rows of graphs
        seed = settled_seed(config)
        self._parallel = parallel
        self._agree_min: Callable[[int], int] = int if parallel is None else parallel.agree_min
        self.model, self.attention = model, attention
        self.sampler = self._make_sampler(seed, max_seqs, vocab_size)
        self.sample: Sample = self.sampler
        self.grammars = SlotGrammars(max_seqs, vocab_size, num_threads=min(16, max(1, count_threads() - 2)))
        self.state = HostSlots(max_seqs)
        self._new_slots, self._tokens = Staging(device), Staging(device)
        self.decode_graphs: DecodeGraphs | None = None
        self.layer_graphs: LayerGraphs | None = None
        self._last_plan: SamplePlan | None = None
        self._fits_cache = config.kv_cache_num_tokens is None
        has_graphs = config.use_cudagraphs and (parallel is None or parallel.has_graphs)
        self._max_graph_rows = min(config.cudagraph_max_size, max_seqs) if has_graphs else 0
        self._max_layer_rows = choose_layer_rows(config, model.config) if has_graphs else 0
        if config.async_tp_threshold is not None:  # sums of larger steps are exchanged outside graphs
            self._max_layer_rows = min(self._max_layer_rows, config.async_tp_threshold - 1)
        self._reserve_outputs(device, max_seqs)

    def _make_sampler(self, seed: int, max_seqs: int, vocab_size: int) -> Sampler:
        if self._parallel is not None:
            return self._parallel.make_sampler(seed, self._slots, self.attention, max_seqs)
        return CudaSampler(seed, self._slots, self.attention, max_seqs, vocab_size)

    def _reserve_outputs(self, device: torch.device, max_seqs: int) -> None:
        self._stream, self._copies = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        self._published = [torch.cuda.Event() for _ in range(RING_SIZE)]
        self._is_awaited = [False] * RING_SIZE
        self._pinned_ids = [torch.empty(max_seqs, dtype=torch.int32, pin_memory=True) for _ in range(RING_SIZE)]
        self._pinned_logprobs = [torch.empty(max_seqs, dtype=torch.float32, pin_memory=True) for _ in range(RING_SIZE)]
        self._turn = 0
        masks = MaskStaging(min(max_seqs, MAX_GRAMMAR_STREAMS), self.grammars.num_words, self._stream)
        self._grammar_rows = GrammarRows(self.grammars, masks)

    @torch.inference_mode()
    def prepare(self, ready: WorkerReady) -> WorkerReady:
        """See backend.Runner: fit the KV cache unless the user sized it, capture the graphs, keep memory for steps."""
        self._capture_layers(ready.max_tokens_per_forward)
        if self._fits_cache:
            ready = fit_cache(self.attention, ready, self._run, self.measure_graphs, self._agree_min)
        self.capture_graphs()
        decode_graphs, self.decode_graphs = self.decode_graphs, None  # steps take most memory without graphs
        self._run(make_largest_steps(ready))
        self.decode_graphs = decode_graphs
        step_times = measure_steps(ready, lambda step: self.finish(self.launch(step)))
        take_spare(self.attention.shape.device)
        log_compiled()
        return msgspec.structs.replace(ready, step_times=step_times)

    def _run(self, steps: Iterable[Step]) -> None:
        for step in steps:
            self.finish(self.launch(step))

    def _capture_layers(self, max_tokens: int) -> None:
        """Capture the graphs that no cache has to be made for, so that the cache takes what they leave."""
        if max_rows := min(self._max_layer_rows, max_tokens):
            self.layer_graphs = LayerGraphs(self.model, self.attention, max_rows)
            self.layer_graphs.capture()

    @torch.inference_mode()
    def capture_graphs(self) -> None:
        """Launch what the warm-up steps did not reach, then capture the graphs."""
        self.launch_rest()
        torch.cuda.synchronize()
        self.decode_graphs = None  # earlier ones give their memory back
        if self._max_graph_rows:
            decode_graphs = self.make_decode_graphs()
            decode_graphs.capture()
            self.decode_graphs = decode_graphs

    def make_decode_graphs(self, max_rows: int | None = None) -> DecodeGraphs:
        """Make graphs that are not captured yet, of up to `max_rows` rows."""
        max_rows = self._max_graph_rows if max_rows is None else max_rows
        return DecodeGraphs(self.model, self.attention, self._slots, self.sampler, max_rows)

    @torch.inference_mode()
    def measure_graphs(self) -> int:
        """Return the bytes that the graphs of `prepare` will take."""
        if not self._max_graph_rows:
            return 0
        return self.make_decode_graphs().measure()

    def launch_rest(self) -> None:
        """Launch, once each, the variants of kernels that the warm-up steps do not."""
        attention = self.attention
        width = self.model.config.vocab_size if self._parallel is None else self._parallel.width
        logits = torch.zeros(1, width, dtype=torch.float32, device=attention.shape.device)
        for plan in make_rest_plans(self.state.max_seqs, self.grammars.num_words, self._parallel is not None):
            self.sample(logits, None, plan, self.state)
        self.launch_many_rows(min(self.state.max_seqs, ShortLaunchConfig.of(attention.shape.head_dim).most_rows))
        scratch_page = np.array([attention.cache.shape[2] - 1], np.int32)
        attention.copy_pages(scratch_page, scratch_page)

    def launch_many_rows(self, rows: int) -> None:
        """Launch a step of so many decode rows, with groups and without: attention of many rows takes other kernels,
        whether or not graphs hold as many."""
        self.make_decode_graphs(rows).launch(rows)

    @torch.inference_mode()
    def launch(self, step: Step) -> Launched:
        """See backend.Runner."""
        started_s, cpu_s = time.monotonic(), time.thread_time()
        self._set_up(step)
        plan = self._plan_sampling(step)
        self.attention.copy_pages(step.copy_from, step.copy_to)
        decoded = self._decode_by_graph(step)
        if decoded is None:
            logits, logit_rows, scores = self._forward(step)
        else:
            hidden, ring_index = decoded
            if ring_index is not None and self._sample_by_graph(plan):
                self.state.advance(step)
                return self._await_published(step, plan, ring_index, started_s, cpu_s)
            logits, logit_rows, scores = self.model.logits(hidden), None, None
        if plan.grammatical.size:
            plan = self._grammar_rows.fill_masks(plan)
        sampled = self.sample(logits, logit_rows, plan, self.state) if plan.slots.size else None
        self.state.advance(step)
        return self._fetch(step, plan, sampled, scores, started_s, cpu_s)

    def _plan_sampling(self, step: Step) -> SamplePlan:
        """Plan sampling; decode steps of the same rows share one plan, in which nothing changes from step to step."""
        last, slots = self._last_plan, step.decode_slots
        has_new = len(step.new) or step.fanout_slots.size
        if last is not None and not has_new and np.array_equal(slots, last.slots) and last.holds(self.state):
            return last
        plan = self._last_plan = plan_sampling(step, self.state)
        return plan

    def _decode_by_graph(self, step: Step) -> tuple[torch.Tensor, int | None] | None:
        """Return hidden states [d, hidden_size] of a decode-only step and the ring index of its packet.

        Returns None, with the step's pages appended, where launching kernel by kernel is better.
        """
        appends = step.append_slots, step.append_indices, step.append_pages
        count, decode_graphs = step.decode_slots.size, self.decode_graphs
        groups, is_better = None, False
        if decode_graphs is not None and not step.prefill_slots.size and 0 < count <= decode_graphs.max_rows:
            saved_s = self._saved_s(step)
            if saved_s > _GROUP_OVERHEAD_S and decode_graphs.has_groups:
                groups = self.attention.pack_graph_groups(make_layout(step, self.state, keep_seeded_out=False))
            is_better = groups is not None or saved_s < _EAGER_OVERHEAD_S
        if decode_graphs is None or not is_better:
            self.attention.append_pages(*appends)
            return None
        if step.append_slots.size > decode_graphs.max_rows:
            self.attention.append_pages(*appends)
            appends = _NO_APPENDS
        return decode_graphs.forward(step.decode_slots, self.state["length"][step.decode_slots], appends, groups)

    def _sample_by_graph(self, plan: SamplePlan) -> bool:
        return self.decode_graphs is not None and plan.is_plain and self.decode_graphs.sample()

    def _await_published(
        self, step: Step, plan: SamplePlan, ring_index: int, started_s: float, cpu_s: float
    ) -> Launched:
        if self._is_awaited[ring_index]:
            raise AssertionError("more steps in flight than there are packets")
        self._is_awaited[ring_index] = True
        done = self._published[ring_index]
        done.record(self._stream)
        host_cpu_s = time.thread_time() - cpu_s
        return CudaLaunched(step.number, plan, None, started_s, host_cpu_s, done, ring_index=ring_index)

    def finish(self, launched: Launched) -> Tokens:
        """See backend.Runner."""
        if not isinstance(launched, CudaLaunched):
            raise AssertionError("a step of another runner")
        launched.done.synchronize()
        none = np.empty(0, np.float32)
        if launched.ring_index is not None and self.decode_graphs is not None:
            self._is_awaited[launched.ring_index] = False
            ids = self.decode_graphs.packets.tokens(launched.ring_index, launched.plan.slots.size).copy()
            self.sampler.check(ids)
            wall_s = time.monotonic() - launched.started_s
            return Tokens(launched.number, ids, step_wall_s=wall_s, host_cpu_s=launched.host_cpu_s)
        has_top = launched.top_tokens is not None and launched.top_logprobs is not None
        ids = np.empty(0, np.int32) if launched.ids is None else launched.ids.numpy().copy()
        self.sampler.check(ids)
        self._grammar_rows.finish(launched.number, launched.plan, ids)
        return Tokens(
            launched.number,
            ids,
            none if launched.logprobs is None else launched.logprobs.numpy().copy(),
            top_rows=launched.plan.top.astype(np.int32) if has_top else np.empty(0, np.int32),
            top_tokens=np.empty(0, np.int32)
            if launched.top_tokens is None
            else launched.top_tokens.numpy().reshape(-1),
            top_logprobs=none if launched.top_logprobs is None else launched.top_logprobs.numpy().reshape(-1),
            top_width=launched.plan.top_width if has_top else 0,
            step_wall_s=time.monotonic() - launched.started_s,
            host_cpu_s=launched.host_cpu_s,
            **message_fields(launched.scores),
        )

    def _set_up(self, step: Step) -> None:
        self.state.set_up(step)
        self.grammars.set_up(step)
        if len(step.new):
            (words,) = self._new_slots.upload(pack_new_slots(step.new))
            set_slots(self._slots, words)

    def _forward(self, step: Step) -> tuple[torch.Tensor, torch.Tensor | None, PromptScores | None]:
        """Return logits of any step, launched kernel by kernel, each sample's index into them (None: in order), and the
        logprobs of prompts.
        """
        layout = make_layout(step, self.state, keep_seeded_out=False)
        self.attention.plan(layout)
        num_decode, chunks = layout.decode_slots.size, step.prefill_slots.size
        rows, logit_rows = find_sampled_rows(step) if chunks else (None, None)
        none, score_plan = np.empty(0, np.int32), plan_scores(step)
        num_sampled = 0 if rows is None else rows.size
        if rows is not None:
            rows = self._pad_sampled(rows) if score_plan is None else np.concatenate((rows, score_plan.rows))
        tokens, row_index, logit_index, targets, counts = self._tokens.upload(
            step.prefill_tokens,
            none if rows is None else rows,
            none if logit_rows is None else logit_rows,
            *((none, none) if score_plan is None else (score_plan.targets, score_plan.counts)),
        )
        hidden = self._find_hidden(tokens, num_decode, None if rows is None else row_index)
        if score_plan is None:
            logits = self.model.logits(hidden)
            return logits if rows is None else logits[:num_sampled], None if logit_rows is None else logit_index, None
        scores = score_prompt(
            lambda rows: self.sampler.widen(self.model.logits(rows)),
            hidden[num_sampled:],
            targets,
            counts,
            score_plan.width,
            piece_rows=self.sampler.max_whole_rows,
        )
        return self.model.logits(hidden[:num_sampled]), None if logit_rows is None else logit_index, scores

    def _find_hidden(self, tokens: torch.Tensor, num_decode: int, wanted: torch.Tensor | None) -> torch.Tensor:
        """Return the hidden states [n, hidden_size] of the planned step's rows, or of those that are `wanted`."""
        slots, graphs = self.attention.row_slots, self.layer_graphs
        if graphs is not None and graphs.max_rows < slots.shape[0]:
            graphs = None
        ids = torch.empty_like(slots) if graphs is None else graphs.take_ids(slots.shape[0])
        gather_ids(self._slots, slots, tokens, num_decode, ids)
        self.attention.write_tokens(ids)
        if graphs is None:
            return self.model.forward(ids, self.attention, wanted)
        hidden = graphs.forward(slots.shape[0])
        return hidden if wanted is None else hidden.index_select(0, wanted)

    def _pad_sampled(self, rows: Int32s) -> Int32s:
        """Repeat the last of the rows until there are as many as in a graph, whose head has loaded its kernels."""
        if self.decode_graphs is None or rows.size < 2:
            return rows
        places = np.arange(self.decode_graphs.pad_sampled(rows.size))
        return rows[np.minimum(places, rows.size - 1)]

    def _saved_s(self, step: Step) -> float:
        """Return the seconds saved by reading the groups' shared pages once."""
        if not step.group_first_rows.size or not self.attention.use_groups:
            return 0.0
        pages_saved = int(((step.group_num_rows - 1) * step.group_num_columns).sum())
        bytes_per_page = self.attention.shape.kv_bytes_per_token * self.attention.page_size
        return pages_saved * bytes_per_page / _READ_BYTES_PER_S

    def _fetch(
        self,
        step: Step,
        plan: SamplePlan,
        sampled: Sampled | None,
        scores: PromptScores | None,
        started_s: float,
        cpu_s: float,
    ) -> Launched:
        """Enqueue the copies of the results to the host, on the side stream."""
        done = torch.cuda.Event()
        ids = logprobs = top_tokens = top_logprobs = None
        self._copies.wait_stream(self._stream)
        with torch.cuda.stream(self._copies):
            if sampled is not None:
                self._turn = (self._turn + 1) % RING_SIZE
                count = plan.slots.size
                ids = self._pinned_ids[self._turn][:count].copy_(sampled.ids, non_blocking=True)
                if sampled.logprobs is not None:
                    pinned = self._pinned_logprobs[self._turn][:count]
                    logprobs = pinned.copy_(sampled.logprobs, non_blocking=True)
                if sampled.top_tokens is not None and sampled.top_logprobs is not None:
                    for tensor in (sampled.top_tokens, sampled.top_logprobs):
                        tensor.record_stream(self._copies)
                    top_tokens = sampled.top_tokens.to("cpu", non_blocking=True)
                    top_logprobs = sampled.top_logprobs.to("cpu", non_blocking=True)
            if scores is not None:
                for tensor in scores:
                    tensor.record_stream(self._copies)
                scores = PromptScores(*(tensor.to("cpu", non_blocking=True) for tensor in scores))
            done.record(self._copies)
        if ids is not None:
            self._grammar_rows.note_sampled(step.number, plan, done, ids)
        host_cpu_s = time.thread_time() - cpu_s
        return CudaLaunched(
            step.number,
            plan,
            sampled,
            started_s,
            host_cpu_s,
            done,
            ids,
            logprobs,
            top_tokens,
            top_logprobs,
            scores=scores,
        )
