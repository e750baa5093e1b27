"""Decides which layers each pipeline stage holds, and what else of a model. Pure arithmetic.

A stage is a run of layers. The first one begins with the token embedding, the last one ends with the final norm, the LM
head and the sampler. Stages work at the same time, so the slowest one decides: layers are dealt out by what each stage
computes, and the LM head counts by its parameters (of an 8B as much as 2.4 layers). An embedding is looked up, which
takes no time to speak of; where stages cannot be even, the first one, which holds it, has the fewer layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from toka_engine.config import EngineConfig
from toka_engine.errors import ConfigError
from toka_engine.model.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class Stage:
    """The layers [begin, end) of one of `size` stages."""

    index: int
    size: int
    begin: int
    end: int

    @classmethod
    def whole(cls, num_layers: int) -> Stage:
        """The only stage of a model."""
        return cls(0, 1, 0, num_layers)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.size - 1

    @property
    def layers(self) -> range:
        """The numbers of its layers in the whole model."""
        return range(self.begin, self.end)


def choose_stage(config: EngineConfig, model: ModelConfig, index: int) -> Stage:
    """Return stage `index` of `model`. Raises ConfigError where it cannot be split as `config` asks, with numbers."""
    num_stages, num_layers = config.pp_size, model.num_layers
    if num_stages > num_layers:
        raise ConfigError(f"pp_size={num_stages} is more than num_hidden_layers={num_layers} of the model")
    split = config.pp_layer_split or split_layers(num_layers, count_head_layers(model), num_stages)
    if sum(split) != num_layers:
        text = ",".join(map(str, split))
        raise ConfigError(f"pp_layer_split={text} adds up to {sum(split)}, num_hidden_layers={num_layers} of the model")
    begin = sum(split[:index])
    return Stage(index, num_stages, begin, begin + split[index])


def count_head_layers(model: ModelConfig) -> float:
    """Return the parameters of the LM head in those of one layer."""
    width = (model.num_heads + model.num_kv_heads) * model.head_dim
    layer = 2 * model.hidden_size * width + 3 * model.hidden_size * model.intermediate_size
    return model.vocab_size * model.hidden_size / layer


def split_layers(num_layers: int, head_layers: float, num_stages: int) -> tuple[int, ...]:
    """Return the number of layers of each stage, so that the largest one is as small as can be.

    The last stage has a head as large as `head_layers` beside its layers.
    """
    if num_stages == 1:
        return (num_layers,)
    others = num_stages - 1
    choices = range(1, num_layers - others + 1)

    def measure(num_last: int) -> tuple[float, float]:
        """The largest stage, and how uneven it is that the last one has so many layers."""
        last, largest = num_last + head_layers, -(-(num_layers - num_last) // others)
        return max(last, largest), abs(last - (num_layers - num_last) / others)

    num_last = min(choices, key=measure)
    each, num_larger = divmod(num_layers - num_last, others)
    return (*[each] * (others - num_larger), *[each + 1] * num_larger, num_last)
