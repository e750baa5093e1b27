"""An operator that dies after any single write leaves nothing that the next one does not bring to the same end.

A life of an operator is a `Runtime` in this process, behind a proxy of its own: when the write is made, its answer is
withheld and every connection cut, for good. What it knew is lost with it, as by a SIGKILL, and a new life costs no
start of a process. Real processes are killed in tests/cluster/test_robustness.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from toka_operator.runtime import Runtime
from toka_operator.settings import Settings

from tests.cluster.operating import SYSTEM, Operator
from tests.cluster.proxy import CUT, Fault, FaultProxy

CHILDREN = "statefulset,service,serviceaccount,pdb"
LIFE = {"lease_duration_s": 4, "lease_renew_deadline_s": 3, "lease_retry_s": 1, "taken_name_retry_s": 1}


class Life:
    """One life of an operator; over as soon as it has made `num_writes` writes (0: never)."""

    def __init__(self, operator: Operator, num_writes: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.proxy = FaultProxy(operator.kubeconfig)
        self.proxy.victim, self.proxy.kill_after_writes = self, num_writes
        self.is_over = False
        with monkeypatch.context() as environment:
            environment.setenv("KUBECONFIG", str(self.proxy.kubeconfig))
            settings = Settings("engine:1", SYSTEM, (operator.namespace,), identity="the-only", health_port=0, **LIFE)
            self.runtime = Runtime(settings)

    def kill(self) -> None:
        """Cut it off. The proxy calls this."""
        self.is_over = True
        self.proxy.faults = [Fault(CUT)]


@contextmanager
def living(operator: Operator, num_writes: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Life]:
    life = Life(operator, num_writes, monkeypatch)
    with life.proxy:
        life.runtime.start()
        try:
            yield life
        finally:
            life.kill()
            life.runtime.stop()


def describe(operator: Operator, name: str) -> dict[str, Any]:
    """All children of a TokaDeployment without what differs from run to run, its name written NAME. Ordinals do: a name
    that a leaving pod still has is passed over."""
    selector = f"app.kubernetes.io/instance={name},app.kubernetes.io/part-of=toka"
    children = operator.list(CHILDREN, selector)
    children += operator.list("controllerrevision", f"{selector},app.kubernetes.io/component=revision")
    found = {}
    for child in children:
        spec = child.get("spec", child.get("data", {}))
        for key in ("clusterIP", "clusterIPs", "ordinals"):
            spec.pop(key, None)
        found[f"{child['kind']}/{child['metadata']['name']}"] = [child["metadata"]["labels"], spec]
    described: dict[str, Any] = json.loads(json.dumps(found).replace(name, "NAME"))
    return described


def is_settled(operator: Operator, name: str = "chat") -> bool:
    """Whether an object's newest spec is Ready with one revision; or, if the object is gone, its children, too."""
    found = operator.get("td", name)
    if found is None:
        return not operator.list(f"{CHILDREN},controllerrevision,pod", f"app.kubernetes.io/instance={name}")
    conditions = {c["type"]: c for c in found.get("status", {}).get("conditions", [])}
    is_seen = found.get("status", {}).get("observedGeneration") == found["metadata"]["generation"]
    return is_seen and conditions["Ready"]["status"] == "True" and len(operator.sets(name)) == 1


def die_after_each_write(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> int:
    """Lets one life after the other make one write, until one has nothing to write. Returns the number of deaths."""
    for num_deaths in range(60):
        with living(operator, 1, monkeypatch) as life:
            operator.wait_for(lambda life=life: life.is_over or is_settled(operator), "a write or the end")
            if not life.is_over:
                life.proxy.kill_after_writes = 0
                operator.wait_for(lambda: is_settled(operator), "the end")
                return num_deaths
    raise AssertionError("every life writes something: no end")


CHANGES: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None, int]] = {
    "creation": (None, {"replicas": 2}, 5),
    "rollout": ({"replicas": 2}, {"engine": {"pageSize": 32}}, 4),
    "scaling up": ({"replicas": 1}, {"replicas": 3}, 3),
    "scaling down": ({"replicas": 3}, {"replicas": 1}, 2),
    "deletion": ({"replicas": 2}, None, 0),
    "deletion and another of the name": ({"replicas": 2}, {"replicas": 3}, 5),
}
"""The object before (None: there is none), the change (None: it is deleted), and the writes that it takes at least."""


@pytest.mark.parametrize("case", CHANGES)
def test_a_death_after_any_single_write_ends_the_same(
    without_operator: Operator, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """The same is done to `calm`, whose operator lives on, and to `chat`."""
    operator = without_operator
    before, change, at_least = CHANGES[case]

    def make_change(name: str) -> None:
        if "deletion" in case:
            operator.delete_and_wait("td", name)
        if change is not None and (before is None or "deletion" in case):
            operator.apply(name, **change)
        elif change is not None:
            operator.patch(name, **change)

    with living(operator, 0, monkeypatch):
        for name in ("calm", "chat") if before else ():
            operator.apply(name, **(before or {}))
            operator.wait_for(lambda name=name: is_settled(operator, name), f"the beginning of {name}")
        make_change("calm")
        operator.wait_for(lambda: is_settled(operator, "calm"), "the undisturbed end")
    make_change("chat")
    assert die_after_each_write(operator, monkeypatch) >= at_least
    assert describe(operator, "chat") == describe(operator, "calm")
