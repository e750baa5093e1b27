"""Runs a checked request: submits it, renders the tokens that come, and writes the answer whole or as events.

The generation is left in every case through its `with`, which cancels the streams that still run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from toka_engine.messages import Int32s
from toka_engine.server.answers import AnswerFormat, FinishedChoice
from toka_engine.server.deadlines import TIMEOUT_HEADER, deduct_elapsed, limit_by_header, start_timer
from toka_engine.server.errors import ClientGoneError
from toka_engine.server.exchange import Exchange
from toka_engine.server.generation_spec import GenerationSpec
from toka_engine.server.keys.use import KeyUse
from toka_engine.server.metrics import Metrics
from toka_engine.server.prompt_logprobs import (
    NO_PROMPT_LOGPROBS,
    PromptLogprobForms,
    batched,
    choose_best,
    move_shown,
)
from toka_engine.server.render import Renderer
from toka_engine.server.request import CompletionTokensDetails, PromptTokensDetails, Usage
from toka_engine.server.streams import Choice, Generation, Streams


class GenerationJob(msgspec.Struct, frozen=True):
    """A checked request, ready to run."""

    prompts: Sequence[Int32s]
    spec: GenerationSpec
    form: AnswerFormat
    new_renderer: Callable[[], Renderer]
    is_streamed: bool
    includes_usage: bool
    reports_usage_each: bool = False
    """Every event has the usage of its choice so far."""
    echoes: Sequence[str] = ()
    """The text of each prompt, which its choices begin with; empty without echo."""
    num_returned: int = 0
    """Choices of each prompt that the answer has, the best of those sampled; 0: all."""
    prompt_forms: PromptLogprobForms = NO_PROMPT_LOGPROBS

    def echo(self, choice_index: int) -> str:
        return self.echoes[choice_index // self.spec.num_choices] if self.echoes else ""


async def run_job(job: GenerationJob, exchange: Exchange, streams: Streams, metrics: Metrics) -> None:
    """Generate and answer. Raises ApiError, and ClientGoneError when there is nobody to answer."""
    connection = exchange.connection
    exchange.model = job.form.model
    exchange.error_event = job.form.error_event
    spec = limit_by_header(job.spec, exchange.header(TIMEOUT_HEADER))
    blocks = await streams.hash_prompts(job.prompts)
    if connection.is_gone:
        raise ClientGoneError("the client closed the connection")
    if exchange.min_priority is not None and spec.priority < exchange.min_priority:
        spec = msgspec.structs.replace(spec, priority=exchange.min_priority)
    spec = deduct_elapsed(spec, exchange.started_s)
    key, usage = exchange.key, None
    with Generation(streams, job.prompts, spec, blocks) as generation:
        connection.gone_callbacks.add(generation.abandon)
        exchange.times = generation.times
        if key is not None:
            key.take(sum(map(len, job.prompts)))
        timer = start_timer(generation)
        try:
            renderers = [job.new_renderer() for _ in generation.choices]
            if job.is_streamed:
                usage = await _answer_in_events(job, exchange, generation, renderers, metrics)
            else:
                usage = await _answer_whole(job, exchange, generation, renderers)
        except Exception as error:
            if metrics.vllm is not None:
                metrics.vllm.note_failure(error, len(generation.choices))
            raise
        finally:
            connection.gone_callbacks.discard(generation.abandon)
            if timer is not None:
                timer.cancel()
            if key is not None:
                _charge(key, generation, usage, is_client_gone=connection.is_gone)
    if metrics.vllm is not None:
        metrics.vllm.note_end((renderer.finish_reason for renderer in renderers), exchange.started_s)
    exchange.usage = usage
    metrics.request_prompt_tokens.inc(usage.prompt_tokens)
    metrics.request_completion_tokens.inc(usage.completion_tokens)


def _charge(key: KeyUse, generation: Generation, usage: Usage | None, *, is_client_gone: bool) -> None:
    """Charge the key for its answer: what usage states, or of one that was cut what came until then. A request that
    is refused costs nothing.
    """
    num_prompt = sum(map(len, generation.prompts))
    if usage is not None:
        num_completion = usage.completion_tokens
    else:
        num_completion = sum(choice.num_taken for choice in generation.choices)
        if not num_completion and not is_client_gone:
            key.take(-num_prompt)
            return
    key.take(num_completion)
    key.count(num_prompt, num_completion)


async def _answer_whole(
    job: GenerationJob, exchange: Exchange, generation: Generation, renderers: Sequence[Renderer]
) -> Usage:
    texts: list[list[str]] = [[job.echo(index)] if job.echoes else [] for index in range(len(renderers))]
    choices = [FinishedChoice("", None, [], index) for index in range(len(renderers))]
    num_unfinished = len(renderers)
    while num_unfinished:
        for choice in await generation.news():
            renderer, finished = renderers[choice.index], choices[choice.index]
            texts[choice.index].append(renderer.advance(choice))
            finished.shown += renderer.take_shown()
            if renderer.finish_reason is not None and finished.finish_reason is None:
                finished.finish_reason = renderer.finish_reason
                finished.text = "".join(texts[choice.index])
                num_unfinished -= 1
    chosen = choices
    if job.num_returned != job.spec.num_choices:
        chosen = choose_best(choices, job.spec.num_choices, job.num_returned)
    if job.spec.prompt_logprobs >= 0:
        _add_prompt_logprobs(job, generation, chosen)
    usage = _usage(job, generation, renderers)
    await exchange.answer(200, job.form.whole(chosen, usage))
    return usage


def _add_prompt_logprobs(job: GenerationJob, generation: Generation, choices: list[FinishedChoice]) -> None:
    """Put the logprobs of the prompts into the choices of an answer, where they are asked for."""
    forms = job.prompt_forms
    for prompt, group in enumerate(batched(choices, job.num_returned or job.spec.num_choices)):
        echo = forms.list_echoed(generation, prompt)
        by_token = forms.list_by_token(generation, prompt)
        for choice in group:
            choice.shown = echo + move_shown(choice.shown, len(job.echo(choice.source)))
            choice.prompt_logprobs = by_token


async def _answer_in_events(
    job: GenerationJob, exchange: Exchange, generation: Generation, renderers: Sequence[Renderer], metrics: Metrics
) -> Usage:
    form, echoes, reports_usage = job.form, job.echoes, job.reports_usage_each
    has_begun = [False] * len(renderers)
    num_unfinished = len(renderers)
    while num_unfinished:
        events: list[bytes] = []
        for choice in await generation.news():
            index = choice.index
            renderer = renderers[index]
            text, shown = renderer.advance(choice), renderer.take_shown()
            begin = len(events)
            if echoes:
                shown = move_shown(shown, len(job.echo(index)))
            if not has_begun[index]:
                has_begun[index] = True
                text = job.echo(index) + text
                shown = job.prompt_forms.list_echoed(generation, index // job.spec.num_choices) + shown
                events.append(form.opening(index))
            finish_reason = renderer.finish_reason
            if text or shown or finish_reason is not None:
                events.append(form.piece(index, text, shown, finish_reason))
                if finish_reason is not None:
                    num_unfinished -= 1
            if reports_usage:
                usage = _usage_so_far(job, generation, choice, renderer)
                events[begin:] = [form.with_usage(event, usage) for event in events[begin:]]
        if not exchange.status:
            # Not earlier: until the first token the request may still be refused with a status of its own.
            await exchange.begin_events()
            metrics.first_token_seconds.observe(exchange.first_token_s or 0.0)
        if events:
            await exchange.write_events(b"".join(events))
    usage = _usage(job, generation, renderers)
    tail = form.usage(usage) if job.includes_usage else b""
    await exchange.end_events(tail + form.done)
    return usage


def _usage(job: GenerationJob, generation: Generation, renderers: Sequence[Renderer]) -> Usage:
    num_prompt = sum(map(len, job.prompts))
    num_completion = 0
    details: CompletionTokensDetails | msgspec.UnsetType = msgspec.UNSET
    for renderer in renderers:
        num_completion += renderer.num_tokens
        if (num_reasoning := renderer.num_reasoning_tokens) is not None:
            before = 0 if details is msgspec.UNSET else details.reasoning_tokens
            details = CompletionTokensDetails(before + num_reasoning)
    cached = PromptTokensDetails(generation.num_cached)
    return Usage(num_prompt, num_completion, num_prompt + num_completion, cached, details)


def _usage_so_far(job: GenerationJob, generation: Generation, choice: Choice, renderer: Renderer) -> Usage:
    """Return the usage of one choice, by the tokens that have come for it."""
    num_prompt = len(job.prompts[choice.index // job.spec.num_choices])
    num_completion = choice.num_taken if renderer.finish_reason is None else renderer.num_tokens
    cached = PromptTokensDetails(choice.submission.num_cached)
    return Usage(num_prompt, num_completion, num_prompt + num_completion, cached)
