"""Kubernetes quantities: 1Gi and 1024Mi, 0.5 and 500m are the same.

Owns: the comparison and one spelling of a quantity. Pure.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from kubernetes.utils.quantity import parse_quantity

QUANTITY_MAPS = ("requests", "limits", "capacity")
"""Fields of the Kubernetes API whose values are quantities."""
QUANTITY_FIELDS = ("sizeLimit", "divisor", "storage")
"""Fields of the Kubernetes API that are a quantity."""


def read_quantity(value: Any) -> Decimal | None:
    """The value of a quantity, or None if it is none."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        parsed: Decimal = parse_quantity(str(value))
    except (ValueError, ArithmeticError):
        return None
    return parsed if parsed.is_finite() else None


def are_equal(a: Any, b: Any) -> bool:
    """Whether two values are the same quantity, or the same text that is none."""
    first, second = read_quantity(a), read_quantity(b)
    return bool(a == b) if first is None or second is None else first == second


def spell(value: Any) -> Any:
    """One spelling for all that are the same quantity; what is none stays as it is."""
    parsed = read_quantity(value)
    return value if parsed is None else f"{parsed.normalize():f}"
