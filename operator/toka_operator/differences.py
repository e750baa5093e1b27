"""How a child as it should be compares with the child as it is.

Owns: what counts as the same, given that the API server fills in defaults and rewrites quantities. Pure.
"""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import Any

from toka_operator.fields import Json

_SUFFIXES = {
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    "k": Decimal(10) ** 3,
    "M": Decimal(10) ** 6,
    "G": Decimal(10) ** 9,
    "T": Decimal(10) ** 12,
    "Ki": Decimal(2) ** 10,
    "Mi": Decimal(2) ** 20,
    "Gi": Decimal(2) ** 30,
    "Ti": Decimal(2) ** 40,
}
_QUANTITY_PARENTS = {"requests", "limits", "sizeLimit"}
_NOT_COMPARED = {"apiVersion", "kind", "name", "namespace", "ownerReferences"}
"""In metadata and at the top: the address of the object, and the owner, which is checked by uid before."""


def is_satisfied(desired: Json, live: Json) -> bool:
    """Whether `live` holds everything that `desired` names; what the API server added to it does not
    matter."""
    return not find_corrections(desired, live)


def find_corrections(desired: Json, live: Json) -> Json:
    """A JSON merge patch that makes `live` satisfy `desired`; empty if it does. Lists are replaced whole."""
    patch: Json = {}
    for key, wanted in desired.items():
        if key == "metadata":
            own = {k: v for k, v in wanted.items() if k not in _NOT_COMPARED}
            found = find_corrections(own, live.get("metadata", {}))
            if found:
                patch["metadata"] = found
        elif key not in _NOT_COMPARED or "metadata" not in desired:
            _correct(patch, key, wanted, live.get(key))
    return patch


def _correct(patch: Json, key: str, wanted: Any, found: Any) -> None:
    if isinstance(wanted, dict) and isinstance(found, dict):
        inner: Json = {}
        for name, value in wanted.items():
            is_quantity = key in _QUANTITY_PARENTS and _equal_quantities(value, found.get(name))
            if not is_quantity:
                _correct(inner, name, value, found.get(name))
        if inner:
            patch[key] = inner
    elif not _is_same(key, wanted, found):
        patch[key] = _fill_in(wanted, found)


def _fill_in(wanted: Any, found: Any) -> Any:
    """A list to replace another, its items with what the API server gave those of the same name (a
    nodePort, say)."""
    if not (isinstance(wanted, list) and isinstance(found, list)):
        return wanted
    named = {item["name"]: item for item in found if isinstance(item, dict) and "name" in item}
    return [{**named.get(w.get("name"), {}), **w} if isinstance(w, dict) else w for w in wanted]


def _is_same(key: str, wanted: Any, found: Any) -> bool:
    if found is None:
        if isinstance(wanted, dict):
            return all(_is_same(name, value, None) for name, value in wanted.items())
        return wanted in (None, "", [], 0, False)
    if isinstance(wanted, dict) and isinstance(found, dict):
        patch: Json = {}
        _correct(patch, key, wanted, found)
        return not patch
    if isinstance(wanted, list) and isinstance(found, list):
        pairs = zip(wanted, found, strict=False)
        return len(wanted) == len(found) and all(_is_same("", a, b) for a, b in pairs)
    if key in _QUANTITY_PARENTS:
        return _equal_quantities(wanted, found)
    return bool(wanted == found and type(wanted) is type(found))


def _equal_quantities(a: Any, b: Any) -> bool:
    if a is None or b is None or isinstance(a, dict) or isinstance(b, dict):
        return False
    try:
        return parse_quantity(str(a)) == parse_quantity(str(b))
    except InvalidOperation:
        return bool(a == b)


def parse_quantity(text: str) -> Decimal:
    """The value of a Kubernetes quantity. Raises InvalidOperation if it is none."""
    for length in (2, 1):
        if text[-length:] in _SUFFIXES:
            return Decimal(text[:-length]) * _SUFFIXES[text[-length:]]
    return Decimal(text)


def find_stale_annotations(desired: Json, live: Json, keys_annotation: str) -> Json:
    """A merge patch that removes annotations of ours (listed on the child under `keys_annotation`) no
    longer wanted."""
    wanted = desired["metadata"].get("annotations", {})
    present = live["metadata"].get("annotations") or {}
    listed = present.get(keys_annotation)
    ours = {keys_annotation, *listed.split(",")} if listed else set()
    stale = {key: None for key in sorted(ours) if key in present and key not in wanted}
    return {"metadata": {"annotations": stale}} if stale else {}
