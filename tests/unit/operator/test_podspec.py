"""The engine pod that a spec becomes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from toka_operator.spec import parse

from tests.unit.operator.examples import body, child, plan_for, valid
from tests.unit.operator.test_spec import JSON


def pod_of(**spec: Any) -> dict[str, Any]:
    template = child(plan_for(valid(**spec)), "StatefulSet")["spec"]["template"]
    pod: dict[str, Any] = template["spec"]
    return pod


def engine_of(**spec: Any) -> dict[str, Any]:
    engine: dict[str, Any] = pod_of(**spec)["containers"][0]
    return engine


@pytest.mark.parametrize(
    ("model", "argument"),
    [
        ({"source": "builtin://smollm2"}, "model=builtin://smollm2"),
        ({"source": "hf://org/name"}, "model=org/name"),
        ({"source": "file:///opt/m"}, "model=/opt/m"),
        ({"source": "pvc://claim/a/b"}, "model=/mnt/model/a/b"),
        ({"source": "oci://host/tiny:v1"}, "model=/mnt/model"),
        ({"source": "oci://host/tiny:v1"}, "served_model_name=tiny"),
        ({"source": "oci://host/tiny:v1?path=/a/b"}, "model=/mnt/model/a/b"),
        ({"source": "hf://org/name", "revision": "v1"}, "revision=v1"),
        ({"source": "hf://org/name", "aliases": ["a", "b"]}, "model_aliases=a,b"),
        ({"source": "hf://org/name"}, "served_model_name=name"),
        ({"source": "hf://org/name", "servedName": "x"}, "served_model_name=x"),
        ({"source": "hf://org/name", "tokenizer": "org/t"}, "tokenizer=org/t"),
        ({"source": "hf://org/name", "dtype": "float32"}, "dtype=float32"),
    ],
)
def test_the_model_becomes_arguments(model: dict[str, Any], argument: str) -> None:
    assert argument in engine_of(model=model)["args"]


@pytest.mark.parametrize(
    ("engine", "argument"),
    [
        ({"port": 9000}, "port=9000"),
        ({"maxTokensPerForward": 64}, "max_tokens_per_forward=64"),
        ({"maxSeqsPerForward": 8}, "max_seqs_per_forward=8"),
        ({"targetGapMs": 20}, "target_gap_ms=20"),
        ({"targetGapMs": 0}, "target_gap_ms=0"),
        ({"kvCacheNumTokens": 1024}, "kv_cache_num_tokens=1024"),
        ({"pageSize": 32}, "page_size=32"),
        ({"hydragen": False}, "use_hydragen=F"),
        ({"cudaGraphs": False}, "use_cudagraphs=F"),
        ({"logLevel": "DEBUG"}, "log_level=DEBUG"),
        ({"extraArgs": ["seed=1"]}, "seed=1"),
    ],
)
def test_each_engine_field_becomes_an_argument(engine: dict[str, Any], argument: str) -> None:
    assert argument in engine_of(engine=engine)["args"]


def test_a_pvc_model_is_mounted_read_only() -> None:
    pod = pod_of(model={"source": "pvc://claim/a"})
    assert {"name": "model", "persistentVolumeClaim": {"claimName": "claim", "readOnly": True}} in pod["volumes"]
    mount = {"name": "model", "mountPath": "/mnt/model", "readOnly": True}
    assert mount in pod["containers"][0]["volumeMounts"]


def test_an_image_with_the_model_is_mounted_whole_and_read_only_and_pulled_as_the_engines() -> None:
    engine = {"pullPolicy": "Never", "pullSecrets": [{"name": "registry"}]}
    pod = pod_of(model={"source": "oci://host:5000/org/tiny:v1?path=/models"}, engine=engine)
    (volume,) = (v for v in pod["volumes"] if v["name"] == "model")
    assert volume == {"name": "model", "image": {"reference": "host:5000/org/tiny:v1", "pullPolicy": "Never"}}
    mount = {"name": "model", "mountPath": "/mnt/model", "readOnly": True}
    assert mount in pod["containers"][0]["volumeMounts"]
    assert pod["imagePullSecrets"] == [{"name": "registry"}]


def test_a_gpu_pod_takes_one_gpu_and_shared_memory() -> None:
    pod = pod_of(resources={"gpuResource": "amd.com/gpu", "cpu": "4", "memory": "8Gi", "sharedMemory": "2Gi"})
    resources = pod["containers"][0]["resources"]
    assert resources["limits"] == {"memory": "8Gi", "amd.com/gpu": "1"}
    assert resources["requests"] == {"cpu": "4", "memory": "8Gi", "amd.com/gpu": "1"}
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}} in pod["volumes"]
    assert "device=cuda" in pod["containers"][0]["args"]


def test_a_pod_takes_a_gpu_for_each_replica_of_the_model() -> None:
    container = engine_of(parallelism={"data": 4, "minimumData": 3})
    assert container["resources"] == {"limits": {"nvidia.com/gpu": "4"}, "requests": {"nvidia.com/gpu": "4"}}
    assert {"dp_size=4", "dp_min_size=3"} <= set(container["args"])
    assert not [argument for argument in engine_of()["args"] if argument.startswith(("dp_", "pp_", "tp_"))]


def test_a_pod_takes_a_gpu_for_each_model_worker() -> None:
    container = engine_of(parallelism={"tensor": 2, "data": 3})
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "6"}
    assert {"tp_size=2", "dp_size=3"} <= set(container["args"])
    container = engine_of(parallelism={"tensor": 2, "asyncTensorThreshold": 4096})
    assert {"tp_size=2", "async_tp_threshold=4096"} <= set(container["args"])
    assert not [argument for argument in engine_of(parallelism={"tensor": 2})["args"] if "async" in argument]
    container = engine_of(parallelism={"tensor": 2, "pipeline": 2, "data": 2})
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert {"tp_size=2", "pp_size=2", "dp_size=2"} <= set(container["args"])


def test_model_workers_on_cpus_take_no_gpus() -> None:
    container = engine_of(parallelism={"tensor": 2}, resources={"device": "cpu", "cpu": "2"})
    assert container["resources"] == {"requests": {"cpu": "2"}, "limits": {"cpu": "2"}}
    assert {"tp_size=2", "device=cpu"} <= set(container["args"])


def test_a_cpu_pod_takes_no_gpu_and_is_limited_to_its_cpus() -> None:
    pod = pod_of(resources={"device": "cpu", "cpu": "2"})
    assert pod["containers"][0]["resources"] == {"requests": {"cpu": "2"}, "limits": {"cpu": "2"}}
    assert "device=cpu" in pod["containers"][0]["args"]
    assert "shm" not in [v["name"] for v in pod["volumes"]]


def test_the_hub_token_becomes_an_environment_variable_by_reference() -> None:
    env = {e["name"]: e for e in engine_of(auth={"hfTokenSecretRef": {"name": "hf"}})["env"]}
    assert env["HF_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": "hf", "key": "token"}}
    assert env["TOKA_CACHE_DIR"]["value"] == "/cache"


def test_api_keys_are_a_file_that_follows_its_secret() -> None:
    """Neither a variable nor a `subPath`: the kubelet renews neither of them in a pod that runs."""
    pod = pod_of(auth={"apiKeySecretRef": {"name": "api", "key": "k"}})
    (volume,) = (v for v in pod["volumes"] if v["name"] == "api-keys")
    assert volume["secret"] == {"secretName": "api", "items": [{"key": "k", "path": "keys"}], "defaultMode": 0o440}
    engine = pod["containers"][0]
    assert {"name": "api-keys", "mountPath": "/etc/toka/api-keys", "readOnly": True} in engine["volumeMounts"]
    assert "api_keys_file=/etc/toka/api-keys/keys" in engine["args"]
    assert "TOKA_API_KEY" not in [variable["name"] for variable in engine["env"]]
    plain = pod_of()
    assert "api-keys" not in [volume["name"] for volume in plain["volumes"]]
    assert not [argument for argument in plain["containers"][0]["args"] if argument.startswith("api_keys_file")]


def test_an_existing_claim_is_the_cache() -> None:
    pod = pod_of(cache={"type": "ExistingPVC", "claimName": "models"})
    assert {"name": "cache", "persistentVolumeClaim": {"claimName": "models"}} in pod["volumes"]
    assert {"name": "cache", "emptyDir": {"sizeLimit": "1Gi"}} in pod_of(cache={"size": "1Gi"})["volumes"]


def test_the_grace_period_covers_the_drain() -> None:
    pod = pod_of(rollout={"drainTimeoutSeconds": 300})
    assert pod["terminationGracePeriodSeconds"] > 300 + 5
    assert "drain_timeout_s=300" in pod["containers"][0]["args"]


def test_the_startup_probe_waits_as_long_as_asked() -> None:
    probe = engine_of(startup={"timeoutSeconds": 601})["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 601


def test_the_pod_is_restricted_and_so_is_a_sidecar() -> None:
    pod = pod_of(podTemplate={"sidecars": [{"name": "log", "image": "log:1"}]})
    assert pod["automountServiceAccountToken"] is False
    for container in pod["containers"]:
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True


def preferred(pod: dict[str, Any]) -> list[dict[str, Any]]:
    """The terms of a pod's soft anti-affinity."""
    found: list[dict[str, Any]] = pod["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    return found


def test_pods_spread_softly_over_hosts_and_zones_unless_told_otherwise() -> None:
    pod = pod_of()
    (by_host,) = pod["topologySpreadConstraints"]
    assert (by_host["topologyKey"], by_host["whenUnsatisfiable"]) == ("kubernetes.io/hostname", "ScheduleAnyway")
    (by_zone,) = preferred(pod)
    assert by_zone["podAffinityTerm"]["topologyKey"] == "topology.kubernetes.io/zone"
    assert by_zone["podAffinityTerm"]["labelSelector"] == by_host["labelSelector"]
    assert not {"topologySpreadConstraints", "affinity"} & pod_of(scheduling={"topologySpread": []}).keys()


def test_the_preference_for_other_zones_joins_the_users_affinity() -> None:
    theirs = {"weight": 1, "podAffinityTerm": {"topologyKey": "rack"}}
    apart = {"preferredDuringSchedulingIgnoredDuringExecution": [theirs]}
    pod = pod_of(scheduling={"affinity": {"nodeAffinity": {"a": "b"}, "podAntiAffinity": apart}})
    assert pod["affinity"]["nodeAffinity"] == {"a": "b"}
    assert preferred(pod)[0] == theirs
    assert len(preferred(pod)) == 2


@pytest.mark.parametrize(
    "affinity",
    [{"podAntiAffinity": "x"}, {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": "x"}}],
)
def test_an_affinity_of_the_wrong_shape_is_left_for_the_api_server_to_refuse(affinity: dict[str, Any]) -> None:
    assert pod_of(scheduling={"affinity": affinity})["affinity"] == affinity


def test_scheduling_and_additions_reach_the_pod() -> None:
    pod = pod_of(
        scheduling={"nodeSelector": {"a": "b"}, "priorityClassName": "p", "runtimeClassName": "r",
                    "tolerations": [{"key": "k"}], "affinity": {"nodeAffinity": {}}},
        engine={"pullSecrets": [{"name": "s"}], "pullPolicy": "Always",
                "envFrom": [{"secretRef": {"name": "e"}}]},
        podTemplate={"volumes": [{"name": "d"}], "volumeMounts": [{"name": "d", "mountPath": "/d"}],
                     "readinessGates": [{"conditionType": "example.com/balanced"}]},
    )  # fmt: skip
    assert (pod["nodeSelector"], pod["priorityClassName"], pod["runtimeClassName"]) == ({"a": "b"}, "p", "r")
    assert (pod["tolerations"][0], pod["affinity"]["nodeAffinity"]) == ({"key": "k"}, {})
    assert pod["imagePullSecrets"] == [{"name": "s"}]
    assert pod["readinessGates"] == [{"conditionType": "example.com/balanced"}]
    assert pod["containers"][0]["imagePullPolicy"] == "Always"
    assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "e"}}]
    assert {"name": "d", "mountPath": "/d"} in pod["containers"][0]["volumeMounts"]


