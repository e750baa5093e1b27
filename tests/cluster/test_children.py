"""A TokaDeployment's children: made, put back, never made of a user's own object, gone with it."""

from __future__ import annotations

import json
from typing import Any

from tests.cluster.operating import (
    EVERY_CHILD,
    WRITING_VERBS,
    Json,
    Operator,
    deployment,
    revision_of,
    unrelated_objects,
)

KINDS = "statefulset,service,serviceaccount,pdb,networkpolicy,hpa,controllerrevision,pod,endpointslice"


def test_an_applied_object_becomes_ready_with_its_children(operator: Operator) -> None:
    spec = {"model": {"source": "builtin://smollm2"}, "resources": {"device": "cpu"}, "rollout": {"minReadySeconds": 0}}
    operator.server.apply(deployment("chat", **spec, replicas=2), namespace=operator.namespace)
    ready = operator.wait_until_ready("chat")
    status = ready["status"]
    assert status["url"] == f"http://chat.{operator.namespace}.svc/v1"
    assert (status["model"], status["phase"], status["ready"]) == ("smollm2", "Running", "2/2")
    assert (status["replicas"], status["readyReplicas"], status["availableReplicas"]) == (2, 2, 2)
    (revision,) = operator.sets("chat")
    assert status["currentRevision"] == revision
    assert operator.require("service", "chat")["spec"]["ports"][0]["port"] == 80
    assert operator.require("serviceaccount", "chat")["automountServiceAccountToken"] is False
    assert operator.require("pdb", "chat")["spec"]["minAvailable"] == 1
    stored = operator.require("controllerrevision", f"chat-{revision}")
    assert stored["data"]["template"]["spec"]["containers"][0]["image"] == "engine:1"
    startup = status["startup"]
    assert startup["pod"] in {pod["metadata"]["name"] for pod in operator.pods("chat")}
    assert {"scheduleSeconds", "startSeconds", "loadSeconds"} < startup.keys()
    assert "finalizers" not in ready["metadata"]
    assert set(ready["metadata"]["annotations"]) == {"kubectl.kubernetes.io/last-applied-configuration"}


def test_a_new_object_costs_each_child_once_and_at_most_two_statuses_and_an_event(operator: Operator) -> None:
    operator.apply("chat", replicas=2)
    operator.wait_until_ready("chat")
    operator.wait_for(lambda: ("create", "events") in operator.requests(), "the event")
    children = ("serviceaccounts", "services", "controllerrevisions", "statefulsets", "poddisruptionbudgets")
    writes = [(verb, resource) for verb, resource in operator.requests() if verb in WRITING_VERBS]
    assert [write for write in writes if write[1] in children] == [("create", child) for child in children]
    assert writes.count(("create", "events")) == 1
    num_statuses = writes.count(("patch", "tokadeployments"))
    assert 1 <= num_statuses <= 2
    assert len(writes) == len(children) + 1 + num_statuses, writes


def test_the_table_of_kubectl_get_has_its_columns(operator: Operator) -> None:
    operator.apply("chat", replicas=2)
    operator.wait_until_ready("chat")
    head, row = operator.kubectl("get", "td", "-o", "wide").splitlines()
    columns = ["NAME", "MODEL", "READY", "UP-TO-DATE", "PHASE", "REASON", "AGE", "URL", "GPUS", "REVISION", "IMAGE"]
    assert head.split() == [*columns[:6], "DOWNLOAD", *columns[6:]]  # empty: the built-in model is not downloaded
    cells = dict(zip(columns, row.split(), strict=True))
    (revision,) = operator.sets("chat")
    expected = {"NAME": "chat", "MODEL": "smollm2", "READY": "2/2", "UP-TO-DATE": "2", "PHASE": "Running"}
    expected |= {"REASON": "Complete", "URL": f"http://chat.{operator.namespace}.svc/v1", "GPUS": "0"}
    expected |= {"REVISION": revision, "IMAGE": "engine:1"}
    assert {name: cells[name] for name in expected} == expected


def test_deleted_children_are_put_back(operator: Operator) -> None:
    operator.apply("chat", replicas=2, **EVERY_CHILD)
    operator.wait_until_ready("chat")
    (revision,) = operator.sets("chat")
    names = {
        "statefulset": f"chat-{revision}",
        "service": "chat",
        "serviceaccount": "chat",
        "pdb": "chat",
        "networkpolicy": "chat",
        "hpa": "chat",
        "controllerrevision": f"chat-{revision}",
    }
    for kind, name in names.items():
        old = operator.require(kind, name)["metadata"]["uid"]
        operator.delete_and_wait(kind, name)

        def is_back(kind: str = kind, name: str = name, old: str = old) -> bool:
            found = operator.get(kind, name)
            return found is not None and found["metadata"]["uid"] != old

        operator.wait_for(is_back, f"{kind} {name} to be put back")
    operator.wait_until_ready("chat")


