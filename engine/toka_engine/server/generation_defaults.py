"""The sampling parameters that a model's generation_config.json sets for requests that leave a field out.

Owns: which of the file's values count, and the bounds of those values in a request. `max_new_tokens` and `max_length`
do not count: they belong to the examples of a model's page, and would cut in silence what a request without
`max_tokens` asks for whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from toka_engine.errors import ModelInvalidError
from toka_engine.slot_parameters import Sampling

MAX_TEMPERATURE = 2.0
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0
"""Far beyond what is of use; within them no logit overflows."""

_Share = Annotated[float, Meta(ge=0, le=1)]


class SamplingDefaults(msgspec.Struct, frozen=True):
    """The values that a model sets; None where it sets none."""

    temperature: Annotated[float, Meta(ge=0, le=MAX_TEMPERATURE)] | None = None
    top_p: _Share | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: _Share | None = None
    repetition_penalty: Annotated[float, Meta(ge=MIN_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY)] | None = None

    def values(self) -> dict[str, Any]:
        """Return the values that are set, by name."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}

    def complete(self, vocab_size: int) -> Sampling:
        """Return how a request that sets nothing is sampled: what the model leaves open is off."""
        sampling = Sampling(**self.values())
        return msgspec.structs.replace(sampling, top_k=min(max(0, sampling.top_k), vocab_size))


def read_sampling_defaults(model_dir: Path) -> SamplingDefaults:
    """Return what the folder's generation_config.json sets. Raises ModelInvalidError that names the field."""
    path = model_dir / "generation_config.json"
    if not path.is_file():
        return SamplingDefaults()
    try:
        return msgspec.json.decode(path.read_bytes(), type=SamplingDefaults)
    except msgspec.DecodeError as error:
        way_out = "start with generation_config=none to leave its sampling parameters out"
        raise ModelInvalidError(f"{path}: {error}; {way_out}") from error


def describe_defaults(sampling: Sampling) -> dict[str, float]:
    """Return the values of `sampling` that a model may set, as `/v1/models` and the log state them."""
    return {name: getattr(sampling, name) for name in SamplingDefaults.__struct_fields__}
