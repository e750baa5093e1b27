"""TokaDeploymentSpec: what the user asks for, typed and complete.

Owns: every default (the CRD repeats them, a test compares) and the check of what a body may hold. Pure. The CRD refuses
bad objects at `kubectl apply`; `parse` checks again, because an object may have been stored under an older CRD, and
reports every bad field at once instead of raising.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from toka_operator.autoscaling import AUTOSCALING_DEFAULTS, Autoscaling, parse_autoscaling
from toka_operator.caches import Cache, parse_cache
from toka_operator.data import DATA_DEFAULTS, Data, parse_data
from toka_operator.errors import FieldError
from toka_operator.fields import Fields, Json
from toka_operator.fingerprint import compute_fingerprint, compute_former_revision, pick_pod_fields
from toka_operator.monitoring import MONITORING_DEFAULTS, POD_MONITOR_CHOICES
from toka_operator.network_policy import NETWORK_POLICY_DEFAULTS, NetworkPolicy, parse_network_policy
from toka_operator.rollout_fields import ROLLOUT_DEFAULTS, Rollout, parse_rollout
from toka_operator.routing import ROUTING_DEFAULTS, Routing, parse_routing

DEFAULTS: Json = {
    "model": {"dtype": "auto"},
    "engine": {
        "pullPolicy": "IfNotPresent",
        "port": 10210,
        "hydragen": True,
        "cudaGraphs": True,
        "logLevel": "INFO",
    },
    "replicas": 1,
    "resources": {"device": "gpu", "gpuResource": "nvidia.com/gpu"},
    "parallelism": {"tensor": 1, "pipeline": 1, "data": 1},
    "scheduling": {"patienceSeconds": 300},
    "cache": {"type": "Ephemeral"},
    "data": DATA_DEFAULTS,
    "auth": {},
    "startup": {"timeoutSeconds": 1800},
    "rollout": ROLLOUT_DEFAULTS,
    "disruption": {"podDisruptionBudget": "Auto"},
    "service": {"type": "ClusterIP", "port": 80},
    "networkPolicy": NETWORK_POLICY_DEFAULTS,
    "routing": ROUTING_DEFAULTS,
    "monitoring": MONITORING_DEFAULTS,
    "autoscaling": AUTOSCALING_DEFAULTS,
    "podTemplate": {},
    "suspend": False,
}

MAX_RANKS = 8
"""Model workers of one pod, at most."""

_SOURCE = re.compile(
    r"hf://(?P<hub>[A-Za-z0-9][-._A-Za-z0-9]*/[A-Za-z0-9][-._A-Za-z0-9]*)"
    r"|pvc://(?P<claim>[a-z0-9](?:[-.a-z0-9]*[a-z0-9])?)(?P<folder>(?:/[-._A-Za-z0-9]+)*)"
    r"|file://(?P<file>(?:/[-._A-Za-z0-9]+)+)"
    r"|oci://(?P<image>[A-Za-z0-9](?:[-.A-Za-z0-9]*[A-Za-z0-9])?(?::[0-9]{1,5})?"
    r"(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)+(?::[A-Za-z0-9_][-._A-Za-z0-9]{0,127})?(?:@sha256:[0-9a-f]{64})?)"
    r"(?:\?path=(?P<inside>(?:/[-._A-Za-z0-9]+)+))?"
    r"|(?P<builtin>builtin://smollm2)"
)
_SOURCES = (
    "hf://org/name, pvc://claim/path, file:///path, oci://registry/name:tag (or @digest, and ?path=/path) "
    "or builtin://smollm2"
)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A parsed model.source. `location` is a hub name, a folder inside the claim or the image ("" or "/a/b"), or an
    absolute path."""

    kind: Literal["hf", "pvc", "file", "oci", "builtin"]
    location: str
    claim: str = ""
    image: str = ""
    """The image's reference, as a pod has it."""

    @property
    def is_mounted(self) -> bool:
        """Whether the pod mounts a volume with the model."""
        return self.kind in ("pvc", "oci")

    @property
    def tail(self) -> str:
        """The last part of its name, without an image's tag and digest."""
        last = (self.image or self.claim + self.location).rstrip("/").rsplit("/", 1)[-1]
        return re.split("[:@]", last)[0] if self.image else last


@dataclass(frozen=True, slots=True)
class Model:
    source: ModelSource
    served_name: str
    revision: str | None
    aliases: tuple[str, ...]
    tokenizer: str | None
    dtype: str


@dataclass(frozen=True, slots=True)
class Engine:
    image: str | None
    pull_policy: str
    pull_secrets: tuple[str, ...]
    port: int
    max_tokens_per_forward: int | None
    max_seqs_per_forward: int | None
    target_gap_ms: int | None
    kv_cache_num_tokens: int | None
    page_size: int | None
    hydragen: bool
    cuda_graphs: bool
    log_level: str
    extra_args: tuple[str, ...]
    env: tuple[Json, ...]
    env_from: tuple[Json, ...]


@dataclass(frozen=True, slots=True)
class Resources:
    device: str
    gpu_resource: str
    cpu: str | None
    memory: str | None
    shared_memory: str


