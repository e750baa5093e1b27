"""Refuses pods that would give a TokaDeployment's author more than the author has.

Owns: the rules of Pod Security's level `restricted`, for the parts of a pod that a spec may add. The CRD refuses the
same at `kubectl apply`, as far as it can see; this is the whole check, for objects that were stored under an older CRD
and for what a schema cannot express. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from toka_operator.errors import FieldError
from toka_operator.fields import Json
from toka_operator.spec import TokaDeploymentSpec

VOLUME_TYPES = (
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "image",
    "persistentVolumeClaim",
    "projected",
    "secret",
)
"""Types of volumes that reach no node and no other identity."""
PROJECTED_SOURCES = ("clusterTrustBundle", "configMap", "downwardAPI", "secret")
"""The sources of projected volumes: no token of the pod's service account, no certificate of the pod."""
CAPABILITIES = ("NET_BIND_SERVICE",)
_PROBES = ("livenessProbe", "readinessProbe", "startupProbe")
_HOOKS = ("postStart", "preStop")
_SELINUX_TYPES = ("", "container_t", "container_init_t", "container_kvm_t", "container_engine_t")
_UNCONFINED_ANNOTATION = "container.apparmor.security.beta.kubernetes.io/"


def find_escapes(spec: TokaDeploymentSpec, allow_host_path: bool = False) -> list[FieldError]:
    """Every field that asks for too much. `allow_host_path`: the cluster's administrator allows volumes of the node."""
    allowed = (*VOLUME_TYPES, "hostPath") if allow_host_path else VOLUME_TYPES
    found: list[FieldError] = []
    for number, volume in enumerate(spec.pod_additions.volumes):
        found += _check_volume(f"spec.podTemplate.volumes[{number}]", volume, allowed)
    for number, sidecar in enumerate(spec.pod_additions.sidecars):
        found += _check_container(f"spec.podTemplate.sidecars[{number}]", sidecar)
    for key in spec.pod_additions.annotations:
        if str(key).startswith(_UNCONFINED_ANNOTATION):
            found.append(FieldError(f"spec.podTemplate.annotations[{key}]", "may not choose an AppArmor profile"))
    if (spec.scheduling.priority_class_name or "").startswith("system-"):
        message = "may not be one of Kubernetes' own classes (system-...)"
        found.append(FieldError("spec.scheduling.priorityClassName", message))
    return found


def _check_volume(path: str, volume: Json, allowed: tuple[str, ...]) -> Iterator[FieldError]:
    for kind in volume:
        if kind != "name" and kind not in allowed:
            yield FieldError(f"{path}.{kind}", f"is no type of volume that may be used: {', '.join(allowed)}")
    sources = _object(volume.get("projected")).get("sources")
    for number, source in enumerate(sources if isinstance(sources, list) else []):
        for kind in _object(source):
            if kind not in PROJECTED_SOURCES:
                message = f"may not be projected: engine pods have no identity; only {', '.join(PROJECTED_SOURCES)}"
                yield FieldError(f"{path}.projected.sources[{number}].{kind}", message)


def _check_container(path: str, container: Json) -> Iterator[FieldError]:
    ports = container.get("ports")
    for number, port in enumerate(ports if isinstance(ports, list) else []):
        for name in ("hostPort", "hostIP"):
            if _object(port).get(name):
                yield FieldError(
                    f"{path}.ports[{number}].{name}", "may not be used: ports of the node are not the pod's"
                )
    mounts = container.get("volumeMounts")
    for number, mount in enumerate(mounts if isinstance(mounts, list) else []):
        if _object(mount).get("mountPropagation") not in (None, "None", "HostToContainer"):
            yield FieldError(f"{path}.volumeMounts[{number}].mountPropagation", "may not reach the node")
    hooks = {f"lifecycle.{name}": _object(container.get("lifecycle")).get(name) for name in _HOOKS}
    for where, handler in {**{name: container.get(name) for name in _PROBES}, **hooks}.items():
        for name in ("httpGet", "tcpSocket"):
            if _object(_object(handler).get(name)).get("host"):
                yield FieldError(f"{path}.{where}.{name}.host", "may not be set: the kubelet asks the pod itself")
    yield from _check_security(f"{path}.securityContext", _object(container.get("securityContext")))


def _check_security(path: str, security: Json) -> Iterator[FieldError]:
    if security.get("privileged"):
        yield FieldError(f"{path}.privileged", "may not be true")
    if security.get("allowPrivilegeEscalation"):
        yield FieldError(f"{path}.allowPrivilegeEscalation", "may not be true")
    if security.get("runAsNonRoot") is False:
        yield FieldError(f"{path}.runAsNonRoot", "may not be false")
    if security.get("runAsUser") == 0:
        yield FieldError(f"{path}.runAsUser", "may not be 0")
    capabilities = _object(security.get("capabilities"))
    if any(name not in CAPABILITIES for name in _list(capabilities.get("add"))):
        yield FieldError(f"{path}.capabilities.add", f"may only name {', '.join(CAPABILITIES)}")
    if "capabilities" in security and "ALL" not in _list(capabilities.get("drop")):
        yield FieldError(f"{path}.capabilities.drop", "must name ALL")
    if security.get("procMount") not in (None, "", "Default"):
        yield FieldError(f"{path}.procMount", "may only be Default")
    if _object(security.get("seccompProfile")).get("type") not in (None, "RuntimeDefault", "Localhost"):
        yield FieldError(f"{path}.seccompProfile.type", "may only be RuntimeDefault or Localhost")
    if _object(security.get("appArmorProfile")).get("type") not in (None, "RuntimeDefault", "Localhost"):
        yield FieldError(f"{path}.appArmorProfile.type", "may only be RuntimeDefault or Localhost")
    if _object(security.get("windowsOptions")).get("hostProcess"):
        yield FieldError(f"{path}.windowsOptions.hostProcess", "may not be true")
    selinux = _object(security.get("seLinuxOptions"))
    if selinux.get("user") or selinux.get("role") or selinux.get("type", "") not in _SELINUX_TYPES:
        yield FieldError(f"{path}.seLinuxOptions", "may only name a level, or a type of container")


def _object(value: Any) -> Json:
    """An object, or an empty one for what is of another shape: the API server refuses that itself."""
    return dict(value) if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
