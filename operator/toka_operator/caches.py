"""spec.cache: where downloaded and converted models are kept.

Owns: the fields of the cache, what excludes what, and the name of the claim that pods mount. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from toka_operator.fields import Fields

SHARED_PVC = "SharedPVC"


@dataclass(frozen=True, slots=True)
class Cache:
    type: str
    size: str | None
    claim_name: str | None
    storage_class: str | None
    access_mode: str
    retention: str

    def claim_of(self, name: str) -> str | None:
        """Return the name of the claim that the pods of the TokaDeployment `name` mount, if any."""
        return cache_claim_name(name) if self.type == SHARED_PVC else self.claim_name

    @property
    def is_of_one_node(self) -> bool:
        """Whether only the pods of one node can mount the claim that the operator makes."""
        return self.type == SHARED_PVC and self.access_mode == "ReadWriteOnce"


def cache_claim_name(name: str) -> str:
    """The name of the claim of the models' cache of the TokaDeployment `name`."""
    return f"{name}-cache"


def parse_cache(fields: Fields) -> Cache:
    """The cache that a spec asks for."""
    cache_type = fields.choice("type", ("Ephemeral", SHARED_PVC, "ExistingPVC"))
    claim_name, size = fields.optional_text("claimName"), fields.quantity("size")
    if (cache_type == "ExistingPVC") != (claim_name is not None):
        fields.refuse("claimName", "is needed for type ExistingPVC, and only there")
    if cache_type == SHARED_PVC and size is None:
        fields.refuse("size", "is needed for type SharedPVC")
    for name in ("storageClassName", "accessMode", "retention"):
        if cache_type != SHARED_PVC and fields.get(name) is not None:
            fields.refuse(name, "is only for type SharedPVC")
    return Cache(
        type=cache_type,
        size=size,
        claim_name=claim_name,
        storage_class=fields.optional_text("storageClassName"),
        access_mode=fields.optional_choice("accessMode", ("ReadWriteMany", "ReadWriteOnce")) or "ReadWriteMany",
        retention=fields.optional_choice("retention", ("Retain", "Delete")) or "Retain",
    )
