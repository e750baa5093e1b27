"""Renders chat messages by the model folder's own template, in jinja2's sandbox.

Owns: the template, the ids that end a text, and the rule that text of a request never becomes a special token: of a
message, of its further keys, and of the variables that a request gives the template. Only text that could is changed: a
*mark*, a noncharacter that occurs in no such text and not in the template, is put into each special token that is
written out in a text, behind its first character, and at the edge of a text that starts with a suffix, or ends with a
prefix, of a special token, so that the template's own text cannot complete it. The template renders as always: the mark
stands inside the text, so that trimming and testing see the text as it is. The rendered text is cut at the marks, and
its parts are encoded each by itself: across a cut no token is recognised, and the decoded text is unchanged. Requests
without such text have no mark and are encoded in one piece, exactly as transformers would.

A final message is continued by another mark behind its content: the rendered text ends there.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import msgspec

from toka_engine.errors import ModelInvalidError
from toka_engine.server.errors import invalid

_TEMPLATE_DEFECTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""The exceptions of a template's expressions where the messages are not as it takes for granted."""
NO_VARIABLES: Mapping[str, Any] = {}
_PLAIN = frozenset(("role", "content", "system", "user", "assistant", "tool"))
"""Texts of every conversation, which are the server's own."""
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


Turn: TypeAlias = dict[str, Any]
"""One message for the template: `role`, `content` as text, and whatever else the request's message has."""


class _TokenizerConfig(msgspec.Struct):
    chat_template: str | list[dict[str, str]] | None = None
    bos_token: str | dict[str, Any] | None = None
    eos_token: str | dict[str, Any] | None = None


class ChatTemplate:
    """The default chat template of a tokenizer folder."""

    def __init__(self, source: str, special_tokens: dict[str, str], special_texts: Sequence[str]) -> None:
        """`special_tokens`: bos_token and the like, for the template; `special_texts`: never to be injected.

        Raises ModelInvalidError where the template cannot be compiled.
        """
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelInvalidError(f"the chat template cannot be compiled: {error}") from error
        self.variables = frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))
        """The names of the variables that the template reads."""
        self.source = source
        self.special_tokens = special_tokens
        self._beginnings = tuple({text[:cut] for text in special_texts for cut in range(1, len(text))})
        self._ends = tuple({text[cut:] for text in special_texts for cut in range(1, len(text))})
        self._pattern = re.compile("|".join(map(re.escape, sorted(special_texts, key=len, reverse=True))) or r"(?!)")

    def render(
        self, turns: Sequence[Turn], variables: Mapping[str, Any] = NO_VARIABLES, *, continues_final: bool = False
    ) -> list[str]:
        """Return the parts of the prompt, to be encoded each by itself. Raises a 400 where the template refuses.

        `variables`: what the template may read beside the messages; `continues_final`: the prompt ends with the content
        of the last message.
        """
        mark: str | None = None
        messages: Any = turns
        if any(self._is_suspect(text) for text in _texts([turns, variables])):
            mark = self._unused_mark(turns, variables)
            messages, variables = self._defuse_all(turns, mark), self._defuse_all(variables, mark)
        end: str | None = None
        if continues_final:
            end = self._unused_mark(messages, variables)
            messages = [*messages[:-1], {**messages[-1], "content": (messages[-1]["content"] or "") + end}]
        text = self._render_text(messages, {"add_generation_prompt": not continues_final, **variables})
        if end is not None:
            text, found, _ = text.rpartition(end)
            if not found:
                name = "continue_final_message"
                raise invalid(name, f"'{name}': the model's chat template leaves the last message out.")
            text = text.replace(end, "")
        return [part for part in text.split(mark) if part] if mark else [text]

    def _render_text(self, messages: Sequence[Turn], variables: Mapping[str, Any]) -> str:
        try:
            return self._template.render(**{**self.special_tokens, **variables, "messages": messages})
        except jinja2.TemplateError as error:
            raise invalid("messages", f"The model's chat template refuses these messages: {error}.") from error
        except _TEMPLATE_DEFECTS as error:
            kind = type(error).__name__
            raise invalid("messages", f"The model's chat template fails on these messages: {kind}: {error}.") from error

    def _is_suspect(self, content: str) -> bool:
        if content in _PLAIN:
            return False
        return bool(self._pattern.search(content)) or self._defuse_ends(content, "!") != content

    def _defuse_all(self, value: Any, mark: str) -> Any:
        """Return a copy of `value` in which no text can become a special token."""
        if isinstance(value, str):
            return self._defuse(value, mark) if self._is_suspect(value) else value
        if isinstance(value, Mapping):
            return {self._defuse_all(key, mark): self._defuse_all(each, mark) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self._defuse_all(each, mark) for each in value]
        return value

    def _defuse(self, content: str, mark: str) -> str:
        inside = self._pattern.sub(lambda found: found[0][:1] + mark + found[0][1:], content)
        return self._defuse_ends(inside, mark)

    def _defuse_ends(self, content: str, mark: str) -> str:
        """Put `mark` inside the surrounding white space, which the template may trim."""
        core = content.strip()
        if not core:
            return content
        begin = content.index(core)
        head, tail = content[:begin], content[begin + len(core) :]
        if core.startswith(self._ends):
            head += mark
        if core.endswith(self._beginnings):
            tail = mark + tail
        return head + core + tail

    def _unused_mark(self, *values: Any) -> str:
        for mark in _MARKS:
            if mark not in self.source and not any(mark in text for text in _texts(values)):
                return mark
        raise invalid("messages", "The messages contain every one of Unicode's noncharacters.")


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in `value`: keys, too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield key
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