@dataclass(frozen=True, slots=True)
class Parallelism:
    """The parallelism inside each pod."""

    tensor: int
    """Model workers that hold the layers of a stage together."""
    pipeline: int
    """Stages of one replica, each with some of the layers."""
    data: int
    """Replicas of the model."""
    minimum_data: int | None
    """The number of them that must be left for the pod to go on; None: all."""
    async_tensor_threshold: int | None
    """Tokens of a step from which on workers exchange sums while products run; None: they never do."""

    @property
    def num_gpus(self) -> int:
        """GPUs of each pod that runs on GPUs."""
        return self.tensor * self.pipeline * self.data


@dataclass(frozen=True, slots=True)
class Scheduling:
    node_selector: Json
    tolerations: tuple[Json, ...]
    affinity: Json
    topology_spread: tuple[Json, ...] | None
    """None: the operator's default."""
    priority_class_name: str | None
    runtime_class_name: str | None
    patience_s: int
    """Seconds that a pod may wait for a node before that counts as a failure."""


@dataclass(frozen=True, slots=True)
class SecretKey:
    name: str
    key: str


@dataclass(frozen=True, slots=True)
class Service:
    type: str
    port: int
    annotations: Json


@dataclass(frozen=True, slots=True)
class PodAdditions:
    labels: Json
    annotations: Json
    volumes: tuple[Json, ...]
    volume_mounts: tuple[Json, ...]
    sidecars: tuple[Json, ...]
    readiness_gates: tuple[Json, ...]


@dataclass(frozen=True, slots=True)
class TokaDeploymentSpec:
    """One valid spec, with every default filled in. `revision` is the 8 hex digits that name its pods'
    revision."""

    revision: str
    former_revision: str
    """The name that versions before 0.2 gave to that revision."""
    fingerprint: str
    """The same for all specs with the same pod."""
    pod_fields: Json
    """Parts of the spec that alter the pod, as they are written."""
    model: Model
    engine: Engine
    replicas: int
    resources: Resources
    parallelism: Parallelism
    scheduling: Scheduling
    cache: Cache
    data: Data | None
    """None: the engines keep no files and batches."""
    hf_token: SecretKey | None
    api_key: SecretKey | None
    startup_timeout_s: int
    rollout: Rollout
    has_disruption_budget: bool
    service: Service
    network_policy: NetworkPolicy
    routing: Routing
    pod_monitor: str
    autoscaling: Autoscaling | None
    pod_additions: PodAdditions
    suspend: bool

    @property
    def num_wanted(self) -> int:
        """Pods that there should be: none while suspended."""
        return 0 if self.suspend else self.replicas


def parse(body: Mapping[str, Any]) -> TokaDeploymentSpec | list[FieldError]:
    """The typed spec of a TokaDeployment's body, or every field that is wrong with it."""
    raw = body.get("spec")
    root = Fields(raw if isinstance(raw, Mapping) else {}, DEFAULTS, "spec", [])
    model, engine, resources = root.child("model"), root.child("engine"), root.child("resources")
    startup, rollout = root.child("startup"), root.child("rollout")
    spec = TokaDeploymentSpec(
        revision="",
        former_revision="",
        fingerprint="",
        pod_fields=pick_pod_fields(root.raw),
        model=_parse_model(model),
        engine=_parse_engine(engine),
        replicas=root.integer("replicas", 0, 1000),
        resources=Resources(
            device=resources.choice("device", ("gpu", "cpu")),
            gpu_resource=resources.text("gpuResource"),
            cpu=resources.quantity("cpu"),
            memory=resources.quantity("memory"),
            shared_memory=resources.quantity("sharedMemory") or "8Gi",
        ),
        parallelism=_parse_parallelism(root.child("parallelism"), resources.get("device") == "gpu"),
        scheduling=_parse_scheduling(root.child("scheduling")),
        cache=parse_cache(root.child("cache")),
        data=parse_data(root),
        hf_token=_parse_secret_key(root.child("auth"), "hfTokenSecretRef", "token"),
        api_key=_parse_secret_key(root.child("auth"), "apiKeySecretRef", "key"),
        startup_timeout_s=startup.integer("timeoutSeconds", 10, 86400),
        rollout=parse_rollout(rollout),
        has_disruption_budget=root.child("disruption").choice("podDisruptionBudget", ("Auto", "Off")) == "Auto",
        service=_parse_service(root.child("service")),
        network_policy=parse_network_policy(root.child("networkPolicy")),
        routing=parse_routing(root.child("routing")),
        autoscaling=parse_autoscaling(root.child("autoscaling")),
        pod_monitor=root.child("monitoring").choice("podMonitor", POD_MONITOR_CHOICES),
        pod_additions=_parse_pod_additions(root.child("podTemplate")),
        suspend=root.boolean("suspend"),
    )
    if not root.errors and spec.rollout.progress_deadline_s <= spec.startup_timeout_s:
        rollout.refuse("progressDeadlineSeconds", "must be greater than startup.timeoutSeconds")
    if root.errors:
        return root.errors
    fingerprint = compute_fingerprint(root.raw, DEFAULTS)
    former = compute_former_revision(root.raw, DEFAULTS)
    return replace(spec, revision=fingerprint[:8], former_revision=former, fingerprint=fingerprint)


