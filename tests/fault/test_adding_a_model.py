"""The model of docs/adding-a-model.md, compiled: here with all else that takes a compiler and its time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.model.test_adding_a_model import serve_and_compare, tree

__all__ = ["tree"]


def test_a_model_of_the_document_is_served_compiled_and_says_what_transformers_says(
    tree: Path, make_tiny: Callable[..., tuple[Any, Path]], smollm2: Path, tmp_path: Path
) -> None:
    serve_and_compare("T", tree, make_tiny, smollm2, tmp_path)
