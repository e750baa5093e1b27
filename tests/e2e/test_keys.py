"""API keys of a Secret in pods that serve: a changed Secret changes who may ask, and no pod is replaced for it."""

from __future__ import annotations

import json

import pytest

from tests.cluster.harness.handle import Object
from tests.e2e.installation import Installation

pytestmark = pytest.mark.timeout(900)
CHANGED_WITHIN_S = 240
"""A bound on the wait for a changed key. The engine looks once a second; the kubelet brings a changed Secret to pods
when it looks at them next: after a minute or two by its defaults, after 10 to 15 s with the `syncFrequency` that the
harness's nodes set."""


def secret_of(*keys: str) -> Object:
    """A Secret with these keys, named by their place."""
    listed = {"keys": [{"name": f"team-{place}", "key": key} for place, key in enumerate(keys)]}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "keys"},
        "stringData": {"key": json.dumps(listed)},
    }


@pytest.mark.slow
def test_keys_are_exchanged_in_pods_that_serve_with_both_in_force_in_between(
    installation: Installation, namespace: str
) -> None:
    old, new = "sk-old-0123456789abcdef", "sk-new-0123456789abcdef"
    cluster = installation.cluster
    cluster.apply(secret_of(old), namespace=namespace)
    guarded = installation.deploy(
        namespace, auth={"apiKeySecretRef": {"name": "keys"}}, engine={"extraArgs": ["num_threads=1"]}
    )
    guarded.wait_until_ready()

    def ask() -> dict[str, object]:
        answered: dict[str, object] = json.loads(installation.run_client("with_keys.py", guarded.url, old, new))
        return {key: text if isinstance(text, int) else 200 for key, text in answered.items()}

    def pods() -> list[tuple[str, int]]:
        found = guarded.pods()
        return [(pod["metadata"]["uid"], pod["status"]["containerStatuses"][0]["restartCount"]) for pod in found]

    assert ask() == {old: 200, new: 401}
    before = pods()
    cluster.apply(secret_of(old, new), namespace=namespace)
    cluster.wait_for(lambda: ask() == {old: 200, new: 200}, "both keys to be in force", timeout_s=CHANGED_WITHIN_S)
    cluster.apply(secret_of(new), namespace=namespace)
    cluster.wait_for(lambda: ask() == {old: 401, new: 200}, "the old key to go", timeout_s=CHANGED_WITHIN_S)
    assert pods() == before
    guarded.wait_until_ready()
