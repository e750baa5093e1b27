"""The source of a grammar, as it travels from the server to the workers. Imports nothing of ours."""

from __future__ import annotations

from typing import Literal

import msgspec


class GrammarSource(msgspec.Struct, frozen=True, array_like=True):
    """A client's description of the texts that its output may be. Only sources that the grammar checker has compiled
    reach the workers.
    """

    kind: Literal["json_object", "json_schema", "regex", "choice", "lark"]
    text: str
    """The schema as JSON, the regular expression, the choices as a JSON list, or the grammar in llguidance's Lark; ""
    for json_object."""
    is_lenient: bool = False
    """Keywords of a schema that the library cannot enforce are left out; else they are errors."""
    end_ids: tuple[int, ...] = ()
    """The model's tokens that end a text; filled in when the request is planned."""
