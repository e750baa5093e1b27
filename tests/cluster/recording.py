"""Everything that happened to some objects while a test went on.

A test that asks from time to time what there is misses whatever came and went in between. A watch misses nothing: the
API server hands on each change, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.cluster.operating import PATHS, Json, Operator


class Recording:
    """The states of a set of objects, one after each change to any of them, oldest first."""

    def __init__(self, objects: list[Json]) -> None:
        self._objects = {each["metadata"]["uid"]: each for each in objects}
        self.states: list[list[Json]] = [objects]

    def note(self, event: Json) -> None:
        """Adds the state after one event of a watch."""
        found = event["object"]
        if event["type"] == "DELETED":
            self._objects.pop(found["metadata"]["uid"], None)
        else:
            self._objects[found["metadata"]["uid"]] = found
        self.states.append(list(self._objects.values()))

    def has_reached(self, objects: list[Json]) -> bool:
        """Whether the newest state is this one."""
        return _versions(objects) == _versions(self.states[-1])

    def count(self, is_counted: Callable[[Json], bool]) -> list[int]:
        """The number of objects, in each state, of which `is_counted` is true."""
        return [sum(map(is_counted, state)) for state in self.states]


def is_staying(pod: Json) -> bool:
    """Whether nobody told a pod to go."""
    return "deletionTimestamp" not in pod["metadata"]


def is_serving(pod: Json) -> bool:
    """Whether a pod runs and nobody told it to go."""
    return is_staying(pod) and pod.get("status", {}).get("phase") == "Running"


def _versions(objects: list[Json]) -> dict[str, str]:
    return {each["metadata"]["uid"]: each["metadata"]["resourceVersion"] for each in objects}


@contextmanager
def record(operator: Operator, kind: str) -> Iterator[Recording]:
    """Records the objects of a kind in the test's namespace. It is complete when the block has ended."""
    path = PATHS[kind].format(operator.namespace)
    listed = operator.server.request("GET", path)
    recording = Recording(listed["items"])
    since = f"{path}?watch=true&resourceVersion={listed['metadata']['resourceVersion']}"
    with operator.server.watch(since, recording.note) as errors:
        yield recording

        def is_complete() -> bool:
            assert not errors, errors
            return recording.has_reached(operator.server.request("GET", path)["items"])

        operator.wait_for(is_complete, f"the recording of every {kind} to be complete")