def test_pods_whose_set_was_deleted_without_them_go_on(operator: Operator) -> None:
    operator.apply("chat", replicas=2)
    operator.wait_until_ready("chat")
    (name,) = (found["metadata"]["name"] for found in operator.sets("chat").values())
    old = operator.require("statefulset", name)["metadata"]["uid"]
    pods = {pod["metadata"]["uid"] for pod in operator.pods("chat")}
    operator.delete_and_wait("statefulset", name, "Orphan")

    def are_adopted() -> bool:
        owners = {pod["metadata"].get("ownerReferences", [{}])[0].get("uid") for pod in operator.pods("chat")}
        found = operator.get("statefulset", name)
        return found is not None and owners == {found["metadata"]["uid"]} != {old}

    operator.wait_for(are_adopted, "another set to take the pods over")
    operator.wait_until_ready("chat")
    assert {pod["metadata"]["uid"] for pod in operator.pods("chat")} == pods


def without_ordinals(value: Any) -> Any:
    """A StatefulSet's spec as it is whichever of its pods were kept when others were too many."""
    return {k: v for k, v in value.items() if k != "ordinals"} if isinstance(value, dict) else value


def test_edited_children_are_put_back(operator: Operator) -> None:
    operator.apply("chat", replicas=2, **EVERY_CHILD)
    operator.wait_until_ready("chat")
    (revision,) = operator.sets("chat")
    name = f"chat-{revision}"
    container = {"name": "engine", "image": "other:1", "env": [{"name": "ADDED", "value": "1"}]}
    edits = [
        ("statefulset", name, {"spec": {"replicas": 5}}),
        ("statefulset", name, {"spec": {"template": {"spec": {"containers": [container]}}}}),
        ("statefulset", name, {"metadata": {"labels": {"app.kubernetes.io/instance": "other"}}}),
        ("service", "chat", {"spec": {"selector": {"app.kubernetes.io/instance": "other"}}}),
        ("service", "chat", {"spec": {"ports": [{"port": 80, "targetPort": 1, "protocol": "TCP"}]}}),
        ("pdb", "chat", {"spec": {"minAvailable": 0}}),
        ("networkpolicy", "chat", {"spec": {"policyTypes": ["Ingress", "Egress"]}}),
        ("networkpolicy", "chat", {"spec": {"ingress": [{}]}}),
        ("hpa", "chat", {"spec": {"maxReplicas": 9}}),
        ("hpa", "chat", {"spec": {"metrics": []}}),
        ("serviceaccount", "chat", {"automountServiceAccountToken": True}),
        ("controllerrevision", name, {"metadata": {"labels": {"app.kubernetes.io/managed-by": None}}}),
    ]
    keys = ("spec", "automountServiceAccountToken")
    for kind, child, edit in edits:
        right = {k: without_ordinals(v) for k, v in operator.require(kind, child).items() if k in keys}
        labels = operator.require(kind, child)["metadata"]["labels"]
        operator.kubectl("patch", kind, child, "--type=strategic", "-p", json.dumps(edit))

        def is_right(kind: str = kind, child: str = child, right: object = right, labels: object = labels) -> bool:
            found = operator.require(kind, child)
            same = {k: without_ordinals(v) for k, v in found.items() if k in keys} == right
            return same and found["metadata"].get("labels") == labels

        operator.wait_for(is_right, f"{kind} {child} to be put back after {edit}")
    pods = {pod["spec"]["containers"][0]["image"] for pod in operator.pods("chat")}
    assert pods == {"engine:1"}


def without_status(found: Json) -> Json:
    """An object but for what its controller writes: the status, and what any write changes.

    Who applied which field is left in, so that even an apply without a difference shows.
    """
    metadata = {key: value for key, value in found["metadata"].items() if key != "resourceVersion"}
    metadata["managedFields"] = [each for each in metadata["managedFields"] if each.get("subresource") != "status"]
    return {**found, "metadata": metadata, "status": None}


