"""Makes of a conversation in the shape of chat completions what is generated, for every endpoint that answers one.

Owns: the fields of a conversation, the order of its checks, and how its choices are split.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, NamedTuple

import msgspec

from toka_engine.messages import Int32s
from toka_engine.server.answers import AnswerFormat
from toka_engine.server.calls.grammars import write_grammar
from toka_engine.server.chat_template import ChatTemplate
from toka_engine.server.conversation import check_messages
from toka_engine.server.dialect import Dialect
from toka_engine.server.engine import Engine
from toka_engine.server.errors import invalid
from toka_engine.server.generate import GenerationJob
from toka_engine.server.generation_spec import GenerationSpec
from toka_engine.server.grammar_requests import AskedGrammar
from toka_engine.server.limits import GenerationOptions, Limits, int_in
from toka_engine.server.preparation import Preparation
from toka_engine.server.request import GenerationRequest, doc
from toka_engine.server.settings import check_shared
from toka_engine.server.split_render import Splitting
from toka_engine.server.template_variables import (
    AddGenerationPrompt,
    ContinueFinalMessage,
    Documents,
    ReasoningEffort,
    TemplateKwargs,
    TemplateVariables,
    check_template_variables,
)
from toka_engine.server.tools import ToolUse, check_tools


class ChatRequest(GenerationRequest, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of a chat request."""

    messages: Annotated[
        list[dict[str, Any]],
        doc("Roles system, developer, user, assistant; content as text or as parts; the template gets further keys."),
    ]
    max_completion_tokens: Annotated[int | None, doc("The same as `max_tokens`.")] = None
    logprobs: Annotated[bool | None, doc("The logprob of each token.")] = None
    top_logprobs: Annotated[
        int | None, doc("0 to `max_topk_logprobs` likeliest tokens beside each one; only together with `logprobs`.")
    ] = None
    tools: Annotated[list[Any] | None, doc("Functions that the model may call; the template gets each whole.")] = None
    tool_choice: Annotated[
        str | dict[str, Any] | None, doc("`auto`, `none`, `required`, one function, or `allowed_tools`.")
    ] = None
    parallel_tool_calls: Annotated[bool | None, doc("False: at most one call in an answer.")] = None
    chat_template_kwargs: TemplateKwargs = None
    documents: Documents = None
    add_generation_prompt: AddGenerationPrompt = None
    continue_final_message: ContinueFinalMessage = None
    reasoning_effort: ReasoningEffort = None
    verbosity: Annotated[str | None, doc("A hint without effect, named in `x-toka-ignored`.")] = None


class ChatPlan(NamedTuple):
    """A checked conversation, ready to be answered in the shape of any endpoint."""

    prompts: list[Int32s]
    spec: GenerationSpec
    options: GenerationOptions
    splitting: Splitting | None
    """None: the answer is text alone."""

    def make_job(
        self,
        engine: Engine,
        model: str,
        plain_form: Callable[..., AnswerFormat] | None,
        split_form: Callable[..., AnswerFormat],
    ) -> GenerationJob:
        """Return the job. `split_form` also takes the `renderers` of the choices; without a `plain_form` it writes
        answers that are text alone, too.
        """
        if self.splitting is None and plain_form is not None:
            return engine.make_job(self.prompts, self.spec, self.options, plain_form, model)
        dialect = engine.dialect
        new_inner = engine.renderer_maker(self.options, dialect.bytes_of)
        renderers = dialect.renderers(self.splitting or Splitting(), new_inner)
        form = partial(split_form, renderers=renderers.all)
        job = engine.make_job(self.prompts, self.spec, self.options, form, model)
        return msgspec.structs.replace(job, new_renderer=renderers.add)


async def plan_chat(request: ChatRequest, preparation: Preparation) -> ChatPlan:
    """Check and encode a conversation, but for its grammar. Raises a 400 that names the field."""
    engine = preparation.engine
    limits = engine.limits
    options = _check(request, limits)
    if engine.template is None:
        raise invalid("messages", "This model has no chat template: use /v1/completions.")
    tools = check_tools(request.tools, request.tool_choice, request.parallel_tool_calls)
    turns, ignored = check_messages(request.messages, limits)
    given = _check_variables(request, engine.template)
    preparation.note(ignored + given.ignored)
    turns, variables = engine.dialect.tools.prepare(turns, tools.tools if tools else ())
    ids, tail = await preparation.make_encoder(options).encode_chat(
        turns, engine.template, {**given.values, **variables}, continues_final=given.continues_final
    )
    options = _join_grammars(options, tools, engine.dialect, tail)
    spec = limits.plan(options, [ids], "messages")
    if tools is not None and tools.max_calls == 1:
        spec = msgspec.structs.replace(spec, deliver_each=True)  # so that it ends behind its call
    return ChatPlan([ids], spec, options, engine.dialect.splitting(tools, tail))


def _join_grammars(
    options: GenerationOptions, tools: ToolUse | None, dialect: Dialect, prompt_tail: str
) -> GenerationOptions:
    """Return the options with one grammar for the calls, the answer that the request asks for, and the reasoning before
    them.
    """
    asked = options.grammar
    reasoning = dialect.reasoning_before(prompt_tail)
    is_required = tools is not None and tools.choice.mode == "required"
    is_bound = tools is not None and (bool(tools.strict) or tools.choice.names is not None)
    if not is_required and not is_bound and (asked is None or (tools is None and reasoning is None)):
        return options
    param = asked.param if asked is not None else "tool_choice" if is_required else "tools"
    try:
        answer = asked.source if asked is not None else None
        source = write_grammar(dialect.tools.name, tools, answer, reasoning, dialect.write_tag)
    except ValueError as error:
        raise invalid(param, f"'{param}' cannot be joined with tools or reasoning: {error}.") from error
    return msgspec.structs.replace(options, grammar=AskedGrammar(source, param))


def _check_variables(request: ChatRequest, template: ChatTemplate) -> TemplateVariables:
    return check_template_variables(
        template,
        kwargs=request.chat_template_kwargs,
        documents=request.documents,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        reasoning_effort=request.reasoning_effort,
    )


def _check(request: ChatRequest, limits: Limits) -> GenerationOptions:
    """Check everything but the messages."""
    if request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs", "'top_logprobs' needs 'logprobs' to be true.")
    num_top = int_in(request.top_logprobs, "top_logprobs", 0, limits.max_top_logprobs(), 0)
    max_tokens, name = request.max_tokens, "max_tokens"
    if request.max_completion_tokens is not None:
        if max_tokens not in (None, request.max_completion_tokens):
            raise invalid("max_tokens", "'max_tokens' and 'max_completion_tokens' differ.")
        max_tokens, name = request.max_completion_tokens, "max_completion_tokens"
    return check_shared(
        request,
        limits,
        max_tokens=max_tokens,
        max_tokens_field=name,
        num_logprobs=num_top if request.logprobs else -1,
    )
