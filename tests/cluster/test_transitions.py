"""Every field of the spec set, changed, unset, at its bounds and of the wrong type, on a real API server.

What the API server refuses changes nothing and names the field. What it accepts converges, then the field is taken away
again, and everything is as it was: the pods too, where the field is not theirs. `field_values` makes the cases from the
CRD. Objects take the cases in turns, many at a time; one more object is left alone, and nothing of it may change.
"""

from __future__ import annotations

import contextlib
import copy
import json
import zlib
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import pytest

from tests.cluster.field_values import Case, list_cases, list_fields
from tests.cluster.gateways import with_kinds
from tests.cluster.harness.api_only import ApiServer
from tests.cluster.harness.errors import CommandFailed, WaitTimeout
from tests.cluster.operating import PATHS, Json, Operator, deployment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
BASE: Json = {
    "model": {"source": "builtin://smollm2"},
    "resources": {"device": "cpu"},
    "rollout": {"minReadySeconds": 0},
}
STORAGE = "transitions"
NEIGHBOURS: dict[str, Json] = {
    "model.revision": {"model": {"source": "hf://org/name"}},
    "model.tokenizer": {"model": {"source": "hf://org/name"}},
    "resources.gpuResource": {"resources": {"device": "gpu"}},
    "resources.sharedMemory": {"resources": {"device": "gpu"}},
    "parallelism.minimumData": {"parallelism": {"data": 8}},
    "parallelism.asyncTensorThreshold": {"parallelism": {"tensor": 2}, "resources": {"device": "gpu"}},
    "networkPolicy.from": {"networkPolicy": {"mode": "Ingress"}},
    "routing.httpRoute.hostnames": {"routing": {"httpRoute": {"parentRefs": [{"name": "x"}]}}},
    "autoscaling": {"autoscaling": {"enabled": True, "maxReplicas": 4, "target": 8}},
    "cache.claimName": {"cache": {"type": "ExistingPVC", "claimName": "models"}},
    "cache": {"cache": {"type": "SharedPVC", "size": "1Gi", "storageClassName": STORAGE}},
    "data": {"data": {"size": "1Gi", "storageClassName": STORAGE}},
    "podTemplate.volumeMounts": {"podTemplate": {"volumes": [{"name": "x"}]}},
    "replicas": {"suspend": True},
}
"""The fields that a field, or all in a group, needs beside it. `cache.type` is tried without."""
IMMUTABLE = {"cache.storageClassName", "cache.accessMode", "data.storageClassName"}
"""Fields no value of which is accepted once the object is there; of others that cannot change, the one they have is."""
TOLD: dict[str, set[str]] = {
    "scheduling.nodeSelector": {"SurgeBlocked"},
    "scheduling.topologySpread": {"SurgeBlocked"},
    "scheduling.priorityClassName": {"PodsRejected"},
    "scheduling.runtimeClassName": {"PodsRejected"},
    "resources.gpuResource": {"SurgeBlocked"},
    "model.source": {"ClaimMissing"},
    "networkPolicy.from": {"ChildRejected"},
    "rollout.minReadySeconds": {"Scaling"},
    "cache.claimName": {"ClaimMissing"},
    "suspend": {"Suspended"},
    "replicas": {"Suspended"},
}
"""The reasons that an object may give instead of being ready: no node, class or claim here is what the value names."""
KINDS = ("service", "serviceaccount", "statefulset", "pdb", "networkpolicy", "hpa", "inferencepool", "httproute")
KINDS = (*KINDS, "persistentvolumeclaim")
OPERATOR_SETTINGS = {"TOKA_ROUTES": "true"}
NUM_OBJECTS = 48
LIMIT_S = 60.0
"""Seconds that a change may take, beside those of all other objects."""


@pytest.fixture(scope="module", autouse=True)
def kinds_that_a_cluster_need_not_have(api_server: ApiServer) -> Iterator[None]:
    """They are there before the operator starts: it looks for one that was away every half a minute."""
    with with_kinds(api_server, "HTTPRoute", "InferencePool"):
        yield


@dataclass
class Turn:
    """An object, the spec that it has between its cases, and the cases that are left for it."""

    name: str
    base: Json
    cases: list[Case] = field(default_factory=list)


def base_of(path: str) -> Json:
    """The spec between the cases of a field."""
    base = copy.deepcopy(BASE)
    if path == "cache.type":
        return base
    for prefix in (path, path.split(".")[0]):
        if prefix in NEIGHBOURS:
            for group, value in copy.deepcopy(NEIGHBOURS[prefix]).items():
                base[group] = {**base.get(group, {}), **value} if isinstance(value, dict) else value
            break
    return base


def merge(base: Json, change: Json) -> Json:
    return {**base, **{k: merge(base[k], v) if isinstance(base.get(k), dict) else v for k, v in change.items()}}