def test_objects_of_a_user_under_the_names_of_children_are_never_touched(operator: Operator) -> None:
    spec = {"model": {"source": "builtin://smollm2"}, "resources": {"device": "cpu"}}
    theirs = unrelated_objects("chat", revision_of(spec))
    operator.server.apply(*theirs.values(), namespace=operator.namespace)
    before = {child: without_status(operator.require(*child)) for child in theirs}
    operator.apply("chat", replicas=2, **EVERY_CHILD)
    operator.expected.append("event=name_taken")
    taken = operator.wait_for_condition("chat", "Degraded", "True", "NameTaken")
    for (kind, name), manifest in theirs.items():  # no set is tried: its pods would run as another's account
        assert (f"{manifest['kind']} {name}" in taken["message"]) is (kind != "statefulset")
    operator.wait_for(lambda: operator.requests().count(("create", "services")) >= 2, "another try of the name")
    assert {child: without_status(operator.require(*child)) for child in theirs} == before
    for kind, name in theirs:
        operator.delete_and_wait(kind, name)
    operator.wait_until_ready("chat")
    operator.wait_for_condition("chat", "Degraded", "False")


def test_a_users_stateful_set_is_never_touched_even_with_our_labels(operator: Operator) -> None:
    operator.apply("chat", suspend=True)
    operator.wait_for_condition("chat", "Ready", "False", "Suspended")
    (revision,) = operator.sets("chat")
    name = f"chat-{revision}"
    manifest = operator.require("statefulset", name)
    operator.delete_and_wait("td", "chat")
    operator.wait_for(lambda: not operator.list(KINDS, "app.kubernetes.io/part-of=toka"), "all to be gone")
    for key in ("uid", "resourceVersion", "ownerReferences", "managedFields", "creationTimestamp"):
        manifest["metadata"].pop(key, None)
    manifest.pop("status")
    operator.server.apply(manifest, namespace=operator.namespace)
    theirs = operator.require("statefulset", name)
    operator.apply("chat")
    taken = operator.wait_for_condition("chat", "Degraded", "True", "NameTaken")
    assert f"StatefulSet {name}" in taken["message"]
    now = operator.require("statefulset", name)
    assert now["spec"] == theirs["spec"]
    assert now["metadata"]["labels"] == theirs["metadata"]["labels"]
    operator.expected.append("event=name_taken")


def test_deleting_the_object_leaves_nothing(operator: Operator) -> None:
    operator.apply("chat", replicas=2, **EVERY_CHILD)
    operator.wait_until_ready("chat")
    operator.delete_and_wait("td", "chat")
    selector = "app.kubernetes.io/part-of=toka"
    operator.wait_for(lambda: not operator.list(KINDS, selector), "every child to be gone")


def test_children_follow_each_change_of_the_spec_and_back(operator: Operator) -> None:
    operator.apply("chat")
    operator.wait_until_ready("chat")
    before = operator.require("service", "chat")
    operator.patch("chat", service={"port": 8080, "annotations": {"example.com/a": "1", "example.com/b": "2"}})

    def annotations() -> dict[str, str]:
        return dict(operator.require("service", "chat")["metadata"].get("annotations", {}))

    operator.wait_for(lambda: annotations().get("example.com/b") == "2", "annotations")
    assert operator.require("service", "chat")["spec"]["ports"][0]["port"] == 8080
    operator.patch("chat", service={"annotations": {"example.com/a": None}})
    operator.wait_for(lambda: "example.com/a" not in annotations(), "the annotation to go")
    assert annotations()["example.com/b"] == "2"
    operator.kubectl("annotate", "service", "chat", "example.com/theirs=kept")
    operator.patch("chat", service=None)
    operator.wait_for(lambda: annotations() == {"example.com/theirs": "kept"}, "only the other's annotation")
    assert operator.require("service", "chat")["spec"] == before["spec"]


def test_an_object_of_the_same_name_made_anew_gets_children_of_its_own(operator: Operator) -> None:
    operator.apply("chat")
    first = operator.wait_until_ready("chat")["metadata"]["uid"]
    operator.delete("td", "chat")
    operator.apply("chat")
    second = operator.wait_until_ready("chat")["metadata"]["uid"]
    assert first != second

    def owners() -> set[str]:
        return {s["metadata"]["ownerReferences"][0]["uid"] for s in operator.list("statefulset,service")}

    operator.wait_for(lambda: owners() == {second}, "children of the second object only")
    operator.expected.append("event=name_taken")


def test_a_child_that_the_api_server_refuses_is_named_with_its_reason(operator: Operator) -> None:
    sidecar = {"name": "Not A Name", "image": "x"}
    operator.server.apply(
        deployment("chat", model={"source": "builtin://smollm2"}, podTemplate={"sidecars": [sidecar]}),
        namespace=operator.namespace,
    )
    refused = operator.wait_for_condition("chat", "ConfigValid", "False", "ChildRejected")
    assert "StatefulSet" in refused["message"]
    assert "Not A Name" in refused["message"]
    operator.expected.append("rejected=")
