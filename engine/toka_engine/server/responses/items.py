"""Makes the output items of a response from the parts of an answer, and the events that announce them.

Owns: the order of an item's events, the numbers and ids in them. A whole response is made in the same way as a streamed
one, only that nobody sees its events.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Sequence
from typing import Any

from toka_engine.server.answers import encode
from toka_engine.server.calls.source import Part

Item = dict[str, Any]


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"


class ResponseItems:
    """The items of one response, and its events that nobody has taken yet."""

    def __init__(self, custom_tools: Collection[str]) -> None:
        """`custom_tools`: those whose one argument is handed on as free text."""
        self.all: list[Item] = []
        self._custom_tools = custom_tools
        self._events: list[bytes] = []
        self._num_events = 0
        self._open = ""
        """The kind of part that the last item is made of; "": it is done."""
        self._texts: list[str] = []
        self._logprobs: list[Any] = []
        self._delta_head = b""
        self._is_custom = False

    def take_events(self) -> bytes:
        events, self._events = self._events, []
        return b"".join(events)

    def announce(self, kind: str, **fields: Any) -> None:
        """Add an event of type `kind`."""
        body = encode({"type": kind, "sequence_number": self._num_events, **fields})
        self._num_events += 1
        self._events.append(b"event: %s\ndata: %s\n\n" % (kind.encode(), body))

    def add(self, parts: Sequence[Part], logprobs: Sequence[Any] = ()) -> None:
        """Take the next parts; `logprobs` belong to the text among them, or to that before."""
        for part in parts:
            kind = "arguments" if part.kind == "call" else part.kind
            if part.kind == "call" or self._open != kind:
                self._close("completed")
                self._begin(part)
            if part.kind != "call":
                self._extend(part.text, logprobs if part.kind == "content" else ())
                if part.kind == "content":
                    logprobs = ()
        if logprobs and self._open == "content":
            self._extend("", logprobs)

    def finish(self, status: str) -> None:
        """End the last item with `status`; an answer without any is a message without text."""
        if not self.all:
            self._begin(Part("content", ""))
        self._close(status)

    # ------------------------------------------------------------ one item

    def _begin(self, part: Part) -> None:
        self._texts, self._logprobs = [], []
        if part.kind == "reasoning":
            self._open = "reasoning"
            item = {"id": new_id("rs"), "type": "reasoning", "summary": [], "content": [], "status": "in_progress"}
            self._add_item(item)
            self._announce_part("added", {"type": "reasoning_text", "text": ""})
            self._set_delta_head("response.reasoning_text.delta", content_index=0)
        elif part.kind == "content":
            self._open = "content"
            self._add_item(
                {"id": new_id("msg"), "type": "message", "role": "assistant", "content": [], "status": "in_progress"}
            )
            self._announce_part("added", _text_part("", []))
            self._set_delta_head("response.output_text.delta", content_index=0)
        else:
            self._begin_call(part.text)

    def _begin_call(self, name: str) -> None:
        self._open = "arguments"
        self._is_custom = name in self._custom_tools
        if self._is_custom:
            item = {"id": new_id("ctc"), "type": "custom_tool_call", "input": ""}
        else:
            item = {"id": new_id("fc"), "type": "function_call", "arguments": ""}
        self._add_item({**item, "call_id": new_id("call"), "name": name, "status": "in_progress"})
        self._set_delta_head("response.function_call_arguments.delta")

    def _add_item(self, item: Item) -> None:
        self.all.append(item)
        self.announce("response.output_item.added", output_index=len(self.all) - 1, item=item)

    def _set_delta_head(self, kind: str, **fields: Any) -> None:
        """Encode the part of the item's deltas that is always the same."""
        head = encode({"type": kind, "item_id": self.all[-1]["id"], "output_index": len(self.all) - 1, **fields})
        self._delta_head = b"event: %s\ndata: %s" % (kind.encode(), head[:-1])

    def _extend(self, text: str, logprobs: Sequence[Any]) -> None:
        if text:
            self._texts.append(text)
        if self._open == "content":
            self._logprobs += logprobs
            inner = b',"delta":%s,"logprobs":%s' % (encode(text), encode(logprobs) if logprobs else b"[]")
        elif self._open == "arguments" and self._is_custom:
            return  # its text is inside the arguments' JSON: it is handed on once that is whole
        else:
            inner = b',"delta":%s' % encode(text)
        self._events.append(b'%s%s,"sequence_number":%d}\n\n' % (self._delta_head, inner, self._num_events))
        self._num_events += 1

    def _close(self, status: str) -> None:
        if not self._open:
            return
        kind, self._open = self._open, ""
        item, text = self.all[-1], "".join(self._texts)
        item["status"] = status
        if kind == "reasoning":
            self._close_part("response.reasoning_text.done", {"type": "reasoning_text", "text": text}, {})
        elif kind == "content":
            logprobs = self._logprobs
            self._close_part("response.output_text.done", _text_part(text, logprobs), {"logprobs": logprobs})
        elif self._is_custom:
            item["input"] = _free_text(text)
            self._announce_on_item("response.custom_tool_call_input.delta", delta=item["input"])
            self._announce_on_item("response.custom_tool_call_input.done", input=item["input"])
        else:
            item["arguments"] = text
            self._announce_on_item("response.function_call_arguments.done", name=item["name"], arguments=text)
        self.announce("response.output_item.done", output_index=len(self.all) - 1, item=item)

    def _close_part(self, kind: str, part: Item, fields: Item) -> None:
        self.all[-1]["content"] = [part]
        self._announce_on_item(kind, content_index=0, text=part["text"], **fields)
        self._announce_part("done", part)

    def _announce_part(self, change: str, part: Item) -> None:
        self._announce_on_item(f"response.content_part.{change}", content_index=0, part=part)

    def _announce_on_item(self, kind: str, **fields: Any) -> None:
        self.announce(kind, item_id=self.all[-1]["id"], output_index=len(self.all) - 1, **fields)


def _text_part(text: str, logprobs: list[Any]) -> Item:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _free_text(arguments: str) -> str:
    """Return the one argument of a custom tool; what is no such JSON, because it was cut, as it stands."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    found = value.get("input") if isinstance(value, dict) else None
    return found if isinstance(found, str) else arguments
