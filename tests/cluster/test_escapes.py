"""A user who may write TokaDeployments and nothing else gets no more than that by them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cluster.harness.api_only import ApiServer
from tests.cluster.harness.errors import CommandFailed
from tests.cluster.operating import Json, Operator, deployment

TENANT = "tenant"


def sidecar(**fields: Any) -> Json:
    return {"podTemplate": {"sidecars": [{"name": "x", "image": "x", **fields}]}}


def volume(**fields: Any) -> Json:
    return {"podTemplate": {"volumes": [{"name": "x", **fields}]}}


def security(**fields: Any) -> Json:
    return sidecar(securityContext=fields)


def token(**fields: Any) -> Json:
    return volume(projected={"sources": [{"serviceAccountToken": {"path": "token", **fields}}]})


REFUSED: list[tuple[str, Json]] = [
    ("may not use hostPath", volume(hostPath={"path": "/"})),
    ("may not use hostPath", volume(hostPath={"path": "/var/run/containerd", "type": "Directory"})),
    ("may not project serviceAccountToken", token()),
    ("may not project serviceAccountToken", token(audience="vault", expirationSeconds=600)),
    ("may not project serviceAccountToken", volume(projected={"sources": [{"podCertificate": {"signerName": "a/b"}}]})),
    ("podTemplate.volumes may only be", volume(nfs={"server": "10.0.0.1", "path": "/"})),
    ("podTemplate.volumes may only be", volume(iscsi={"targetPortal": "x", "iqn": "x", "lun": 0})),
    ("podTemplate.volumes may only be", volume(flexVolume={"driver": "x"})),
    ("podTemplate.volumes may only be", volume(gitRepo={"repository": "x"})),
    ("podTemplate.volumes may only be", volume(rbd={"monitors": ["x"], "image": "x"})),
    ("may not be privileged", security(privileged=True)),
    ("may not set allowPrivilegeEscalation", security(allowPrivilegeEscalation=True)),
    ("may not run as root", security(runAsUser=0)),
    ("may not run as root", security(runAsNonRoot=False)),
    ("may not set procMount", security(procMount="Unmasked")),
    ("may add no capability", security(capabilities={"add": ["SYS_ADMIN"], "drop": ["ALL"]})),
    ("may add no capability", security(capabilities={"add": ["ALL"], "drop": ["ALL"]})),
    ("must drop ALL capabilities", security(capabilities={"drop": []})),
    ("must drop ALL capabilities", security(capabilities={})),
    ("may only use the seccomp profiles", security(seccompProfile={"type": "Unconfined"})),
    ("may not use hostPort", sidecar(ports=[{"containerPort": 80, "hostPort": 10250}])),
    ("may not be one of Kubernetes' own", {"scheduling": {"priorityClassName": "system-node-critical"}}),
    ("may not be one of Kubernetes' own", {"scheduling": {"priorityClassName": "system-cluster-critical"}}),
    ("unknown field", {"podTemplate": {"hostNetwork": True}}),
    ("unknown field", {"podTemplate": {"hostPID": True}}),
    ("unknown field", {"podTemplate": {"hostIPC": True}}),
    ("unknown field", {"podTemplate": {"shareProcessNamespace": True}}),
    ("unknown field", {"podTemplate": {"serviceAccountName": "default"}}),
    ("unknown field", {"podTemplate": {"automountServiceAccountToken": True}}),
    ("unknown field", {"podTemplate": {"initContainers": [{"name": "x", "image": "x"}]}}),
    ("unknown field", {"podTemplate": {"securityContext": {"runAsUser": 0}}}),
    ("unknown field", {"engine": {"securityContext": {"privileged": True}}}),
    ("unknown field", {"engine": {"command": ["sh"]}}),
    ("unknown field", {"scheduling": {"nodeName": "node-1"}}),
]  # fmt: skip
"""The sentence of `kubectl apply`, and the spec that it refuses."""

UNSEEN: list[tuple[str, Json]] = [
    ("podTemplate.sidecars[0].livenessProbe.httpGet.host",
     sidecar(livenessProbe={"httpGet": {"host": "169.254.169.254", "port": 80}})),
    ("podTemplate.sidecars[0].lifecycle.postStart.tcpSocket.host",
     sidecar(lifecycle={"postStart": {"tcpSocket": {"host": "10.0.0.1", "port": 22}}})),
    ("podTemplate.sidecars[0].ports[0].hostIP", sidecar(ports=[{"containerPort": 1, "hostIP": "0.0.0.0"}])),
    ("podTemplate.sidecars[0].volumeMounts[0].mountPropagation",
     sidecar(volumeMounts=[{"name": "tmp", "mountPath": "/x", "mountPropagation": "Bidirectional"}])),
    ("podTemplate.sidecars[0].securityContext.seLinuxOptions", security(seLinuxOptions={"type": "spc_t"})),
    ("podTemplate.sidecars[0].securityContext.appArmorProfile.type",
     security(appArmorProfile={"type": "Unconfined"})),
    ("podTemplate.sidecars[0].securityContext.windowsOptions.hostProcess",
     security(windowsOptions={"hostProcess": True})),
    ("podTemplate.volumes[0].somethingNew", volume(somethingNew={"path": "/"})),
]  # fmt: skip
"""The field that the status names, and the spec, where the schema cannot see."""


@pytest.fixture(scope="module")
def tenant(api_server: ApiServer, operator_namespace: str) -> str:
    """A user who may write TokaDeployments in one namespace, which enforces no Pod Security; returns the namespace."""
    verbs = "get,list,watch,create,update,patch,delete"
    api_server.kubectl(
        "create", "role", "author", f"--verb={verbs}", "--resource=tokadeployments.toka.dev", "-n", operator_namespace
    )
    api_server.kubectl("create", "rolebinding", "author", "--role=author", f"--user={TENANT}", "-n", operator_namespace)
    return operator_namespace


@pytest.fixture(scope="module")
def operator_namespace(api_server: ApiServer, installation: object) -> str:
    return api_server.create_namespace("escapes")


def apply_as_tenant(server: ApiServer, namespace: str, name: str, spec: Json, *options: str) -> None:
    manifest = deployment(name, **{"model": {"source": "builtin://smollm2"}, **spec})
    server.kubectl("apply", f"--as={TENANT}", "-n", namespace, *options, "-f", "-", stdin=json.dumps(manifest))


@pytest.mark.parametrize(("sentence", "spec"), REFUSED)
def test_an_escape_is_refused_with_a_sentence(api_server: ApiServer, tenant: str, sentence: str, spec: Json) -> None:
    with pytest.raises(CommandFailed) as refusal:
        apply_as_tenant(api_server, tenant, "chat", spec)
    assert sentence in refusal.value.stderr


def test_an_escape_that_the_schema_cannot_see_makes_no_pod_and_is_named(operator: Operator) -> None:
    for number, (field, spec) in enumerate(UNSEEN):
        name = f"chat-{number}"
        operator.apply(name, **spec)
        invalid = operator.wait_for_condition(name, "ConfigValid", "False", "InvalidSpec")
        assert f"spec.{field}: may" in invalid["message"] or f"spec.{field}: is no type" in invalid["message"]
        assert operator.sets(name) == {}


def test_an_object_that_is_corrected_is_rolled_out(operator: Operator) -> None:
    operator.apply("chat", **UNSEEN[0][1])
    operator.wait_for_condition("chat", "Degraded", "True", "InvalidSpec")
    operator.apply("chat")
    operator.wait_until_ready("chat")
    operator.wait_for_condition("chat", "Degraded", "False")


def test_what_the_client_does_not_check_is_left_out(operator: Operator, tenant: str) -> None:
    """Without strict validation unknown fields are pruned: the pod never sees them."""
    for number, (_, spec) in enumerate(each for each in REFUSED if each[0] == "unknown field"):
        apply_as_tenant(operator.server, tenant, f"pruned-{number}", {**spec, "suspend": True}, "--validate=false")
        found = operator.server.get("td", f"pruned-{number}", tenant)
        assert found is not None
        kept = json.dumps(found["spec"])
        words = ("host", "serviceAccount", "initContainers", "securityContext", "command", "nodeName", "shareProcess")
        assert not any(word in kept for word in words)


ROLES = {
    "view": {"get": True, "create": False, "delete": False},
    "edit": {"get": True, "create": True, "delete": True},
    "admin": {"get": True, "create": True, "delete": True},
}


@pytest.mark.parametrize("role", ROLES)
def test_the_clusters_own_roles_reach_tokadeployments(api_server: ApiServer, tenant: str, role: str) -> None:
    user = f"{role}-user"
    api_server.kubectl("create", "rolebinding", user, f"--clusterrole={role}", f"--user={user}", "-n", tenant)

    def may(verb: str, subresource: str = "") -> bool:
        question = ["auth", "can-i", verb, "tokadeployments.toka.dev", f"--as={user}", "-n", tenant]
        question += [f"--subresource={subresource}"] if subresource else []
        try:
            return api_server.kubectl(*question).strip() == "yes"
        except CommandFailed:
            return False

    api_server.wait_for(lambda: may("get"), "the roles to be aggregated")
    assert {verb: may(verb) for verb in ROLES[role]} == ROLES[role]
    assert may("patch", "scale") is ROLES[role]["create"]
    assert not may("patch", "status")
