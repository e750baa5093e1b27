"""The manager without its I/O: messages in, messages out. The loop, the tests and the benchmark drive this
one class."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from toka_engine.config import EngineConfig
from toka_engine.manager.lateness import predict_lateness
from toka_engine.manager.lifecycle import cancel, fail_waiting
from toka_engine.manager.receiving import receive_tokens
from toka_engine.manager.requests import Request, Scoring, Waiting
from toka_engine.manager.scheduler import plan_step
from toka_engine.manager.sizes import Sizes
from toka_engine.manager.state import ManagerState
from toka_engine.manager.step_time import StepSize
from toka_engine.messages import (
    DEADLINE_UNREACHABLE,
    Cancel,
    Deltas,
    Grammar,
    GrammarReady,
    PromptLogprobs,
    Refused,
    ServerToManager,
    Started,
    Stats,
    Step,
    StepTime,
    Submit,
    Tokens,
)

_MAX_RETRY_AFTER_S = 60
"""OpenAI's clients do not heed a longer one."""


class Manager:
    """Turns requests into steps and tokens into deltas."""

    def __init__(
        self,
        config: EngineConfig,
        sizes: Sizes,
        clock: Callable[[], float],
        num_workers: int = 1,
        step_times: Sequence[StepTime] = (),
    ) -> None:
        """`clock` returns seconds; `num_workers`: those that sample, and compile grammars; `step_times`: what the
        workers have measured. With pipeline stages these are of one stage, and are left alone.
        """
        self.state = ManagerState(config, sizes, clock)
        self.state.grammars.num_workers = num_workers
        if config.pp_size == 1:
            measured = [
                StepSize(each.num_rows, each.num_context, each.num_prefill, each.num_prefill * (each.num_prefill // 2))
                for each in step_times
            ]
            self.state.step_times.begin_with(measured, [each.seconds for each in step_times])

    @property
    def has_work(self) -> bool:
        return bool(self.state.where or self.state.in_flight or self.state.copies)

    def handle(self, message: ServerToManager) -> list[msgspec.Struct]:
        """Take in a message of the server; return the answers that are due at once."""
        match message:
            case Submit():
                return self._submit(message)
            case Cancel(streams):
                for stream in streams.tolist():
                    cancel(self.state, stream)
                return []

    def receive(self, tokens: Tokens) -> list[PromptLogprobs | Deltas]:
        return receive_tokens(self.state, tokens)

    def note_grammar(self, ready: GrammarReady) -> list[Deltas]:
        """Take in that a worker has compiled a grammar, or cannot; return the ends of streams that wait for it."""
        if not ready.error:
            if self.state.grammars.note_compiled(ready.number):
                self.state.queue.note_news()
            return []
        known = self.state.grammars.fail(ready.number)
        return [] if known is None else fail_waiting(self.state, known)

    def take_grammars(self) -> list[Grammar]:
        """Return what the workers must hear before the next step."""
        return self.state.grammars.take_outbox()

    def plan(self) -> Step | None:
        """Return the next step for the workers, or None when there is nothing to send now."""
        return plan_step(self.state)

    def take_started(self) -> Started | None:
        """Return the prompts admitted since the last call; None if there are none."""
        if not self.state.started:
            return None
        streams, num_cached = zip(*self.state.started, strict=True)
        self.state.started.clear()
        return Started(np.asarray(streams, np.int64), np.asarray(num_cached, np.int32))

    def stats(self, cpu_s: float, step_busy_s: float) -> Stats:
        """Return the totals; `cpu_s` is the CPU time of this process so far, `step_busy_s` that of `BusyTime`."""
        state = self.state
        counters, allocator = state.counters, state.pages.allocator
        return Stats(
            running=state.slots.num_running,
            waiting=state.queue.num_choices,
            kv_pages_total=allocator.num_pages,
            kv_pages_used=allocator.num_used,
            kv_pages_cached=allocator.num_cached_only,
            prompt_tokens_total=counters.prompt_tokens,
            prefix_hit_tokens_total=counters.prefix_hit_tokens,
            output_tokens_total=counters.output_tokens,
            preemptions_total=counters.preemptions,
            steps_total=counters.steps,
            hydragen_rows_total=counters.hydragen_rows,
            manager_cpu_s_total=cpu_s,
            step_wall_s_total=counters.step_wall_s,
            step_busy_s_total=step_busy_s,
            model_cpu_s_total=counters.model_cpu_s,
            durations=state.times.report(),
        )

    def _submit(self, submit: Submit) -> list[msgspec.Struct]:
        state = self.state
        state.has_deadlines = state.has_deadlines or submit.timeout_s > 0.0
        if refused := self._refuse(submit):
            if submit.priority <= 0:
                state.refused_s = state.clock()
            return [refused]
        state.has_target = state.has_target or (submit.is_streamed and state.sizes.target_gap_s > 0.0)
        request = Request(
            first_stream=submit.first_stream,
            num_choices=submit.num_choices,
            first_choice=submit.first_choice,
            prompt_length=submit.prompt_ids.size,
            max_tokens=submit.max_tokens,
            sampling=submit.sampling,
            stop_ids=frozenset(submit.stop_ids),
            deliver_each=submit.deliver_each,
            is_streamed=submit.is_streamed,
            arrival=state.queue.count_arrival(),
            edits=submit.edits,
            delivers_stop=submit.delivers_stop,
            scoring=Scoring(submit.prompt_logprobs) if submit.prompt_logprobs >= 0 else None,
            priority=submit.priority,
            submitted_s=state.clock(),
            grammar=None if submit.grammar is None else state.grammars.use(submit.grammar, submit.num_choices),
        )
        state.counters.prompt_tokens += request.prompt_length
        entry = Waiting(request, dict.fromkeys(range(submit.num_choices)), submit.prompt_ids)
        state.enqueue(entry, at_front=False)
        return []

    def _refuse(self, submit: Submit) -> Refused | None:
        """Return the refusal of a request for which there is no place or no time; None: it may wait."""
        state = self.state
        may_start = max(0, state.sizes.max_running - state.slots.num_running)
        # Background work that waits takes no place from other requests.
        num_waiting = state.queue.num_choices if submit.priority > 0 else state.queue.count_ahead(0)
        if num_waiting + submit.num_choices > state.config.max_queued_requests + may_start:
            return Refused(submit.first_stream, "the queue is full")
        return self._refuse_late(submit) if submit.timeout_s else None

    def _refuse_late(self, submit: Submit) -> Refused | None:
        """Return the refusal of a request that will probably be late; None: it may wait."""
        late = predict_lateness(self.state, submit)
        if late is None:
            return None
        retry_after_s = min(_MAX_RETRY_AFTER_S, math.ceil(late.seconds))
        event = "start" if late.is_start else "be answered"
        message = f"the request would {event} about {late.seconds:.1f} s after its 'timeout_s'"
        return Refused(submit.first_stream, message, DEADLINE_UNREACHABLE, retry_after_s)
