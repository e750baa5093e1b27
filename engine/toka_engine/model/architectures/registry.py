"""Which class runs an architecture of config.json. A new model is one module and one line here."""

from __future__ import annotations

from collections.abc import Callable

from toka_engine.errors import ModelInvalidError
from toka_engine.model.architectures.llama import Llama
from toka_engine.model.architectures.qwen2 import Qwen2
from toka_engine.model.architectures.qwen3 import Qwen3
from toka_engine.model.builder import ModelBuilder
from toka_engine.model.causal import CausalModel
from toka_engine.model.loader import Weights
from toka_engine.model.model_config import ModelConfig
from toka_engine.model.ops import Ops
from toka_engine.model.ranks import Ranks
from toka_engine.model.stages import Stage

MODELS: dict[str, Callable[[ModelBuilder], CausalModel]] = {
    "LlamaForCausalLM": Llama,
    "Qwen2ForCausalLM": Qwen2,
    "Qwen3ForCausalLM": Qwen3,
}


def build_model(
    config: ModelConfig, weights: Weights, ops: Ops, ranks: Ranks, stage: Stage | None = None
) -> CausalModel:
    """Build the model with its weights, or this rank's part of them, on their device. Without `stage` there is one.

    Raises ModelInvalidError, and ConfigError where the model cannot be split over the ranks.
    """
    make = MODELS.get(config.architecture)
    if make is None:
        known = ", ".join(MODELS)
        raise ModelInvalidError(f"architecture {config.architecture} is not supported ({known} are)")
    return make(ModelBuilder(config, weights, ops, ranks, stage or Stage.whole(config.num_layers)))