def parse_source(source: str) -> ModelSource | None:
    """The parts of a model.source, or None if it is none."""
    match = _SOURCE.fullmatch(source)
    if match is None or ".." in source.split("/"):
        return None
    if match["hub"]:
        return ModelSource("hf", match["hub"])
    if match["claim"]:
        return ModelSource("pvc", match["folder"], match["claim"])
    if match["file"]:
        return ModelSource("file", match["file"])
    if match["image"]:
        return ModelSource("oci", match["inside"] or "", image=match["image"])
    return ModelSource("builtin", source)


def _parse_model(fields: Fields) -> Model:
    text = fields.text("source")
    source = parse_source(text)
    if source is None:
        fields.refuse("source", f"must be {_SOURCES}")
        source = ModelSource("builtin", "builtin://smollm2")
    revision = fields.optional_text("revision")
    if revision is not None and source.kind != "hf":
        fields.refuse("revision", "is only for hf:// sources")
    return Model(
        source=source,
        served_name=fields.optional_text("servedName") or source.tail,
        revision=revision,
        aliases=fields.items("aliases", str),
        tokenizer=fields.optional_text("tokenizer"),
        dtype=fields.choice("dtype", ("auto", "bfloat16", "float32")),
    )


def _parse_engine(fields: Fields) -> Engine:
    secrets = fields.items("pullSecrets", dict)
    return Engine(
        image=fields.optional_text("image"),
        pull_policy=fields.choice("pullPolicy", ("Always", "IfNotPresent", "Never")),
        pull_secrets=tuple(str(s.get("name", "")) for s in secrets),
        port=fields.integer("port", 1024, 65535),
        max_tokens_per_forward=fields.optional_integer("maxTokensPerForward", 1, 1048576),
        max_seqs_per_forward=fields.optional_integer("maxSeqsPerForward", 1, 65536),
        target_gap_ms=fields.optional_integer("targetGapMs", 0, 60000),
        kv_cache_num_tokens=fields.optional_integer("kvCacheNumTokens", 16, 1000000000),
        page_size=fields.optional_integer("pageSize", 1, 1024),
        hydragen=fields.boolean("hydragen"),
        cuda_graphs=fields.boolean("cudaGraphs"),
        log_level=fields.choice("logLevel", ("DEBUG", "INFO", "WARNING", "ERROR")),
        extra_args=fields.items("extraArgs", str),
        env=fields.items("env", dict),
        env_from=fields.items("envFrom", dict),
    )


def _parse_parallelism(fields: Fields, is_gpu: bool) -> Parallelism:
    tensor, pipeline, data = (fields.integer(name, 1, 8) for name in ("tensor", "pipeline", "data"))
    minimum = fields.optional_integer("minimumData", 1, 8)
    threshold = fields.optional_integer("asyncTensorThreshold", 1, 1048576)
    if threshold is not None and (tensor == 1 or not is_gpu):
        fields.refuse("asyncTensorThreshold", "is only for a tensor of more than 1 on device gpu")
    parallelism = Parallelism(tensor, pipeline, data, minimum, threshold)
    if parallelism.num_gpus > MAX_RANKS:
        fields.refuse("tensor", f"times pipeline times data may not be more than {MAX_RANKS}")
    if parallelism.minimum_data is not None and parallelism.minimum_data > parallelism.data:
        fields.refuse("minimumData", "may not be more than data")
    return parallelism


def _parse_scheduling(fields: Fields) -> Scheduling:
    spread = fields.items("topologySpread", dict)
    return Scheduling(
        node_selector=fields.mapping("nodeSelector"),
        tolerations=fields.items("tolerations", dict),
        affinity=fields.mapping("affinity"),
        topology_spread=None if fields.get("topologySpread") is None else spread,
        priority_class_name=fields.optional_text("priorityClassName"),
        runtime_class_name=fields.optional_text("runtimeClassName"),
        patience_s=fields.integer("patienceSeconds", 0, 604800),
    )


def _parse_secret_key(fields: Fields, name: str, default_key: str) -> SecretKey | None:
    if fields.get(name) is None:
        return None
    reference = Fields(fields.mapping(name), {"key": default_key}, f"{fields.path}.{name}", fields.errors)
    return SecretKey(reference.text("name"), reference.text("key"))


def _parse_service(fields: Fields) -> Service:
    return Service(
        type=fields.choice("type", ("ClusterIP", "NodePort", "LoadBalancer")),
        port=fields.integer("port", 1, 65535),
        annotations=fields.mapping("annotations"),
    )


def _parse_pod_additions(fields: Fields) -> PodAdditions:
    return PodAdditions(
        labels=fields.mapping("labels"),
        annotations=fields.mapping("annotations"),
        volumes=fields.items("volumes", dict),
        volume_mounts=fields.items("volumeMounts", dict),
        sidecars=fields.items("sidecars", dict),
        readiness_gates=fields.items("readinessGates", dict),
    )
