"""A spec that asks too much of its pods is refused; what the CRD itself refuses is tested in the cluster tier."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toka_operator.escapes import find_escapes
from toka_operator.spec import TokaDeploymentSpec, parse

from tests.unit.operator.examples import body, child, plan_for, valid

Json = dict[str, Any]


def sidecar(**fields: Any) -> Json:
    return {"podTemplate": {"sidecars": [{"name": "x", "image": "x", **fields}]}}


def volume(**fields: Any) -> Json:
    return {"podTemplate": {"volumes": [{"name": "x", **fields}]}}


def security(**fields: Any) -> Json:
    return sidecar(securityContext=fields)


ESCAPES: dict[str, Json] = {
    "volumes[0].hostPath": volume(hostPath={"path": "/"}),
    "volumes[0].nfs": volume(nfs={"server": "x", "path": "/"}),
    "volumes[0].iscsi": volume(iscsi={}),
    "volumes[0].flexVolume": volume(flexVolume={"driver": "x"}),
    "volumes[0].gitRepo": volume(gitRepo={"repository": "x"}),
    "volumes[0].somethingNew": volume(somethingNew={}),
    "volumes[0].projected.sources[0].serviceAccountToken": volume(
        projected={"sources": [{"serviceAccountToken": {"path": "token"}}]}
    ),
    "volumes[0].projected.sources[1].podCertificate": volume(
        projected={"sources": [{"secret": {"name": "x"}}, {"podCertificate": {}}]}
    ),
    "sidecars[0].ports[0].hostPort": sidecar(ports=[{"containerPort": 1, "hostPort": 22}]),
    "sidecars[0].ports[0].hostIP": sidecar(ports=[{"containerPort": 1, "hostIP": "0.0.0.0"}]),
    "sidecars[0].volumeMounts[0].mountPropagation": sidecar(
        volumeMounts=[{"name": "x", "mountPath": "/x", "mountPropagation": "Bidirectional"}]
    ),
    "sidecars[0].livenessProbe.httpGet.host": sidecar(
        livenessProbe={"httpGet": {"host": "169.254.169.254", "port": 80}}
    ),
    "sidecars[0].lifecycle.preStop.tcpSocket.host": sidecar(
        lifecycle={"preStop": {"tcpSocket": {"host": "x", "port": 1}}}
    ),
    "sidecars[0].securityContext.privileged": security(privileged=True),
    "sidecars[0].securityContext.allowPrivilegeEscalation": security(allowPrivilegeEscalation=True),
    "sidecars[0].securityContext.runAsNonRoot": security(runAsNonRoot=False),
    "sidecars[0].securityContext.runAsUser": security(runAsUser=0),
    "sidecars[0].securityContext.capabilities.add": security(capabilities={"add": ["SYS_ADMIN"], "drop": ["ALL"]}),
    "sidecars[0].securityContext.capabilities.drop": security(capabilities={"drop": []}),
    "sidecars[0].securityContext.procMount": security(procMount="Unmasked"),
    "sidecars[0].securityContext.seccompProfile.type": security(seccompProfile={"type": "Unconfined"}),
    "sidecars[0].securityContext.appArmorProfile.type": security(appArmorProfile={"type": "Unconfined"}),
    "sidecars[0].securityContext.windowsOptions.hostProcess": security(windowsOptions={"hostProcess": True}),
    "sidecars[0].securityContext.seLinuxOptions": security(seLinuxOptions={"type": "spc_t"}),
    "annotations[container.apparmor.security.beta.kubernetes.io/engine]": {
        "podTemplate": {"annotations": {"container.apparmor.security.beta.kubernetes.io/engine": "unconfined"}}
    },
}


@pytest.mark.parametrize("path", ESCAPES)
def test_what_asks_for_too_much_is_named(path: str) -> None:
    (error,) = find_escapes(valid(**ESCAPES[path]))
    assert error.path == f"spec.podTemplate.{path}"
    assert error.message


@pytest.mark.parametrize("name", ["system-node-critical", "system-cluster-critical"])
def test_the_priorities_of_the_cluster_itself_are_refused(name: str) -> None:
    (error,) = find_escapes(valid(scheduling={"priorityClassName": name}))
    assert error.path == "spec.scheduling.priorityClassName"


@pytest.mark.parametrize(
    "spec",
    [
        volume(emptyDir={}),
        volume(secret={"secretName": "s"}),
        volume(projected={"sources": [{"configMap": {"name": "c"}}, {"downwardAPI": {}}]}),
        volume(ephemeral={"volumeClaimTemplate": {}}),
        sidecar(ports=[{"containerPort": 80}], livenessProbe={"httpGet": {"port": 80}}),
        security(runAsUser=1000, readOnlyRootFilesystem=True),
        security(capabilities={"add": ["NET_BIND_SERVICE"], "drop": ["ALL"]}),
        security(seccompProfile={"type": "RuntimeDefault"}, seLinuxOptions={"level": "s0:c1"}),
        {"scheduling": {"priorityClassName": "gpu-high"}},
    ],
)
def test_what_any_restricted_pod_may_do_is_allowed(spec: Json) -> None:
    assert find_escapes(valid(**spec)) == []


def test_the_administrator_may_allow_folders_of_the_node_and_only_those() -> None:
    assert find_escapes(valid(**volume(hostPath={"path": "/models"})), allow_host_path=True) == []
    assert find_escapes(valid(**volume(nfs={})), allow_host_path=True)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(
        ["name", "image", "securityContext", "capabilities", "add", "drop", "ports", "hostPort", "projected", "sources",
         "lifecycle", "preStop", "httpGet", "volumeMounts", "podAntiAffinity", "env", "resources", "limits", "memory"]
    ), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(
    st.lists(st.dictionaries(st.sampled_from(["name", "securityContext", "ports", "projected"]), ANY), max_size=2), ANY
)
def test_no_shape_of_volumes_sidecars_or_affinity_makes_a_pass_fail(items: list[Json], affinity: Any) -> None:
    """The API server has not looked into these; what is wrong with them is its to say."""
    template = {"sidecars": items, "volumes": items}
    parsed = parse(body(podTemplate=template, scheduling={"affinity": affinity}))
    if isinstance(parsed, TokaDeploymentSpec):
        find_escapes(parsed)
        assert child(plan_for(parsed), "StatefulSet")
