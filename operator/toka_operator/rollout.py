"""Which revisions get how many pods: the rollout's policy.

Owns: the surge and availability budgets. Pure; one call decides one step from what is there, whatever
happened before, so it needs no memory and no order of events.

Two rules hold at every step, over all revisions together:
- no more than wanted + maxSurge pods are asked for. Old pods that still drain count (they hold their
GPUs); hopeless ones do not, or one of them below an available pod could block a rollout for ever;
- no step takes away an available pod if fewer than wanted - maxUnavailable would be left.
A StatefulSet loses its highest ordinals first, so taking pods away is judged from the top.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RevisionPods:
    """The pods of one revision. `replicas` is what its StatefulSet asks for; the sets hold ordinals."""

    replicas: int
    available: frozenset[int] = frozenset()
    hopeless: frozenset[int] = frozenset()
    """Not ready for long, or failing for a reason that waiting does not mend: no loss to anybody."""
    num_draining: int = 0
    """Pods beyond `replicas` that are not gone yet."""

    def num_available(self, replicas: int | None = None) -> int:
        """How many available pods remain with this many replicas."""
        limit = self.replicas if replicas is None else replicas
        return sum(1 for ordinal in self.available if ordinal < limit)

    def num_hopeless(self) -> int:
        return sum(1 for ordinal in self.hopeless if ordinal < self.replicas)


@dataclass(frozen=True, slots=True)
class Budgets:
    """How many pods are wanted, how many more may exist, how many fewer may serve."""

    num_wanted: int
    max_surge: int
    max_unavailable: int
    is_paused: bool = False

    @property
    def max_total(self) -> int:
        return self.num_wanted + self.max_surge

    @property
    def min_available(self) -> int:
        return max(0, self.num_wanted - self.max_unavailable)


def decide_replicas(budgets: Budgets, current: str, revisions: Mapping[str, RevisionPods]) -> dict[str, int]:
    """Replicas for each revision now. `revisions` are those with a StatefulSet; `current` is the wanted
    one."""
    if budgets.num_wanted == 0:
        return dict.fromkeys([*revisions, current], 0)
    if budgets.is_paused:
        return _decide_paused(budgets, revisions)
    targets = {name: pods.replicas for name, pods in revisions.items()}
    targets.setdefault(current, 0)
    targets[current] = min(targets[current], budgets.num_wanted)
    _shrink_old(budgets, current, revisions, targets)
    _grow_current(budgets, current, revisions, targets)
    return targets


def _grow_current(
    budgets: Budgets, current: str, revisions: Mapping[str, RevisionPods], targets: dict[str, int]
) -> None:
    """Adds current pods as far as the surge allows. An old pod taken away in this very step still counts."""
    old = [pods for name, pods in revisions.items() if name != current]
    num_old = sum(pods.replicas - pods.num_hopeless() + pods.num_draining for pods in old)
    room = budgets.max_total - num_old - targets[current]
    missing = budgets.num_wanted - targets[current]
    targets[current] += max(0, min(room, missing))


def _shrink_old(budgets: Budgets, current: str, revisions: Mapping[str, RevisionPods], targets: dict[str, int]) -> None:
    """Takes old pods away from the top, oldest name order, while the budgets allow it."""
    num_available = sum(pods.num_available(targets[name]) for name, pods in revisions.items())
    spare_available = num_available - budgets.min_available
    waiting_current = targets[current]
    if current in revisions:
        waiting_current -= revisions[current].num_available(targets[current])
    spare_waiting = sum(targets.values()) - max(0, waiting_current) - budgets.min_available
    for name in sorted(revisions):
        if name == current:
            continue
        pods = revisions[name]
        while targets[name] > 0:
            top = targets[name] - 1
            if top in pods.available:
                if spare_available <= 0:
                    break
                spare_available -= 1
            elif top not in pods.hopeless and spare_waiting <= 0:
                break
            spare_waiting -= 1
            targets[name] = top


def _decide_paused(budgets: Budgets, revisions: Mapping[str, RevisionPods]) -> dict[str, int]:
    """A paused rollout only follows a change of the wanted number, in the revision that serves most."""
    targets = {name: pods.replicas for name, pods in revisions.items()}
    if not targets:
        return targets
    main = max(sorted(revisions), key=lambda name: (revisions[name].num_available(), revisions[name].replicas))
    total = sum(targets.values())
    if total < budgets.num_wanted:
        targets[main] += budgets.num_wanted - total
    excess = max(0, total - budgets.max_total)
    for name in sorted(revisions, key=lambda name: (name == main, name)):
        cut = min(excess, targets[name])
        targets[name] -= cut
        excess -= cut
    return targets
