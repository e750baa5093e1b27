"""The fixtures of the server's unit tests, for pages that a browser opens."""

from __future__ import annotations

from tests.unit.server.conftest import sentence_ids, tokenizer, tokenizer_dir

__all__ = ["sentence_ids", "tokenizer", "tokenizer_dir"]
