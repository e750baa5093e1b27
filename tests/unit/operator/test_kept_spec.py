"""A revision keeps the spec that it was made for, so that a user can go back to it."""

from __future__ import annotations

import json
from typing import Any

from toka_operator.observed import Observed
from toka_operator.plan import MAX_KEPT_SPEC_BYTES
from toka_operator.settings import SPEC_ANNOTATION

from tests.unit.operator.examples import child, plan_for, seen, valid

Json = dict[str, Any]
REVISION = "ControllerRevision"


def kept(stored: Json) -> Any:
    text = (stored["metadata"].get("annotations") or {}).get(SPEC_ANNOTATION)
    return None if text is None else json.loads(text)


def test_a_new_revision_keeps_what_alters_the_pod_and_nothing_else() -> None:
    spec = valid(
        engine={"pageSize": 8}, replicas=3, service={"port": 81}, rollout={"maxSurge": 2, "drainTimeoutSeconds": 60}
    )
    assert kept(child(plan_for(spec), REVISION)) == {
        "model": {"source": "builtin://smollm2"},
        "engine": {"pageSize": 8},
        "rollout": {"drainTimeoutSeconds": 60},
    }


def test_a_revision_that_is_stored_stays_as_it_is() -> None:
    children = dict(seen(plan_for(valid())).children)
    address = next(address for address in children if address[0] == REVISION)
    spelt_otherwise = valid(engine={"port": 10210})
    again = plan_for(spelt_otherwise, Observed(children, (), frozenset()))
    assert kept(child(again, REVISION)) == {"model": {"source": "builtin://smollm2"}}
    older = {**children[address], "metadata": {**children[address]["metadata"], "annotations": {}}}
    of_an_older_operator = Observed({**children, address: older}, (), frozenset())
    assert kept(child(plan_for(valid(), of_an_older_operator), REVISION)) is None


def test_a_spec_too_long_for_an_annotation_is_not_kept() -> None:
    env = [{"name": f"V{number}", "value": "x" * 4000} for number in range(MAX_KEPT_SPEC_BYTES // 4000 + 1)]
    assert kept(child(plan_for(valid(engine={"env": env})), REVISION)) is None
