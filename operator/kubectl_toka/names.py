"""The names by which the operator marks its objects; a test compares them with the operator's own."""

from __future__ import annotations

RESOURCE = "tokadeployments.toka.dev"
REVISION_LABEL = "toka.dev/revision"
SPEC_ANNOTATION = "toka.dev/spec"
SERVED_ANNOTATION = "toka.dev/served"
RESTARTED_ANNOTATION = "toka.dev/restarted-at"
ENGINE_CONTAINER = "engine"
POD_FIELDS = ("model", "engine", "resources", "parallelism", "scheduling", "cache", "auth", "startup", "podTemplate")
POD_ROLLOUT_FIELDS = ("drainDelaySeconds", "drainTimeoutSeconds")
NOT_POD_SCHEDULING_FIELDS = ("patienceSeconds",)
SHARED_PVC = "SharedPVC"
CLAIM_FIELDS = ("size", "storageClassName", "retention")
"""Fields of `cache` that, with a claim of the operator's own, alter the claim and not the pod."""


def pod_selector(name: str) -> str:
    """The labels of the engine pods of the TokaDeployment `name`."""
    return f"app.kubernetes.io/name=toka-engine,app.kubernetes.io/instance={name},app.kubernetes.io/component=engine"


def revision_selector(name: str) -> str:
    """The labels of its ControllerRevisions."""
    return f"app.kubernetes.io/instance={name},app.kubernetes.io/component=revision"
