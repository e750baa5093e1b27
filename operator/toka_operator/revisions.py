"""Revisions as they are stored: which of them a spec is.

Owns: how a spec finds the revision that was made for the same pod, so that an edit without meaning, or another version
of the operator, makes no new one. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from toka_operator.fields import Json
from toka_operator.fingerprint import canonicalize
from toka_operator.observed import Observed
from toka_operator.podspec import ENGINE_CONTAINER, render_pod_template
from toka_operator.resources import CONTROLLER_REVISION, STATEFUL_SET, Owner, pod_labels, set_name
from toka_operator.settings import FINGERPRINT_ANNOTATION
from toka_operator.spec import TokaDeploymentSpec


def by_revision(owner: Owner, children: list[Json]) -> dict[str, Json]:
    """Children by the revision in their names, because a label can be edited."""
    prefix = set_name(owner.name, "")
    names = ((child["metadata"]["name"], child) for child in children)
    return {name.removeprefix(prefix): child for name, child in names if name.startswith(prefix)}


def with_stored_revision(owner: Owner, spec: TokaDeploymentSpec, observed: Observed) -> TokaDeploymentSpec:
    """The spec with the name of the revision that was made for the same pod, if there is one."""
    stored = by_revision(owner, observed.of_kind(CONTROLLER_REVISION))
    newest_first = sorted(stored, key=lambda name: -int(stored[name].get("revision", 0)))
    prints = {name: _read_fingerprint(stored[name]) for name in newest_first}
    found = next((name for name in newest_first if prints[name] == spec.fingerprint), None)
    if found is None:
        found = _find_unmarked(owner, spec, {name: stored[name] for name in newest_first if not prints[name]}, observed)
    return spec if found is None else replace(spec, revision=found)


def _find_unmarked(
    owner: Owner, spec: TokaDeploymentSpec, unmarked: Mapping[str, Json], observed: Observed
) -> str | None:
    """A revision without a fingerprint (versions before 0.2 stored none), or one whose memory was deleted.

    It is known by the name that it would have, or by its template, if that is what would be rendered now.
    """
    sets = by_revision(owner, observed.of_kind(STATEFUL_SET))
    for name in (spec.revision, spec.former_revision):
        if name in unmarked or (
            name in sets and (CONTROLLER_REVISION, set_name(owner.name, name)) not in observed.children
        ):
            return name
    for name, child in unmarked.items():
        template = child["data"]["template"]
        rendered = render_pod_template(spec, "", pod_labels(owner.name, name), owner.name)
        if _comparable(template, spec.engine.image) == _comparable(rendered, spec.engine.image):
            return name
    return None


def _read_fingerprint(stored: Json) -> str:
    return str((stored["metadata"].get("annotations") or {}).get(FINGERPRINT_ANNOTATION, ""))


def _comparable(template: Json, image: str | None) -> object:
    """A template in one spelling; without the engine's image, if the spec leaves that to the operator."""
    pod = template["spec"]
    containers = [
        {**c, "image": None} if image is None and c.get("name") == ENGINE_CONTAINER else c for c in pod["containers"]
    ]
    return canonicalize({**template, "spec": {**pod, "containers": containers}})