def test_user_labels_never_override_the_operators() -> None:
    spec = valid(podTemplate={"labels": {"team": "x", "app.kubernetes.io/instance": "other"}})
    labels = child(plan_for(spec), "StatefulSet")["spec"]["template"]["metadata"]["labels"]
    assert (labels["team"], labels["app.kubernetes.io/instance"]) == ("x", "chat")


@pytest.mark.parametrize("field", ["sidecars", "volumes"])
@given(value=JSON)
def test_no_shape_of_an_addition_makes_the_plan_fail(field: str, value: Any) -> None:
    """The CRD takes unknown fields there, so the API server is the one who refuses."""
    addition = {"name": "x", "image": "x", "securityContext": value, "emptyDir": value, "env": value}
    spec = parse(body(podTemplate={field: [addition]}, scheduling={"affinity": {"podAntiAffinity": value}}))
    if not isinstance(spec, list):
        plan_for(spec)


LOST = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")


def test_a_pod_leaves_a_lost_node_after_half_a_minute_unless_the_user_says_otherwise() -> None:
    waits = {t["key"]: t["tolerationSeconds"] for t in pod_of()["tolerations"]}
    assert waits == dict.fromkeys(LOST, 30)
    theirs = {"key": LOST[1], "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 600}
    waits = {t["key"]: t["tolerationSeconds"] for t in pod_of(scheduling={"tolerations": [theirs]})["tolerations"]}
    assert waits == {LOST[0]: 30, LOST[1]: 600}
    everything = {"operator": "Exists"}
    assert pod_of(scheduling={"tolerations": [everything]})["tolerations"] == [everything]


def test_the_last_words_of_a_sidecar_are_kept_unless_it_says_where_they_are() -> None:
    policy = "terminationMessagePolicy"
    sidecars = [{"name": "a", "image": "x"}, {"name": "b", "image": "x", policy: "File"}]
    _, plain, own = pod_of(podTemplate={"sidecars": sidecars})["containers"]
    assert (plain[policy], own[policy]) == ("FallbackToLogsOnError", "File")