class Board:
    """All objects of the test, seen at once."""

    def __init__(self, operator: Operator) -> None:
        self._operator, self._threads = operator, ThreadPoolExecutor(4)

    def apply(self, name: str, spec: Json, dry_run: bool = False) -> str:
        """`kubectl apply --server-side`; returns the API server's refusal, if it is one."""
        query = "fieldManager=kubectl&force=true&fieldValidation=Strict" + ("&dryRun=All" if dry_run else "")
        path = f"{PATHS['td'].format(self._operator.namespace)}/{name}?{query}"
        try:
            self._operator.server.request("PATCH", path, deployment(name, **spec), "apply-patch+yaml")
        except CommandFailed as error:
            if error.returncode not in (400, 422, 500):
                raise
            return str(json.loads(error.stderr)["message"])
        return ""

    def ask_all(self, questions: list[tuple[str, Json, bool]]) -> list[str]:
        """The answers to many applications, each of an object's name, its spec, and whether it is only asked about."""
        return list(self._threads.map(lambda question: self.apply(*question), questions))

    def apply_all(self, specs: dict[str, Json], told: dict[str, set[str]]) -> list[str]:
        """Gives each object its spec, and waits until each is ready, or says one of the reasons `told` for it. Returns
        what those say that do neither."""
        answers = self._threads.map(self.apply, specs.keys(), specs.values())
        refused = {name: why for name, why in zip(specs, answers, strict=True) if why}
        assert refused == {}
        late: list[str] = []

        def are_settled() -> bool:
            found = {each["metadata"]["name"]: each for each in self._operator.list("td")}
            late[:] = [name for name in specs if not is_settled(found[name], told.get(name, set()))]
            return not late

        try:
            self._operator.server.wait_for(are_settled, "every object", LIMIT_S, poll_s=0.4)
        except WaitTimeout:
            return self.explain(late, specs)
        return []

    def explain(self, names: list[str], specs: dict[str, Json]) -> list[str]:
        told = []
        for name in names:
            status = self._operator.require("td", name).get("status", {})
            reasons = {c["type"]: (c["status"], c["reason"], c["message"][:200]) for c in status.get("conditions", [])}
            told.append(f"{name} {json.dumps(specs[name])[:300]}: {reasons}")
        return told

    def look(self) -> dict[str, Json]:
        """By object, its children, without what a rollout and its end leave behind."""
        found: dict[str, Json] = defaultdict(dict)
        for child in self._operator.list(",".join(KINDS), "app.kubernetes.io/managed-by=toka-operator"):
            spec = copy.deepcopy(child.get("spec", {}))
            if child["kind"] == "StatefulSet":
                spec.pop("ordinals", None)  # the pods that serve stay, whatever their numbers
            metadata = child["metadata"]
            labels = metadata["labels"]
            found[labels["app.kubernetes.io/instance"]][f"{child['kind']} {metadata['name']}"] = {
                "labels": labels, "annotations": metadata.get("annotations"), "spec": spec,
                "owners": metadata.get("ownerReferences"),
            }  # fmt: skip
        return dict(found)

    def pods(self) -> dict[str, set[str]]:
        """By object, the uids of its pods."""
        found: dict[str, set[str]] = defaultdict(set)
        for pod in self._operator.list("pod", "app.kubernetes.io/managed-by=toka-operator"):
            if "deletionTimestamp" not in pod["metadata"]:
                found[pod["metadata"]["labels"]["app.kubernetes.io/instance"]].add(pod["metadata"]["uid"])
        return dict(found)

    def revisions(self) -> dict[str, str]:
        return {each["metadata"]["name"]: each["status"]["currentRevision"] for each in self._operator.list("td")}

    def versions(self, name: str) -> dict[str, str]:
        """The version of each child of an object, and of its pods."""
        selector = f"app.kubernetes.io/instance={name}"
        kinds = ",".join((*KINDS, "pod", "controllerrevision"))
        found = self._operator.list(kinds, selector)
        return {f"{c['kind']} {c['metadata']['name']}": c["metadata"]["resourceVersion"] for c in found}


def is_settled(found: Json, told: set[str]) -> bool:
    status = found.get("status", {})
    if status.get("observedGeneration") != found["metadata"]["generation"]:
        return False
    conditions = {c["type"]: c for c in status["conditions"]}
    reasons = {c["reason"] for c in conditions.values()}
    meant = {"Ready": "True", "Progressing": "False", "Degraded": "False"}
    return all(conditions[kind]["status"] == status for kind, status in meant.items()) or bool(reasons & told)


def sort_cases(board: Board) -> tuple[list[Case], list[tuple[Case, str]]]:
    """The cases that the API server accepts, and those that it refuses, with its words. Sound ones are only asked
    about; of the others none may be accepted."""
    cases = list_cases()
    answers = board.ask_all([(probe_of(case), case.put_into(base_of(case.field)), case.is_sound) for case in cases])
    accepted = [case for case, why in zip(cases, answers, strict=True) if not why]
    return accepted, [(case, why) for case, why in zip(cases, answers, strict=True) if why]


def name_of(base: Json) -> str:
    """A name for all objects with this base."""
    return f"b{zlib.crc32(json.dumps(base, sort_keys=True).encode()):08x}"


