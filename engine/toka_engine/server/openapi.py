"""The OpenAPI document, made from the routes and the bodies' structs, and a page that shows it.

Owns: how an operation is described. The page has no resource from elsewhere, and no script.
"""

from __future__ import annotations

import functools
from typing import Any

import jinja2
import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from toka_engine.server import batch_documents
from toka_engine.server.chat_plan import ChatRequest
from toka_engine.server.endpoints import (
    chat_answers,
    completions,
    kept_responses,
    messages,
    messages_answers,
    models,
    probes,
    responses,
    responses_answers,
    tokenize,
)
from toka_engine.server.errors import ErrorAnswer

PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_PREFIX = "#/components/schemas/"
_ERRORS = {
    "400": "A field is wrong: `param` names it.",
    "401": "The API key is missing or wrong.",
    "404": "There is no such model, or no such path.",
    "408": "The request did not arrive in time.",
    "413": "The body is too large.",
    "415": "The body is no JSON, or is compressed.",
    "429": "The queue is full, or the engine too busy for `timeout_s`: `retry-after` says when to come again.",
    "500": "The request failed in the engine.",
    "503": "The engine takes no requests now: `retry-after` says when to come again.",
    "504": "The request's `timeout_s`, or `x-request-timeout-ms` of its headers, is over.",
}
_BODIES: tuple[type[msgspec.Struct], ...] = (
    completions.CompletionRequest,
    completions.Completion,
    ChatRequest,
    chat_answers.ChatCompletion,
    responses.ResponsesRequest,
    responses_answers.Response,
    responses.InputTokensRequest,
    responses.InputTokens,
    kept_responses.ItemList,
    kept_responses.Deleted,
    messages.MessagesRequest,
    messages.TokenCount,
    messages_answers.AnthropicMessage,
    models.ModelCard,
    models.ModelList,
    probes.Pong,
    probes.Alive,
    probes.Readiness,
    probes.Version,
    probes.Load,
    tokenize.TokenizeRequest,
    tokenize.TokenizeAnswer,
    tokenize.DetokenizeRequest,
    tokenize.DetokenizeAnswer,
    tokenize.TokenizerInfo,
    ErrorAnswer,
    *batch_documents.BODIES,
)


def _reference(body: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": _PREFIX + body.__name__}


def _answer(body: type[msgspec.Struct], description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _reference(body)}}}


def _errors(*statuses: str) -> dict[str, Any]:
    return {status: _answer(ErrorAnswer, _ERRORS[status]) for status in statuses}


def _generating(name: str, request: type[msgspec.Struct], answer: type[msgspec.Struct], summary: str) -> dict[str, Any]:
    operation = _posting(name, request, answer, summary, *_ERRORS)
    whole = operation["responses"]["200"]
    whole["description"] = "The answer; with `stream` server-sent events, each a part of it, the last `[DONE]`."
    whole["content"]["text/event-stream"] = {"schema": {}}
    return operation


def _posting(
    name: str, request: type[msgspec.Struct], answer: type[msgspec.Struct], summary: str, *errors: str
) -> dict[str, Any]:
    return {
        "operationId": name,
        "summary": summary,
        "security": [{"key": []}],
        "requestBody": {"required": True, "content": {"application/json": {"schema": _reference(request)}}},
        "responses": {"200": _answer(answer, summary), **_errors(*errors)},
    }


def _reading(name: str, answer: type[msgspec.Struct], summary: str, *errors: str) -> dict[str, Any]:
    return {"operationId": name, "summary": summary, "responses": {"200": _answer(answer, summary), **_errors(*errors)}}


