"""`GET /v1/models` and `GET /v1/models/NAME`."""

from __future__ import annotations

import msgspec

from toka_engine.server.errors import no_model
from toka_engine.server.generation_defaults import describe_defaults
from toka_engine.server.service import Service

PATH = "/v1/models"


class ModelCard(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A model as requests may name it. The last two are there once the engine has started."""

    id: str
    object: str
    created: int
    owned_by: str
    default_sampling_params: dict[str, float] | None = None
    max_model_len: int | None = None


class ModelList(msgspec.Struct):
    """All names that requests may give."""

    object: str
    data: list[ModelCard]


def list_models(service: Service) -> ModelList:
    """Return the cards of all served names."""
    return ModelList("list", [_card(service, name) for name in service.names])


def find_model(service: Service, name: str) -> ModelCard:
    """Return one card. Raises a 404 that names what is served."""
    if name not in service.names:
        raise no_model(name, service.names)
    return _card(service, name)


def _card(service: Service, name: str) -> ModelCard:
    card = ModelCard(id=name, object="model", created=service.created_s, owned_by="toka")
    if service.engine is not None:
        limits = service.engine.limits
        card.default_sampling_params = describe_defaults(limits.defaults)
        card.max_model_len = limits.max_request_tokens
    return card
