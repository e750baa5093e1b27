"""spec.data: the claim in which engines keep files and batches, and its part in a pod.

Owns: the claim's name, where a pod mounts it, the folder of each ordinal in it, and how the pods that share a claim of
one node find that node. Pure. There is one claim for each TokaDeployment, with a folder for each ordinal: a StatefulSet
names the claims of its own after itself, and so after a revision, with whose end the batches would be lost.
"""

from __future__ import annotations

from dataclasses import dataclass

from toka_operator.fields import Fields, Json
from toka_operator.settings import GROUP

DATA_DEFAULTS: Json = {"accessMode": "ReadWriteOnce", "retention": "Retain"}
DATA_PATH = "/var/lib/toka"
DATA_LABEL = f"{GROUP}/data"
"""On pods: the claim that they mount."""
ORDINAL_VARIABLE, PEERS_VARIABLE = "TOKA_ORDINAL", "TOKA_PEERS"
_VOLUME = "toka-data"
_ORDINAL_FIELD = "metadata.labels['apps.kubernetes.io/pod-index']"
"""The label that the StatefulSet controller gives each pod."""


@dataclass(frozen=True, slots=True)
class Data:
    """The claim that a spec asks for."""

    size: str
    storage_class: str | None
    """None: the cluster's default class."""
    access_mode: str
    retention: str
    """Whether the claim goes (Delete) or stays (Retain) when the TokaDeployment is deleted."""


def parse_data(root: Fields) -> Data | None:
    """The claim of the whole spec `root`; None if it asks for none."""
    if root.raw.get("data") is None:
        return None
    fields = root.child("data")
    if fields.get("size") is None:
        fields.refuse("size", "is needed")
    arguments = root.child("engine").items("extraArgs", str)
    if any(argument.startswith("data_dir=") for argument in arguments):
        fields.refuse("size", "excludes engine.extraArgs data_dir=: both say where files and batches are kept")
    return Data(
        size=fields.quantity("size") or "",
        storage_class=fields.optional_text("storageClassName"),
        access_mode=fields.choice("accessMode", ("ReadWriteOnce", "ReadWriteMany")),
        retention=fields.choice("retention", ("Retain", "Delete")),
    )


def claim_name(name: str) -> str:
    """The name of the claim of the TokaDeployment `name`."""
    return f"{name}-data"


def peers_name(name: str) -> str:
    """The name of the headless Service that tells an engine the addresses of all."""
    return f"{name}-peers"


def render_data_argument() -> str:
    """The folder of the pod's ordinal; the kubelet fills in the variable."""
    return f"{DATA_PATH}/$({ORDINAL_VARIABLE})"


def render_data_environment(name: str) -> list[Json]:
    ordinal = {"name": ORDINAL_VARIABLE, "valueFrom": {"fieldRef": {"fieldPath": _ORDINAL_FIELD}}}
    return [ordinal, {"name": PEERS_VARIABLE, "value": peers_name(name)}]


def render_data_volume(name: str) -> Json:
    return {"name": _VOLUME, "persistentVolumeClaim": {"claimName": claim_name(name)}}


def render_data_mount() -> Json:
    return {"name": _VOLUME, "mountPath": DATA_PATH}


def data_labels(name: str) -> dict[str, str]:
    return {DATA_LABEL: claim_name(name)}


def keep_on_one_node(affinity: Json, labels: dict[str, str]) -> Json:
    """The affinity, with the demand that a pod runs on the node of those with these labels: they mount its claim.

    A ReadWriteOnce volume is attached to one node: anywhere else a successor would wait without end for a predecessor
    that waits for it. What the user wrote in another shape than Kubernetes' is handed on: the API server names what is
    wrong with it.
    """
    together, required = affinity.get("podAffinity") or {}, "requiredDuringSchedulingIgnoredDuringExecution"
    if not isinstance(together, dict) or not isinstance(together.get(required) or [], list):
        return affinity
    term = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": labels}}
    return {**affinity, "podAffinity": {**together, required: [*(together.get(required) or []), term]}}