def load_chat_template(folder: Path, special_texts: Sequence[str]) -> ChatTemplate | None:
    """Return the template of chat_template.jinja, else of tokenizer_config.json; None where there is none."""
    config = read_tokenizer_config(folder)
    template_file = folder / "chat_template.jinja"
    source: str | None = None
    if template_file.is_file():
        source = template_file.read_text()
    elif isinstance(config.chat_template, str):
        source = config.chat_template
    elif config.chat_template:
        by_name = {entry.get("name"): entry.get("template") for entry in config.chat_template}
        source = by_name.get("default")
    if source is None:
        return None
    tokens = {"bos_token": _content(config.bos_token), "eos_token": _content(config.eos_token)}
    return ChatTemplate(source, {name: text for name, text in tokens.items() if text}, special_texts)


def read_tokenizer_config(folder: Path) -> _TokenizerConfig:
    """Return tokenizer_config.json, or an empty one. Raises ModelInvalidError where it is not valid."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return _TokenizerConfig()
    try:
        return msgspec.json.decode(path.read_bytes(), type=_TokenizerConfig)
    except msgspec.DecodeError as error:
        raise ModelInvalidError(f"{path}: {error}") from error


def find_end_ids(model_dir: Path, tokenizer_dir: Path, id_of: Any) -> tuple[int, ...]:
    """Return the ids that end a text: of generation_config.json and config.json, and the tokenizer's eos_token."""
    found: set[int] = set()
    for path in (model_dir / "generation_config.json", model_dir / "config.json"):
        if path.is_file():
            try:
                ids = msgspec.json.decode(path.read_bytes(), type=_EndIds).eos_token_id
            except msgspec.DecodeError as error:
                raise ModelInvalidError(f"{path}: {error}") from error
            found.update([ids] if isinstance(ids, int) else ids or ())
    eos_token = _content(read_tokenizer_config(tokenizer_dir).eos_token)
    if eos_token and (eos_id := id_of(eos_token)) is not None:
        found.add(eos_id)
    return tuple(sorted(found))


class _EndIds(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


class _GenerationTag(jinja2.ext.Extension):
    """Renders the body of `{% generation %}`, which marks the assistant's text for training, as it is."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration is a mutable class attribute)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _content(token: str | dict[str, Any] | None) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _to_json(value: Any, indent: int | None = None) -> str:
    """Return JSON without HTML escapes, as model templates expect; marks stay as they are."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
