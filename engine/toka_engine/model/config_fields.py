"""Checks of single fields of a model's config.json; the error names file and field."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from toka_engine.errors import ModelInvalidError

MAX_SIZE = 1 << 24
"""Bound of every size that config.json states."""


class ConfigFields:
    """The fields of config.json, or of an object in it, with checks that name the field.

    Every method raises ModelInvalidError.
    """

    def __init__(self, fields: dict[str, Any], path: Path, prefix: str = "") -> None:
        """`prefix`: the names, each with a dot, of the objects that these fields are in."""
        self.fields = fields
        self.path = path
        self._prefix = prefix

    def error(self, message: str) -> ModelInvalidError:
        """Make the error whose message begins with a field's name."""
        return ModelInvalidError(f"{self.path}: {self._prefix}{message}")

    def child(self, name: str) -> ConfigFields:
        """Return the object that field `name` is."""
        value = self.fields.get(name)
        if not isinstance(value, dict):
            raise self.error(f"{name} must be an object, not {value!r:.80}")
        return ConfigFields(value, self.path, f"{self._prefix}{name}.")

    def size(self, name: str, default: int | None = None) -> int:
        value = self.fields.get(name)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
            raise self.error(f"{name} must be an integer in [1, {MAX_SIZE}], not {value!r:.80}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.fields.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self.error(f"{name} must be a positive number, not {value!r:.80}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.fields.get(name, default)
        if not isinstance(value, bool):
            raise self.error(f"{name} must be true or false, not {value!r:.80}")
        return value

    def require(self, name: str, only: str | bool | None) -> None:
        """Refuse any value but `only`; a field that is not there or null has it."""
        value = self.fields.get(name)
        if value is not None and value != only:
            raise self.error(f"{name}={value!r:.80} is not supported ({json.dumps(only)} is)")