def probe_of(case: Case) -> str:
    return f"{name_of(base_of(case.field))}-0"


def share_out(cases: list[Case]) -> list[Turn]:
    """Objects for the cases of each base, so many that all are done after about the same number of turns."""
    by_base: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        by_base[name_of(base_of(case.field))].append(case)
    turns = []
    for name, own in by_base.items():
        count = max(1, round(NUM_OBJECTS * len(own) / len(cases)))
        turns += [Turn(f"{name}-{n}", base_of(own[0].field), own[n::count]) for n in range(count) if own[n::count]]
    return turns


def offer_volumes(operator: Operator, count: int) -> None:
    """Make volumes, and two claims."""
    volume: Json = {"storageClassName": STORAGE, "capacity": {"storage": "1Gi"}, "hostPath": {"path": "/nowhere"}}
    volume |= {"accessModes": ["ReadWriteMany", "ReadWriteOnce"]}
    claim: Json = {"accessModes": ["ReadWriteMany"], "storageClassName": STORAGE}
    claim |= {"resources": {"requests": {"storage": "1Gi"}}}
    names = [f"{operator.namespace}-{number}" for number in range(count)]
    kinds = [("PersistentVolume", names, volume), ("PersistentVolumeClaim", ["models", "x"], claim)]
    for kind, given, spec in kinds:
        made = [{"apiVersion": "v1", "kind": kind, "metadata": {"name": name}, "spec": spec} for name in given]
        operator.server.apply(*made, namespace=operator.namespace)


def test_every_field_converges_and_goes_back_and_nothing_else_changes(operator: Operator) -> None:
    board = Board(operator)
    offer_volumes(operator, 24)
    operator.expected.append("rejected=.*ipBlock.except")  # which no schema can compare with its cidr
    fields = list_fields()
    bases = {f"{name_of(base_of(path))}-0": base_of(path) for path in sorted(fields)}
    told_by_base = {name: {"Suspended"} for name, base in bases.items() if base.get("suspend")}
    assert board.apply_all({"bystander": {**BASE, "replicas": 2}, **bases}, told_by_base) == []

    before = {name: operator.require("td", name)["metadata"]["generation"] for name in bases}
    accepted, refused = sort_cases(board)
    assert [str(case) for case in accepted if not case.is_sound] == []
    unnamed = [(str(case), why) for case, why in refused if case.path.split(".")[0].split("[")[0] not in why]
    assert unnamed == [], "the refusal names the field, or what holds it"
    assert fields - {case.field for case in accepted} == IMMUTABLE, "every field has a value that is accepted"
    by_rules = [(probe_of(case), case.put_into(base_of(case.field)), False) for case, _ in refused if case.is_sound]
    assert all(board.ask_all(by_rules))
    assert {name: operator.require("td", name)["metadata"]["generation"] for name in bases} == before

    turns = share_out(accepted)
    operator.num_edits = 6 * len(accepted)
    told = {turn.name: {"Suspended"} for turn in turns if turn.base.get("suspend")}
    assert board.apply_all({turn.name: turn.base for turn in turns}, told) == []
    versions = board.versions("bystander")
    num_done, problems = 0, []
    for number in range(max(len(turn.cases) for turn in turns)):
        now = {turn.name: (turn, turn.cases[number]) for turn in turns if number < len(turn.cases)}
        children, pods, revisions = board.look(), board.pods(), board.revisions()
        reasons = {name: TOLD.get(case.field, set()) | told.get(name, set()) for name, (_, case) in now.items()}
        problems += board.apply_all({name: case.put_into(turn.base) for name, (turn, case) in now.items()}, reasons)
        meant = board.revisions()
        problems += board.apply_all({name: turn.base for name, (turn, _) in now.items()}, told)
        with contextlib.suppress(WaitTimeout):
            are_back = partial(is_as_before, board, children, now)
            operator.server.wait_for(are_back, "the children as before", 20.0)
        problems += differences(board.look(), children, now)
        after_pods = board.pods()
        same = [name for name in now if meant[name] == revisions[name] and not reasons[name]]
        problems += [f"{now[name][1]}: other pods" for name in same if after_pods[name] != pods[name]]
        problems += [f"{now[name][1]}: {r}" for name, r in board.revisions().items() if r != revisions[name]]
        num_done += 2 * len(now)
    assert problems == []
    assert board.versions("bystander") == versions
    print(f"{num_done} transitions of {len(accepted)} accepted values, {len(refused)} refused ones")
    assert num_done + len(refused) >= 300


def is_as_before(board: Board, children: dict[str, Json], now: dict[str, tuple[Turn, Case]]) -> bool:
    return not differences(board.look(), children, now)


def differences(after: dict[str, Json], before: dict[str, Json], now: dict[str, tuple[Turn, Case]]) -> list[str]:
    """The children that are not as they were."""
    return [
        f"{case}: {key}: {after.get(name, {}).get(key)} was {before[name].get(key)}"
        for name, (_, case) in now.items()
        for key in {**after.get(name, {}), **before[name]}
        if after.get(name, {}).get(key) != before[name].get(key)
    ]
