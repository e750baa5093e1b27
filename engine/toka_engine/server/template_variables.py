"""Checks what a request gives the chat template beside its messages.

Owns: which variables a request may set, how large they may be, and which of them the model's template does not read:
those are named in the answer as ignored. Pure: no I/O, no state.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, TypeAlias

from toka_engine.server.chat_template import ChatTemplate
from toka_engine.server.conversation import MAX_REQUEST_FURTHER_CHARACTERS, count_characters
from toka_engine.server.errors import invalid, mistyped
from toka_engine.server.request import doc

MAX_CHARACTERS = 64 * 1024
"""The most characters of `chat_template_kwargs`."""
_MAX_EFFORT = 64
_RESERVED = frozenset(
    (
        "messages",
        "tools",
        "documents",
        "chat_template",
        "tokenize",
        "return_dict",
        "bos_token",
        "eos_token",
        "raise_exception",
        "strftime_now",
    )
)
"""Variables that belong to the server or to fields of their own."""

TemplateKwargs: TypeAlias = Annotated[
    dict[str, Any] | None, doc("Variables of the chat template; those that it does not read are named as ignored.")
]
Documents: TypeAlias = Annotated[
    list[dict[str, Any]] | None, doc("For templates that read `documents`; else named as ignored.")
]
AddGenerationPrompt: TypeAlias = Annotated[
    bool | None,
    doc("False: the prompt ends behind the last message. True by default, but with `continue_final_message`."),
]
ContinueFinalMessage: TypeAlias = Annotated[
    bool | None, doc("The prompt ends with the content of the last message, which the answer continues.")
]
ReasoningEffort: TypeAlias = Annotated[
    str | None, doc("For templates that read `reasoning_effort`; else named as ignored.")
]


class TemplateVariables(NamedTuple):
    """Checked variables of one request."""

    values: dict[str, Any]
    continues_final: bool
    ignored: list[str]
    """The fields that the model's template does not read."""


def check_template_variables(
    template: ChatTemplate,
    *,
    kwargs: dict[str, Any] | None,
    documents: list[dict[str, Any]] | None,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    reasoning_effort: str | None = None,
) -> TemplateVariables:
    """Return the variables. Raises a 400 that names the field."""
    if kwargs is None and documents is None and add_generation_prompt is None and reasoning_effort is None:
        return TemplateVariables({}, bool(continue_final_message), [])
    values: dict[str, Any] = {}
    ignored: list[str] = []
    if documents:
        count_characters(documents, "documents", MAX_REQUEST_FURTHER_CHARACTERS)
        _give(values, ignored, template, "documents", documents, "documents")
    if reasoning_effort is not None:
        if not 1 <= len(reasoning_effort) <= _MAX_EFFORT:
            raise invalid("reasoning_effort", f"'reasoning_effort' must have 1 to {_MAX_EFFORT} characters.")
        _give(values, ignored, template, "reasoning_effort", reasoning_effort, "reasoning_effort")
    _check_kwargs(kwargs or {})
    for name, value in (kwargs or {}).items():
        if name == "add_generation_prompt":
            add_generation_prompt = _agree(name, value, add_generation_prompt)
        elif name == "continue_final_message":
            continue_final_message = _agree(name, value, continue_final_message)
        else:
            _give(values, ignored, template, name, value, f"chat_template_kwargs.{name}")
    if continue_final_message and add_generation_prompt:
        message = "'continue_final_message' and 'add_generation_prompt' exclude each other."
        raise invalid("continue_final_message", message)
    if add_generation_prompt is False:
        values["add_generation_prompt"] = False
    return TemplateVariables(values, bool(continue_final_message), ignored)


def _give(
    values: dict[str, Any], ignored: list[str], template: ChatTemplate, name: str, value: Any, field: str
) -> None:
    """Set a variable that the template reads; name `field` as ignored where it does not."""
    if name in template.variables:
        values[name] = value
    else:
        ignored.append(field)


def _check_kwargs(kwargs: dict[str, Any]) -> None:
    count_characters(kwargs, "chat_template_kwargs", MAX_CHARACTERS)
    for name in kwargs:
        if name in _RESERVED:
            field = f"chat_template_kwargs.{name}"
            raise invalid(field, f"'{field}' is not a variable that a request may set.")


def _agree(name: str, value: Any, other: bool | None) -> bool | None:
    """Return a field that may stand in `chat_template_kwargs`, too."""
    if value is not None and not isinstance(value, bool):
        field = f"chat_template_kwargs.{name}"
        raise mistyped(field, "true or false")
    if None not in (value, other) and value != other:
        raise invalid(name, f"'{name}' and 'chat_template_kwargs.{name}' differ.")
    return other if value is None else value
