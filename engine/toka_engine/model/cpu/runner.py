"""Executes steps on a CPU. A step's work is done when `launch` returns."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from toka_engine.messages import Step, Tokens
from toka_engine.model.backend import Launched
from toka_engine.model.causal import CausalModel
from toka_engine.model.cpu.attention import CpuAttention
from toka_engine.model.cpu.stage_exchange import StageExchange
from toka_engine.model.cpu.step_runner import StepRunner
from toka_engine.model.cpu.vocabulary import Vocabulary, WholeVocabulary
from toka_engine.model.prompt_scores import PromptScores, ScorePlan, message_fields, plan_scores, score_prompt
from toka_engine.model.sample_plan import Sample, Sampled, SamplePlan, plan_sampling
from toka_engine.model.slot_grammars import SlotGrammars
from toka_engine.model.slot_state import HostSlots
from toka_engine.model.step_rows import find_sampled_rows, make_layout

_PIECE_ROWS = 32
"""Rows of prompts that are scored at a time: as fast as more, and their logits stay in the caches."""


class CpuRunner(StepRunner):
    """A backend.Runner. Its rows do not depend on the rows beside them: seeded requests are repeatable."""

    def __init__(
        self,
        model: CausalModel,
        attention: CpuAttention,
        state: HostSlots,
        sample: Sample,
        vocabulary: Vocabulary | None = None,
        check: Callable[[Step], None] | None = None,
        exchange: StageExchange | None = None,
    ) -> None:
        """`vocabulary`: this rank's part of it; None: there is one rank. `check` raises where ranks are at different
        steps. `exchange`: this is the last of several pipeline stages.
        """
        super().__init__(model, attention, state, check)
        self._exchange = exchange
        self.grammars = SlotGrammars(state.max_seqs, model.config.vocab_size)
        self.sample = sample
        self._vocabulary = WholeVocabulary() if vocabulary is None else vocabulary

    @torch.inference_mode()
    def launch(self, step: Step) -> Launched:
        """See backend.Runner."""
        started_s, cpu_s = time.monotonic(), time.thread_time()
        self._begin(step)
        self.grammars.set_up(step)
        plan = plan_sampling(step, self.state)
        sampled, scores = self._forward_and_sample(step, plan)
        self.state.advance(step)
        return Launched(step.number, plan, sampled, started_s, time.thread_time() - cpu_s, scores=scores)

    def finish(self, launched: Launched) -> Tokens:
        """See backend.Runner."""
        sampled, plan = launched.sampled, launched.plan
        wall_s = time.monotonic() - launched.started_s
        fields = {"step_wall_s": wall_s, "host_cpu_s": launched.host_cpu_s} | message_fields(launched.scores)
        if sampled is None:
            return Tokens(launched.number, np.empty(0, np.int32), **fields)
        ids = sampled.ids.numpy()
        empty = np.empty(0, np.float32)
        logprobs = empty if sampled.logprobs is None else sampled.logprobs.numpy()
        if sampled.top_tokens is None or sampled.top_logprobs is None:
            return Tokens(launched.number, ids, logprobs, **fields)
        return Tokens(
            launched.number,
            ids,
            logprobs,
            top_rows=plan.top.astype(np.int32),
            top_tokens=sampled.top_tokens.numpy().reshape(-1),
            top_logprobs=sampled.top_logprobs.numpy().reshape(-1),
            top_width=plan.top_width,
            **fields,
        )

    def _forward_and_sample(self, step: Step, plan: SamplePlan) -> tuple[Sampled | None, PromptScores | None]:
        logits, logit_rows, scores = self._forward(step)
        if not plan.slots.size:
            return None, scores
        sampled = self.sample(logits, logit_rows, self._fill_masks(plan), self.state)
        self._follow(plan, sampled.ids)
        slots = _to_tensor(plan.slots).long()
        # The next step may be planned before anybody has seen a -1: its row must stay a valid token.
        last_tokens = sampled.ids.clamp(min=0)
        self.state.last_tokens.index_copy_(0, slots, last_tokens)
        if self._exchange is not None:
            self._exchange.send_tokens(step.number, plan.slots, last_tokens)
        return sampled, scores

    def _fill_masks(self, plan: SamplePlan) -> SamplePlan:
        """Return the plan with the masks of its rows that follow a grammar."""
        if not plan.grammatical.size:
            return plan
        masks = np.empty((plan.grammatical.size, self.grammars.num_words), np.int32)
        self.grammars.fill(plan.slots[plan.grammatical], masks)
        return replace(plan, masks=masks)

    def _follow(self, plan: SamplePlan, ids: torch.Tensor) -> None:
        """Show the sampled ids to the matchers, and mark in `ids` where one has failed."""
        if plan.grammatical.size:
            slots, chosen = plan.slots[plan.grammatical], ids.numpy()[plan.grammatical]
            self.grammars.consume(slots, chosen)
            ids.numpy()[plan.grammatical] = self.grammars.mark_failed(slots, chosen)

    def _forward(self, step: Step) -> tuple[torch.Tensor, torch.Tensor | None, PromptScores | None]:
        """Return logits [n, vocab], where samples share logits each sample's index into them [R] int64, and scores."""
        self.attention.plan(make_layout(step, self.state, keep_seeded_out=True))
        ids = self.state.last_tokens[_to_tensor(step.decode_slots).long()]
        if not step.prefill_slots.size:
            self.attention.write_tokens(ids)
            return self.model.logits(self.model.forward(self._find_inputs(step, ids), self.attention)), None, None
        ids = torch.cat((ids, _to_tensor(step.prefill_tokens)))
        self.attention.write_tokens(ids)
        rows, logit_rows = find_sampled_rows(step)
        score_plan = plan_scores(step)
        wanted = rows if score_plan is None else np.concatenate((rows, score_plan.rows))
        hidden = self.model.forward(self._find_inputs(step, ids), self.attention, _to_tensor(wanted).long())
        logits = self.model.logits(hidden[: rows.size])
        scores = None if score_plan is None else self._score(hidden[rows.size :], score_plan)
        return logits, None if logit_rows is None else _to_tensor(logit_rows).long(), scores

    def _find_inputs(self, step: Step, ids: torch.Tensor) -> torch.Tensor:
        """Return the inputs of the step's forward: its token ids [T], or the rows of the stage before."""
        return ids if self._exchange is None else self._exchange.receive_rows(step)

    def _score(self, hidden: torch.Tensor, plan: ScorePlan) -> PromptScores:
        targets, counts = torch.from_numpy(plan.targets), torch.from_numpy(plan.counts)
        return score_prompt(self.model.logits, hidden, targets, counts, plan.width, self._vocabulary, _PIECE_ROWS)


def _to_tensor(array: NDArray[np.int32]) -> torch.Tensor:
    # Arrays decoded from a frame are read-only, which torch cannot express: hence the copy.
    return torch.from_numpy(array if array.flags.writeable else array.copy())
