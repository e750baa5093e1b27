"""`kubectl apply` refuses these, each with a sentence that says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.harness.api_only import ApiServer
from tests.cluster.harness.errors import CommandFailed
from tests.cluster.operating import deployment
from tests.engine_process import ROOT

REFUSED: list[tuple[str, str, dict[str, Any]]] = [
    ("Required value", "chat", {"model": {}}),
    ("model.source must be hf://", "chat", {"model": {"source": "smollm2"}}),
    ("may not contain '..'", "chat", {"model": {"source": "pvc://claim/../x"}}),
    ("model.source must be hf://", "chat", {"model": {"source": "oci://host/name@sha256:12"}}),
    ("may not contain '..'", "chat", {"model": {"source": "oci://host/name?path=/a/.."}}),
    ("model.revision is only for hf://", "chat", {"model": {"source": "oci://host/name:v1", "revision": "main"}}),
    ("model.revision is only for hf://", "chat",
     {"model": {"source": "builtin://smollm2", "revision": "main"}}),
    ("metadata.name must be at most 43", "x" * 44, {}),
    ("metadata.name must be at most 43", "1chat", {}),
    ("metadata.name must be at most 43", "a.b", {}),
    ("may not both be 0", "chat", {"rollout": {"maxSurge": 0, "maxUnavailable": 0}}),
    ("maxSurge is only for strategy Surge", "chat", {"rollout": {"strategy": "InPlace", "maxSurge": 2}}),
    ("maxUnavailable is not for strategy Recreate", "chat",
     {"rollout": {"strategy": "Recreate", "maxUnavailable": 1}}),
    ("surgeFallbackSeconds is only for strategy Surge", "chat",
     {"rollout": {"strategy": "Recreate", "surgeFallbackSeconds": 9}}),
    ("surgeFallbackSeconds is only for strategy Surge", "chat",
     {"rollout": {"maxSurge": 0, "maxUnavailable": 1, "surgeFallbackSeconds": 9}}),
    ("rollout.canary is only for strategy Surge", "chat",
     {"rollout": {"strategy": "InPlace", "canary": {"seconds": 9}}}),
    ("rollout.canary is only for strategy Surge", "chat",
     {"rollout": {"maxSurge": 0, "maxUnavailable": 1, "canary": {"seconds": 9}}}),
    ("rollout.canary excludes rollout.surgeFallbackSeconds", "chat",
     {"rollout": {"surgeFallbackSeconds": 9, "canary": {"seconds": 9}}}),
    ("must be greater than rollout.canary.seconds", "chat", {"rollout": {"canary": {"seconds": 3600}}}),
    ("should be greater than or equal to 0", "chat", {"rollout": {"canary": {"seconds": -1}}}),
    ("must be greater than startup.timeoutSeconds", "chat", {"startup": {"timeoutSeconds": 4000}}),
    ("cache.claimName is needed for type ExistingPVC", "chat", {"cache": {"type": "ExistingPVC"}}),
    ("cache.claimName is needed for type ExistingPVC", "chat", {"cache": {"claimName": "c"}}),
    ("cache.size is needed for type SharedPVC", "chat", {"cache": {"type": "SharedPVC"}}),
    ("are only for type SharedPVC", "chat", {"cache": {"type": "Ephemeral", "retention": "Delete"}}),
    ("cache.size is only for types Ephemeral and SharedPVC", "chat",
     {"cache": {"type": "ExistingPVC", "claimName": "c", "size": "1Gi"}}),
    ("resources.sharedMemory is only for device gpu", "chat",
     {"resources": {"device": "cpu", "sharedMemory": "1Gi"}}),
    ("parallelism.minimumData may not be more than parallelism.data", "chat",
     {"parallelism": {"data": 2, "minimumData": 3}}),
    ("parallelism.minimumData may not be more than parallelism.data", "chat", {"parallelism": {"minimumData": 2}}),
    ("parallelism.asyncTensorThreshold is only for a parallelism.tensor of more than 1", "chat",
     {"parallelism": {"asyncTensorThreshold": 4096}}),
    ("parallelism.asyncTensorThreshold is only for device gpu", "chat",
     {"parallelism": {"tensor": 2, "asyncTensorThreshold": 4096}, "resources": {"device": "cpu"}}),
    ("may not set a key that belongs to a field", "chat", {"engine": {"extraArgs": ["async_tp_threshold=2"]}}),
    ("should be less than or equal to 8", "chat", {"parallelism": {"data": 9}}),
    ("parallelism.tensor times pipeline times data may not be more than 8", "chat",
     {"parallelism": {"tensor": 4, "data": 3}}),
    ("parallelism.tensor times pipeline times data may not be more than 8", "chat",
     {"parallelism": {"tensor": 2, "pipeline": 5}}),
    ("may not set a key that belongs to a field", "chat", {"engine": {"extraArgs": ["pp_size=2"]}}),
    ("may not set a key that belongs to a field", "chat", {"engine": {"extraArgs": ["port=1"]}}),
    ("may not set a key that belongs to a field", "chat", {"engine": {"extraArgs": ["dp_size=2"]}}),
    ("may not set a key that belongs to a field", "chat", {"engine": {"extraArgs": ["tp_size=2"]}}),
    ("may not set a key that belongs to a field", "chat", {"engine": {"extraArgs": ["api_keys_file=/x"]}}),
    ("are key=value, without spaces", "chat", {"engine": {"extraArgs": ["seed"]}}),
    ("may not set HF_TOKEN", "chat", {"engine": {"env": [{"name": "HF_TOKEN", "value": "x"}]}}),
    ("a value or a valueFrom, not both", "chat",
     {"engine": {"env": [{"name": "A", "value": "x",
                          "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}]}}),
    ("should match", "chat",
     {"engine": {"env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "spec.containers"}}}]}}),
    ("exactly one of secretKeyRef", "chat", {"engine": {"env": [{"name": "A", "valueFrom": {}}]}}),
    ("exactly one of secretRef and configMapRef", "chat", {"engine": {"envFrom": [{"prefix": "x"}]}}),
    ("may not use the prefixes", "chat", {"podTemplate": {"labels": {"toka.dev/revision": "x"}}}),
    ("may not be named 'engine'", "chat", {"podTemplate": {"sidecars": [{"name": "engine", "image": "x"}]}}),
    ("may not be named cache", "chat", {"podTemplate": {"volumes": [{"name": "cache", "emptyDir": {}}]}}),
    ("may not be named cache", "chat", {"podTemplate": {"volumes": [{"name": "api-keys", "emptyDir": {}}]}}),
    ("may not use the prefix toka.dev/", "chat", {"service": {"annotations": {"toka.dev/x": "y"}}}),
    ("Unsupported value", "chat", {"resources": {"device": "tpu"}}),
    ("should be less than or equal to 1000", "chat", {"replicas": 1001}),
    ("should be greater than or equal to 0", "chat", {"replicas": -1}),
    ("unknown field", "chat", {"canary": {"enabled": True}}),
    ("hostnames are only for an HTTPRoute", "chat", {"routing": {"httpRoute": {"hostnames": ["a"]}}}),
    ("are needed while autoscaling is enabled", "chat", {"autoscaling": {"enabled": True, "maxReplicas": 2}}),
    ("are needed while autoscaling is enabled", "chat", {"autoscaling": {"enabled": True, "target": 2}}),
    ("minReplicas may not be more than autoscaling.maxReplicas", "chat",
     {"autoscaling": {"minReplicas": 3, "maxReplicas": 2}}),
    ("is a percentage, at most 100", "chat", {"autoscaling": {"metric": "KVCacheUtilization", "target": 101}}),
    ("should be greater than or equal to 1", "chat", {"autoscaling": {"minReplicas": 0}}),
    ("should match", "chat", {"resources": {"memory": "lots"}}),
    ("must be at least 64Mi", "chat", {"resources": {"memory": 2}}),
    ("must be at least 64Mi", "chat", {"resources": {"memory": "1Mi"}}),
    ("must be at least 64Mi", "chat", {"resources": {"memory": -1}}),
    ("Required value", "chat", {"data": {}}),
    ("data.size must be at least 512Mi", "chat", {"data": {"size": 1}}),
    ("Unsupported value", "chat", {"data": {"size": "1Gi", "accessMode": "ReadWriteOncePod"}}),
    ("Unsupported value", "chat", {"data": {"size": "1Gi", "retention": "Keep"}}),
    ("data excludes engine.extraArgs data_dir=", "chat",
     {"data": {"size": "1Gi"}, "engine": {"extraArgs": ["data_dir=/x"]}}),
    ("may not set HF_TOKEN", "chat", {"engine": {"env": [{"name": "TOKA_ORDINAL", "value": "0"}]}}),
    ("networkPolicy.from is only for mode Ingress", "chat", {"networkPolicy": {"from": [{"podSelector": {}}]}}),
    ("networkPolicy.from entries need an ipBlock, or", "chat", {"networkPolicy": {"mode": "Ingress", "from": [{}]}}),
    ("networkPolicy.from entries need an ipBlock, or", "chat",
     {"networkPolicy": {"mode": "Ingress", "from": [{"podSelector": {}, "ipBlock": {"cidr": "10.0.0.0/8"}}]}}),
    ("entries without a key need operator Exists", "chat", {"scheduling": {"tolerations": [{"effect": "NoSchedule"}]}}),
    ("with operator Exists have no value", "chat",
     {"scheduling": {"tolerations": [{"key": "a", "operator": "Exists", "value": "x"}]}}),
    ("tolerationSeconds is only for effect NoExecute", "chat",
     {"scheduling": {"tolerations": [{"key": "a", "tolerationSeconds": 9}]}}),
    ("should match", "chat", {"scheduling": {"tolerations": [{"key": "a b"}]}}),
    ("should match", "chat", {"podTemplate": {"labels": {"a": "b c"}}}),
    ("podTemplate.volumeMounts name a volume", "chat",
     {"podTemplate": {"volumeMounts": [{"name": "none", "mountPath": "/x"}]}}),
    ("containerPort: Required value", "chat",
     {"podTemplate": {"sidecars": [{"name": "a", "image": "b", "ports": [{"name": "x"}]}]}}),
    ("networkPolicy.from matchExpressions need values", "chat",
     {"networkPolicy": {"mode": "Ingress", "from": [
         {"podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}]}}),
    ("networkPolicy.from matchExpressions need values", "chat",
     {"networkPolicy": {"mode": "Ingress", "from": [
         {"namespaceSelector": {"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["x"]}]}}]}}),
    ("must be greater than rollout.minReadySeconds", "chat",
     {"rollout": {"progressDeadlineSeconds": 20, "minReadySeconds": 20}, "startup": {"timeoutSeconds": 10}}),
]  # fmt: skip


@pytest.mark.parametrize(("sentence", "name", "spec"), REFUSED)
def test_a_bad_object_is_refused_with_a_sentence(
    api_server: ApiServer, crd: None, sentence: str, name: str, spec: dict[str, Any]
) -> None:
    full = {"model": {"source": "builtin://smollm2"}, **spec}
    manifest = deployment(name, **full)
    with pytest.raises(CommandFailed) as refusal:
        _create(api_server, manifest)
    assert sentence in refusal.value.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_accepted_as_it_is(api_server: ApiServer, crd: None, path: Path) -> None:
    """Strictly: a field that the server does not know is an error."""
    api_server.kubectl("apply", "--dry-run=server", "--validate=strict", "--namespace", "default", "-f", str(path))


def _create(api_server: ApiServer, manifest: dict[str, Any]) -> None:
    """Creates as `kubectl apply --dry-run=server` does: every check of the API server, nothing stored."""
    api_server.kubectl("apply", "--dry-run=server", "--namespace", "default", "-f", "-", stdin=json.dumps(manifest))


def test_the_cache_type_is_immutable(api_server: ApiServer, crd: None, namespace: str) -> None:
    spec = {"model": {"source": "builtin://smollm2"}}
    api_server.apply(deployment("chat", **spec), namespace=namespace)
    changed = deployment("chat", **spec, cache={"type": "ExistingPVC", "claimName": "c"})
    with pytest.raises(CommandFailed) as refusal:
        api_server.apply(changed, namespace=namespace)
    assert "cache.type is immutable" in refusal.value.stderr


@pytest.mark.parametrize(
    ("sentence", "changed"),
    [
        ("data.size may not shrink", {"size": "1Gi", "storageClassName": "fast"}),
        ("data.size may not shrink", {"size": 1073741824, "storageClassName": "fast"}),
        ("data.storageClassName is immutable", {"size": "2Gi", "storageClassName": "slow"}),
        ("data.storageClassName is immutable", {"size": "2Gi"}),
        ("data.accessMode is immutable", {"size": "2Gi", "storageClassName": "fast", "accessMode": "ReadWriteMany"}),
    ],
)
def test_a_claims_class_and_mode_stay_and_it_only_grows(
    api_server: ApiServer, crd: None, namespace: str, sentence: str, changed: dict[str, Any]
) -> None:
    spec = {"model": {"source": "builtin://smollm2"}}
    api_server.apply(deployment("chat", **spec, data={"size": "2Gi", "storageClassName": "fast"}), namespace=namespace)
    with pytest.raises(CommandFailed) as refusal:
        api_server.apply(deployment("chat", **spec, data=changed), namespace=namespace)
    assert sentence in refusal.value.stderr
    grown = {"size": 3 * 1024**3, "storageClassName": "fast", "retention": "Delete"}
    api_server.apply(deployment("chat", **spec, data=grown), namespace=namespace)


def test_an_object_with_every_field_is_accepted(api_server: ApiServer, crd: None) -> None:
    everything = {
        "model": {"source": "hf://org/name", "revision": "main", "servedName": "m", "aliases": ["a"],
                  "tokenizer": "org/other", "dtype": "bfloat16"},
        "engine": {"image": "e:2", "pullPolicy": "Always", "pullSecrets": [{"name": "s"}], "port": 9000,
                   "maxTokensPerForward": 64, "maxSeqsPerForward": 8, "targetGapMs": 20, "kvCacheNumTokens": 1024,
                   "pageSize": 16, "hydragen": False, "cudaGraphs": False, "logLevel": "DEBUG",
                   "extraArgs": ["seed=1"],
                   "env": [{"name": "A", "value": "b"}],
                   "envFrom": [{"secretRef": {"name": "s"}}]},
        "replicas": 3,
        "resources": {"device": "gpu", "gpuResource": "amd.com/gpu", "cpu": 4, "memory": "16Gi",
                      "sharedMemory": "4Gi"},
        "parallelism": {"tensor": 2, "pipeline": 1, "data": 4, "minimumData": 3, "asyncTensorThreshold": 4096},
        "scheduling": {"nodeSelector": {"a": "b"}, "tolerations": [{"key": "k", "operator": "Exists"}],
                       "affinity": {"nodeAffinity": {}}, "topologySpread": [{"topologyKey": "zone"}],
                       "priorityClassName": "p", "runtimeClassName": "nvidia", "patienceSeconds": 600},
        "cache": {"type": "ExistingPVC", "claimName": "models"},
        "data": {"size": "10Gi", "storageClassName": "fast", "accessMode": "ReadWriteMany", "retention": "Delete"},
        "auth": {"hfTokenSecretRef": {"name": "hf"}, "apiKeySecretRef": {"name": "api", "key": "k"}},
        "startup": {"timeoutSeconds": 600},
        "rollout": {"maxSurge": 2, "maxUnavailable": 1, "minReadySeconds": 0, "progressDeadlineSeconds": 900,
                    "drainDelaySeconds": 8, "drainTimeoutSeconds": 30, "stuckSeconds": 60,
                    "paused": True, "revisionHistoryLimit": 5, "onFailure": "Rollback", "canary": {"seconds": 60}},
        "disruption": {"podDisruptionBudget": "Off"},
        "service": {"type": "LoadBalancer", "port": 8080, "annotations": {"a": "b"}},
        "networkPolicy": {"mode": "Ingress", "from": [
            {"podSelector": {"matchLabels": {"a": "b"}},
             "namespaceSelector": {"matchExpressions": [{"key": "k", "operator": "In", "values": ["v"]}]}},
            {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}]},
        "routing": {
            "inferencePool": {"endpointPickerRef": {"name": "picker", "port": 9003, "failureMode": "FailOpen"}},
            "httpRoute": {"parentRefs": [{"name": "web", "namespace": "n", "sectionName": "https", "port": 443}],
                          "hostnames": ["*.example.com"]}},
        "monitoring": {"podMonitor": "On"},
        "autoscaling": {"enabled": True, "minReplicas": 2, "maxReplicas": 8, "metric": "KVCacheUtilization",
                        "target": 80, "scaleDownStabilizationSeconds": 600},
        "podTemplate": {"labels": {"team": "x"}, "annotations": {"n": "v"},
                        "volumes": [{"name": "data", "emptyDir": {}}],
                        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
                        "readinessGates": [{"conditionType": "example.com/balanced"}],
                        "sidecars": [{"name": "log", "image": "log:1", "args": ["-v"]}]},
        "suspend": True,
    }  # fmt: skip
    _create(api_server, deployment("chat", **everything))
