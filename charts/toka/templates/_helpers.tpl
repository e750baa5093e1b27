{{- define "toka.name" -}}
{{- printf "%s-operator" .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* The name of what belongs to no namespace: releases of one name in two namespaces are two releases. */}}
{{- define "toka.clusterName" -}}
{{- printf "%s-%s" (include "toka.name" .) .Release.Namespace -}}
{{- end -}}

{{- define "toka.selectorLabels" -}}
app.kubernetes.io/name: toka-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "toka.labels" -}}
{{ include "toka.selectorLabels" . }}
app.kubernetes.io/component: operator
app.kubernetes.io/part-of: toka
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "toka.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "toka.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* What the operator may do with TokaDeployments and their children: no secrets, no wildcards, no exec. */}}
{{- define "toka.rules" -}}
- apiGroups: [toka.dev]
  resources: [tokadeployments]
  verbs: [get, list, watch]
- apiGroups: [toka.dev]
  resources: [tokadeployments/status]
  verbs: [patch]
# Asked for by the admission plugin OwnerReferencesPermissionEnforcement, of whoever makes children that hold their owner.
- apiGroups: [toka.dev]
  resources: [tokadeployments/finalizers]
  verbs: [update]
- apiGroups: [""]
  resources: [services, serviceaccounts, persistentvolumeclaims]
  verbs: [get, list, watch, create, patch]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch, delete]
- apiGroups: [""]
  resources: [events]
  verbs: [list, watch, create, patch]
- apiGroups: [apps]
  resources: [statefulsets, controllerrevisions]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [autoscaling]
  resources: [horizontalpodautoscalers]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, patch, delete]
{{- if .Values.monitoring.engines }}
- apiGroups: [monitoring.coreos.com]
  resources: [podmonitors]
  verbs: [get, list, watch, create, patch, delete]
{{- end }}
{{- if .Values.routing.enabled }}
- apiGroups: [inference.networking.k8s.io]
  resources: [inferencepools]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [gateway.networking.k8s.io]
  resources: [httproutes]
  verbs: [get, list, watch, create, patch, delete]
{{- end }}
- apiGroups: [discovery.k8s.io]
  resources: [endpointslices]
  verbs: [list, watch]
{{- end -}}

{{/* Labels of PodMonitors, as a=b,c=d. */}}
{{- define "toka.monitorLabels" -}}
{{- $pairs := list -}}
{{- range $key, $value := .Values.monitoring.labels }}{{- $pairs = append $pairs (printf "%s=%s" $key $value) }}{{- end -}}
{{- join "," $pairs -}}
{{- end -}}

{{/* The labels of the role for nodes: it says nothing about which namespaces are served. */}}
{{- define "toka.nodesLabels" -}}
{{ include "toka.labels" . | replace "app.kubernetes.io/component: operator" "app.kubernetes.io/component: nodes" }}
{{- end -}}

{{/* "true" if the operator may watch nodes. */}}
{{- define "toka.watchesNodes" -}}
{{- or (eq .Values.watchNodes "On") (and (eq .Values.watchNodes "Auto") (not .Values.watchNamespaces)) -}}
{{- end -}}

{{/* "true" for a role that gives another release's operator its rights. */}}
{{- define "toka.isOthersRole" -}}
{{- $labels := .role.metadata.labels | default dict -}}
{{- $annotations := .role.metadata.annotations | default dict -}}
{{- $isOperator := and (eq (index $labels "app.kubernetes.io/name" | default "") "toka-operator") (eq (index $labels "app.kubernetes.io/component" | default "") "operator") (not (hasSuffix "-lease" .role.metadata.name)) -}}
{{- $isOurs := and (eq (index $annotations "meta.helm.sh/release-name" | default "") .root.Release.Name) (eq (index $annotations "meta.helm.sh/release-namespace" | default "") .root.Release.Namespace) -}}
{{- and $isOperator (not $isOurs) -}}
{{- end -}}

{{/* Two operators that serve one namespace would both work on every object there, each with its own default image. */}}
{{- define "toka.refuseOverlap" -}}
{{- $root := . -}}
{{- $kinds := list (list "ClusterRole" "") -}}
{{- if .Values.watchNamespaces -}}
{{- range .Values.watchNamespaces }}{{- $kinds = append $kinds (list "Role" .) }}{{- end -}}
{{- else -}}
{{- $kinds = append $kinds (list "Role" "") -}}
{{- end -}}
{{- range $kinds -}}
{{- range (lookup "rbac.authorization.k8s.io/v1" (index . 0) (index . 1) "").items -}}
{{- if eq (include "toka.isOthersRole" (dict "role" . "root" $root)) "true" -}}
{{- $where := .metadata.namespace | default "the whole cluster" -}}
{{- fail (printf "another release (%s in namespace %s) serves %s: give each release namespaces of its own by watchNamespaces" (index .metadata.annotations "meta.helm.sh/release-name") (index .metadata.annotations "meta.helm.sh/release-namespace") $where) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