COMPLETIONS = _generating(
    "createCompletion", completions.CompletionRequest, completions.Completion, "Complete texts or token ids"
)
CHAT = _generating("createChatCompletion", ChatRequest, chat_answers.ChatCompletion, "Answer a conversation")
MODELS = {
    **_reading("listModels", models.ModelList, "The models that requests may name", "401"),
    "security": [{"key": []}],
}
MODEL = {**_reading("retrieveModel", models.ModelCard, "One model", "401", "404"), "security": [{"key": []}]}
RESPONSES = _generating(
    "createResponse", responses.ResponsesRequest, responses_answers.Response, "Answer with a response"
)
MESSAGES = _generating(
    "createMessage", messages.MessagesRequest, messages_answers.AnthropicMessage, "Answer in Anthropic's form"
)
COUNT_TOKENS = _posting(
    "countTokens", messages.MessagesRequest, messages.TokenCount, "Count a prompt's tokens", *_ERRORS
)
INPUT_TOKENS = _posting(
    "countInputTokens", responses.InputTokensRequest, responses.InputTokens, "Count a prompt's tokens", *_ERRORS
)
RESPONSE = {
    **_reading("retrieveResponse", responses_answers.Response, "A response that is kept", "401", "404"),
    "security": [{"key": []}],
}
DELETE_RESPONSE = {
    **_reading("deleteResponse", kept_responses.Deleted, "Drop a response that is kept", "401", "404"),
    "security": [{"key": []}],
}
RESPONSE_ITEMS = {
    **_reading("listInputItems", kept_responses.ItemList, "The input of a response that is kept", "400", "401", "404"),
    **batch_documents.query_parameters("after", "limit", "order"),
    "security": [{"key": []}],
}
PING = _reading("ping", probes.Pong, "Whether the process answers, for the original's clients")
LIVEZ = _reading("livez", probes.Alive, "Whether the process answers")
READYZ = _reading("readyz", probes.Readiness, "Whether new requests should come here")
READYZ["responses"]["503"] = _answer(probes.Readiness, "New requests should not come here")
LOAD = _reading("load", probes.Load, "The generating requests that are not answered yet")
VERSION = _reading("version", probes.Version, "The engine's version")
HEALTH = {
    "operationId": "health",
    "summary": "Whether new requests should come here, without words",
    "responses": {status: {"description": text} for status, text in (("200", "Yes"), ("503", "No"))},
}
_TOKENIZER_ERRORS = ("400", "401", "404", "408", "413", "415", "500", "503")
TOKENIZE = _posting(
    "tokenize", tokenize.TokenizeRequest, tokenize.TokenizeAnswer, "The tokens of a text", *_TOKENIZER_ERRORS
)
DETOKENIZE = _posting(
    "detokenize", tokenize.DetokenizeRequest, tokenize.DetokenizeAnswer, "The text of tokens", *_TOKENIZER_ERRORS
)
TOKENIZER_INFO = {
    **_reading("tokenizerInfo", tokenize.TokenizerInfo, "What clients need to count and render", "401", "503"),
    "security": [{"key": []}],
}
METRICS = {
    "operationId": "metrics",
    "summary": "Prometheus metrics",
    "responses": {
        "200": {"description": "Text format 0.0.4", "content": {"text/plain": {"schema": {"type": "string"}}}}
    },
}


@functools.cache
def _make_document(application: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title=application.title,
        version=application.version,
        description=application.description,
        routes=application.routes,
    )
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # the framework's own: a name in a path cannot be wrong
    _, schemas = msgspec.json.schema_components(_BODIES, ref_template=_PREFIX + "{name}")
    document["components"] = {
        "schemas": schemas,
        "securitySchemes": {
            "key": {"type": "http", "scheme": "bearer", "description": "an API key, where the server asks for one"}
        },
    }
    return document


@functools.cache
def encoded_document(application: FastAPI) -> bytes:
    """Return the document as JSON."""
    return msgspec.json.encode(_make_document(application))


# ---------------------------------------------------------------- the page

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ info.title }} {{ info.version }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
code, td:nth-child(2) { font-family: ui-monospace, monospace; font-size: 0.9em }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: 0.2rem 0.8rem 0.2rem 0; border-top: 1px solid #8884 }
h2 { margin-top: 2.5rem }
</style>
<h1>{{ info.title }} {{ info.version }}</h1>
<p>{{ info.description }} The machine's form of this page is <a href="openapi.json">openapi.json</a>.
{% for path, methods in paths.items() %}{% for method, operation in methods.items() %}
<h2 id="{{ operation.operationId }}"><code>{{ method | upper }} {{ path }}</code></h2>
<p>{{ operation.summary }}{% if operation.security %}; asks for the API key, where one is set{% endif %}.
{% set json = operation.requestBody.content["application/json"] if operation.requestBody %}
{% if json %}{% set name = json.schema["$ref"] %}
<p>Body: <a href="#{{ name | last_part }}"><code>{{ name | last_part }}</code></a>{% endif %}
<table>
<tr><th>Status<th>Body<th>
{% for status, answer in operation.responses.items() %}<tr><td>{{ status }}
<td>{% for kind, content in (answer.content or {}).items() %}{% if content.schema["$ref"] -%}
<a href="#{{ content.schema["$ref"] | last_part }}">{{ content.schema["$ref"] | last_part }}</a>
{%- else %}{{ kind }}{% endif %} {% endfor %}<td>{{ answer.description }}
{% endfor %}</table>
{% endfor %}{% endfor %}
<h1>Bodies</h1>
{% for name, schema in components.schemas.items() %}<h2 id="{{ name }}"><code>{{ name }}</code></h2>
{% if schema.description %}<p>{{ schema.description }}
{% endif %}<table>
<tr><th>Field<th>Type<th>
{% for field, part in schema.properties.items() %}<tr><td><code>{{ field }}</code>
<td>{{ part | type_name }}<td>{% if field in schema.required %}required{% endif %} {{ part.description or "" }}
{% endfor %}</table>
{% endfor %}
</html>
"""


def _last_part(reference: str) -> str:
    return reference.rpartition("/")[2]


def _type_name(schema: dict[str, Any]) -> str:
    """Return a schema in a few words."""
    if "anyOf" in schema:
        return " | ".join(map(_type_name, schema["anyOf"]))
    if "$ref" in schema:
        return _last_part(schema["$ref"])
    if schema.get("type") == "array":
        return f"[{_type_name(schema.get('items', {}))}]"
    return str(schema.get("type", "any"))


@functools.cache
def make_page(application: FastAPI) -> str:
    """Return the document as a page of HTML."""
    environment = jinja2.Environment(autoescape=True)
    environment.filters |= {"last_part": _last_part, "type_name": _type_name}
    return environment.from_string(_PAGE).render(_make_document(application))
