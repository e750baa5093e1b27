"""Simulated nodes do this with their pods: bound pods become Ready at once, deleted ones are gone at once.

A pod annotated `simulated.toka.dev/hold: "true"` stays Pending, so that a test can give it a status of its
own (a crash, a missing image); one annotated `simulated.toka.dev/never-ready: "true"` runs unready.
"""

from __future__ import annotations

from pathlib import Path

HOLD_ANNOTATION = "simulated.toka.dev/hold"
NEVER_READY_ANNOTATION = "simulated.toka.dev/never-ready"

_STAGES = """\
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {name: node-becomes-ready}
spec:
  resourceRef: {apiGroup: v1, kind: Node}
  selector:
    matchExpressions:
    - {key: '.status.conditions.[] | select( .type == "Ready" ) | .status', operator: NotIn, values: ["True"]}
  next:
    statusTemplate: |
      {{ $now := Now }}
      conditions:
      {{ range NodeConditions }}
      - lastHeartbeatTime: {{ $now | Quote }}
        lastTransitionTime: {{ $now | Quote }}
        message: {{ .message | Quote }}
        reason: {{ .reason | Quote }}
        status: {{ .status | Quote }}
        type: {{ .type | Quote }}
      {{ end }}
      addresses:
      - {type: InternalIP, address: {{ NodeIP | Quote }}}
      - {type: Hostname, address: {{ .metadata.name | Quote }}}
      phase: Running
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {name: pod-runs}
spec:
  resourceRef: {apiGroup: v1, kind: Pod}
  selector:
    matchExpressions:
    - {key: '.metadata.deletionTimestamp', operator: DoesNotExist}
    - {key: '.status.phase', operator: In, values: [Pending]}
    - {key: '.metadata.annotations["simulated.toka.dev/hold"]', operator: NotIn, values: ["true"]}
  next:
    statusTemplate: |
      {{ $now := Now }}
      {{ $held := index (or .metadata.annotations dict) "simulated.toka.dev/never-ready" }}
      {{ $is_ready := ne (or $held "") "true" }}
      conditions:
      {{ range $type := list "PodReadyToStartContainers" "Initialized" }}
      - {type: {{ $type | Quote }}, status: "True", lastTransitionTime: {{ $now | Quote }}}
      {{ end }}
      {{ range $type := list "ContainersReady" "Ready" }}
      - type: {{ $type | Quote }}
        status: {{ if $is_ready }}"True"{{ else }}"False"{{ end }}
        lastTransitionTime: {{ $now | Quote }}
      {{ end }}
      containerStatuses:
      {{ range .spec.containers }}
      - name: {{ .name | Quote }}
        image: {{ .image | Quote }}
        imageID: {{ .image | Quote }}
        containerID: simulated://container
        ready: {{ $is_ready }}
        started: true
        restartCount: 0
        state: {running: {startedAt: {{ $now | Quote }}}}
      {{ end }}
      initContainerStatuses:
      {{ range .spec.initContainers }}
      - name: {{ .name | Quote }}
        image: {{ .image | Quote }}
        imageID: {{ .image | Quote }}
        ready: true
        restartCount: 0
        state:
          terminated:
            exitCode: 0
            reason: Completed
            startedAt: {{ $now | Quote }}
            finishedAt: {{ $now | Quote }}
      {{ end }}
      {{ with PodIPsWith .spec.nodeName false .metadata.uid .metadata.name .metadata.namespace }}
      podIP: {{ index . 0 | Quote }}
      podIPs:
      {{ range . }}
      - ip: {{ . | Quote }}
      {{ end }}
      {{ end }}
      phase: Running
      startTime: {{ $now | Quote }}
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {name: pod-goes}
spec:
  resourceRef: {apiGroup: v1, kind: Pod}
  selector:
    matchExpressions:
    - {key: '.metadata.deletionTimestamp', operator: Exists}
  next:
    delete: true
"""


def write_kwok_configuration(folder: Path) -> Path:
    """Write the file for kwok's `--config`."""
    configuration = folder / "kwok.yaml"
    configuration.write_text(_STAGES)
    return configuration
