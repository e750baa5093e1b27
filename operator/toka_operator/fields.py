"""Fields: typed reading of untyped JSON, with every mistake collected and named by its path.

Owns: what counts as an integer, a choice, a quantity. Pure. Knows nothing of any particular field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from toka_operator.errors import FieldError

Json = dict[str, Any]
T = TypeVar("T")


@dataclass(slots=True)
class Fields:
    """Reads typed values out of one object of the spec; what is wrong goes to `errors`, and a safe value
    comes back."""

    raw: Mapping[str, Any]
    defaults: Json
    path: str
    errors: list[FieldError] = field(default_factory=list)

    def refuse(self, name: str, message: str) -> None:
        self.errors.append(FieldError(f"{self.path}.{name}", message))

    def get(self, name: str) -> Any:
        value = self.raw.get(name)
        return self.defaults.get(name) if value is None else value

    def child(self, name: str) -> Fields:
        value = self.raw.get(name, {})
        if not isinstance(value, Mapping):
            self.refuse(name, "must be an object")
            value = {}
        defaults = self.defaults.get(name, {})
        return Fields(value, defaults, f"{self.path}.{name}", self.errors)

    def _typed(self, name: str, kind: type[T], is_valid: Callable[[T], bool], wanted: str, safe: T) -> T:
        value = self.get(name)
        if type(value) is kind and is_valid(value):
            return value
        self.refuse(name, f"must be {wanted}")
        return safe

    def text(self, name: str) -> str:
        return self._typed(name, str, lambda v: 0 < len(v) <= 4096, "a string that is not empty", "")

    def optional_text(self, name: str) -> str | None:
        return None if self.get(name) is None else self.text(name)

    def integer(self, name: str, low: int, high: int) -> int:
        wanted = f"a whole number from {low} to {high}"
        return self._typed(name, int, lambda v: low <= v <= high, wanted, low)

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        return None if self.get(name) is None else self.integer(name, low, high)

    def boolean(self, name: str) -> bool:
        return self._typed(name, bool, lambda _: True, "true or false", False)

    def choice(self, name: str, options: tuple[str, ...]) -> str:
        return self._typed(name, str, lambda v: v in options, f"one of {', '.join(options)}", options[0])

    def optional_choice(self, name: str, options: tuple[str, ...]) -> str | None:
        return None if self.get(name) is None else self.choice(name, options)

    def quantity(self, name: str) -> str | None:
        value = self.get(name)
        if value is None or (isinstance(value, str | int) and not isinstance(value, bool)):
            return None if value is None else str(value)
        self.refuse(name, "must be a quantity such as 500m or 4Gi")
        return None

    def mapping(self, name: str) -> Json:
        value = self.get(name)
        if value is None or isinstance(value, Mapping):
            return dict(value or {})
        self.refuse(name, "must be an object")
        return {}

    def items(self, name: str, kind: type[T]) -> tuple[T, ...]:
        value = self.get(name)
        if value is None:
            return ()
        if isinstance(value, list) and all(isinstance(item, kind) for item in value):
            return tuple(value)
        self.refuse(name, "must be a list of " + ("strings" if kind is str else "objects"))
        return ()
