"""The newest known state of watched objects, indexed by the TokaDeployment that they name.

Owns: which of two versions of an object is newer, so that a late watch event never hides our own write.
Thread-safe. No I/O. An object is known by (namespace, name) within its kind, and belongs to the key that
`index` derives from it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable

from toka_operator.fields import Json

Key = tuple[str, str]
"""(namespace, name) of a TokaDeployment."""

MAX_DELETED = 4096


class Store:
    """Objects of one kind. `index` gives the key that an object belongs to, or None for an object of no
    interest."""

    def __init__(self, index: Callable[[Json], Key | None], trim: Callable[[Json], Json] = lambda o: o) -> None:
        self._index = index
        self._trim = trim
        self._lock = threading.Lock()
        self._objects: dict[Key, Json] = {}
        self._members: dict[Key, set[Key]] = {}
        self._deleted: OrderedDict[Key, int] = OrderedDict()

    def put(self, obj: Json) -> set[Key]:
        """Keeps `obj` if it is newer than what is known. Returns the keys concerned: its own, and the one
        it left; none, if nothing that is looked at has changed."""
        with self._lock:
            return self._put(obj)

    def remove(self, obj: Json) -> set[Key]:
        """Forgets an object, unless a newer one of that name is known. Returns the keys concerned.

        The deletion's version is remembered for a while: the answer to a write of ours made just before
        may come later.
        """
        with self._lock:
            self._deleted[_name(obj)] = _version(obj)
            if len(self._deleted) > MAX_DELETED:
                self._deleted.popitem(last=False)
            known = self._objects.get(_name(obj))
            if known is None:
                return set()
            is_other = known["metadata"]["uid"] != obj["metadata"]["uid"]
            if is_other and _version(known) > _version(obj):
                return set()
            left = self._discard(_name(obj))
            return {left} if left is not None else set()

    def forget(self, name: Key) -> Key | None:
        """Forgets whatever has this name."""
        with self._lock:
            return self._discard(name)

    def replace_all(
        self, objects: Iterable[Json], version: int, namespace: str | None = None, is_anew: bool = False
    ) -> set[Key]:
        """Takes over a complete list of a namespace (None: of the whole cluster) made at `version`, all at once: nobody
        may see pods as missing that are only about to be listed.

        Returns the keys of everything that changed. Other namespaces' objects stay as they are. `is_anew`: versions
        count anew, so that nothing known is newer than the list.
        """
        listed = {_name(obj): obj for obj in objects}
        with self._lock:
            known = [(n, o) for n, o in self._objects.items() if namespace in (None, n[0])]
            gone = [n for n, o in known if is_anew or (n not in listed and _version(o) <= version)]
            changed = {key for key in (self._discard(name) for name in gone) if key is not None}
            if is_anew:
                self._deleted.clear()
            return changed.union(*map(self._put, listed.values()))

    def get(self, name: Key) -> Json | None:
        with self._lock:
            return self._objects.get(name)

    def members(self, key: Key) -> list[Json]:
        """Every object that belongs to a key, by name."""
        with self._lock:
            return [self._objects[name] for name in sorted(self._members.get(key, ()))]

    def list_keys(self, namespace: str | None = None) -> list[Key]:
        """Every key with an object, of one namespace or (None) of all."""
        with self._lock:
            return [key for key in self._members if namespace in (None, key[0])]

    def list_keys_of(self, is_meant: Callable[[Json], bool]) -> set[Key]:
        """The keys of the objects that `is_meant` is true of."""
        with self._lock:
            meant = (self._index(obj) for obj in self._objects.values() if is_meant(obj))
            return {key for key in meant if key is not None}

    def _put(self, obj: Json) -> set[Key]:
        obj.get("metadata", {}).pop("managedFields", None)
        name = _name(obj)
        known = self._objects.get(name)
        if known is not None and _version(known) >= _version(obj):
            return set()
        if self._deleted.get(name, -1) >= _version(obj):
            return set()
        self._deleted.pop(name, None)
        left = self._discard(name)
        key = self._index(obj)
        if key is not None:
            self._objects[name] = self._trim(obj)
            self._members.setdefault(key, set()).add(name)
            if known is not None and _without_version(known) == _without_version(self._objects[name]):
                return set()
        return {k for k in (left, key) if k is not None}

    def _discard(self, name: Key) -> Key | None:
        known = self._objects.pop(name, None)
        if known is None:
            return None
        key = self._index(known)
        if key is not None:
            members = self._members[key]
            members.discard(name)
            if not members:
                del self._members[key]
        return key


def _name(obj: Json) -> Key:
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


def _without_version(obj: Json) -> Json:
    """The object but for the version that each write gives it."""
    return {**obj, "metadata": {**obj["metadata"], "resourceVersion": ""}}


def _version(obj: Json) -> int:
    """Resource versions of one kind are numbers that grow; 0 for anything else."""
    text = str(obj["metadata"].get("resourceVersion", ""))
    return int(text) if text.isdigit() else 0
