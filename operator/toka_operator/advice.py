"""Says what to do about each reason that a condition gives. Pure.

Owns: one sentence a reason, put behind the words of whoever reported it. docs/operations.md has the same table, and a
test compares them.
"""

from __future__ import annotations

ADVICE: dict[str, str] = {
    "CanaryFailed": "Correct what failed, and change the pods or spec.rollout: then it is tried again",
    "ChildFailed": "Give the API server what the message says it lacks (addresses, ports); it is tried again by itself",
    "ChildRejected": "Change what the message names, or the policy that refuses it; it is tried again by itself",
    "ClaimMissing": "Create the PersistentVolumeClaim",
    "ClaimOnOneNode": "Use a storage class with ReadWriteMany, or let all pods run on one node (scheduling.affinity)",
    "ClaimPending": "See why the PersistentVolumeClaim is not bound (kubectl describe pvc)",
    "ConfigInvalid": "Correct the engine setting that the message names",
    "ConfigMapMissing": "Create the ConfigMap: nothing needs to be restarted",
    "ContainerNotStarted": "Correct what the message names in engine.image, engine.env or podTemplate",
    "CrashLoop": "Read the container's log (kubectl logs --previous)",
    "DeviceUnavailable": "Check the node's GPU, resources.device and the image",
    "EngineExited": "Check engine.image: a toka engine does not end by itself",
    "EngineProcessDied": "The pod restarts by itself; if it comes again, report the last words",
    "EngineProcessStalled": "The pod restarts by itself; if it comes again, report the last words",
    "Evicted": "A new pod is made; see why the node gave the old one up (kubectl describe node)",
    "FailedGetPodsMetric": "Let custom.metrics.k8s.io serve the metric that the message names (docs/operations.md)",
    "HubUnavailable": "Check the network and HF_ENDPOINT; the pod tries again by itself",
    "ImagePullFailed": "Check engine.image, an oci:// model.source, and engine.pullSecrets",
    "ImageVolumesUnsupported": "Turn on the feature gate ImageVolume of API server and kubelets, and let nodes have a "
    "container runtime that mounts images (containerd 2.1), or use another model.source",
    "InvalidSpec": "Correct the fields that the message names",
    "ModelAuthFailed": "Check auth.hfTokenSecretRef, and whether its account may read the model",
    "ModelInvalid": "Check the model's files: the message names the one that is wrong",
    "ModelNotFound": "Check model.source and model.revision",
    "NameTaken": "Delete or rename the other object, or this TokaDeployment",
    "NoHTTPRoutes": "Install the Gateway API and a gateway, or leave out routing.httpRoute",
    "NoInferencePools": "Install the Gateway API inference extension, or leave out routing.inferencePool",
    "NoPodMonitors": "Install the Prometheus operator, or set monitoring.podMonitor to Auto",
    "NodeLost": "A new pod is made elsewhere when the node's is given up; repair or delete the node",
    "NodeRejected": "The kubelet did not take the pod on: the message says why",
    "NotReady": "Read the engine's log; if it stays silent, the kubelet restarts it",
    "NotResponding": "Read the engine's log of that run (kubectl logs --previous)",
    "OutOfMemory": "Raise resources.memory, or lower engine.kvCacheNumTokens",
    "PodMonitorsNotAllowed": "Set the chart's value monitoring.engines to true",
    "PodNotStarted": "See the pod's events (kubectl describe pod)",
    "PodSecurityViolated": "Make podTemplate.sidecars fit the namespace's Pod Security level",
    "PodStuckTerminating": "The operator deletes it for good; repair or delete its node",
    "PodsRejected": "Change what the message names, or the policy that refuses the pods",
    "PortInUse": "Choose another engine.port than the sidecars use",
    "Preempted": "Give the pods a higher scheduling.priorityClassName, or more nodes",
    "ProgressDeadlineExceeded": "See status.failures and the engine's log, or raise rollout.progressDeadlineSeconds",
    "QuotaExceeded": "Raise the namespace's quota, or lower replicas or resources",
    "ReadinessGateClosed": "See why whoever reports the condition that the message names does not: a load balancer's "
    "controller, say, and whether its health check fits /readyz",
    "RolledBack": "Correct what failed, and change the pods or spec.rollout: then it is tried again",
    "RouteNotAccepted": "Change routing.httpRoute, or the Gateway, as the message says",
    "RouteWaits": "See whether the Gateway exists and its controller runs (kubectl describe gateway)",
    "RoutingNotAllowed": "Set the chart's value routing.enabled to true",
    "SandboxFailed": "Check resources.memory and the node's network (kubectl describe pod)",
    "ScalingDisabled": "Set replicas to 1 or more: at 0 the autoscaler does nothing",
    "SchedulingGated": "Whoever gated the pod (a queue) lets it go, or does not",
    "SecretMissing": "Create the Secret: nothing needs to be restarted",
    "StartupTimeout": "Raise startup.timeoutSeconds, or see in the engine's log what takes so long",
    "StorageFailed": "Check cache.size, the claim and the disk",
    "Unschedulable": "Free or add a node that fits, or relax scheduling and resources",
    "VolumeFailed": "Check podTemplate.volumes and the claims that the message names",
    "WebhookFailed": "Repair the admission webhook that the message names, or delete its configuration",
    "WebhookRefused": "Change what the admission webhook names, or the webhook",
}


def add_advice(reason: str, message: str) -> str:
    """The message, with what to do behind it."""
    advice = ADVICE.get(reason)
    return f"{message.rstrip('.')}. {advice}." if advice else message
