"""Turns whatever huggingface_hub raises into an error of our tree, or into `TransientError`."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from toka_engine.errors import (
    ConfigError,
    HubUnavailableError,
    ModelAuthError,
    ModelNotFoundError,
    StorageError,
    TokaError,
)

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_MAX_RETRY_AFTER_S = 300.0


class TransientError(Exception):
    """Worth another attempt: the connection, or the hub's own trouble. `retry_after_s`: as the hub asks for."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def client_error() -> type[Exception]:
    """Return the base of what the library's HTTP client raises, whichever client its version uses."""
    from huggingface_hub import errors

    found: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # imported there, exported nowhere
    return found


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE says that the hub must not be asked."""
    from huggingface_hub import constants

    return constants.is_offline_mode()


@contextmanager
def translated_errors(name: str, revision: str | None) -> Iterator[None]:
    """Translate what the body raises while it downloads the model `name`."""
    from huggingface_hub import errors

    try:
        yield
    except (TokaError, TransientError):
        raise
    except errors.HFValidationError as error:
        raise ConfigError(f"model={name}: not a hub name") from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"the hub has no revision {revision!r} of {name}") from error
    except errors.LocalEntryNotFoundError as error:
        _raise_for_unreachable(name, error)
    except errors.HfHubHTTPError as error:
        _raise_for_answer(name, error)
    except client_error() as error:
        raise TransientError(f"the hub cannot be reached: {type(error).__name__}") from error
    except OSError as error:
        _raise_for_os_error(error)


@contextmanager
def storage_errors() -> Iterator[None]:
    """Translate what the file system raises while the cache is locked and its notes are kept."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"the cache cannot be written: {error}") from error


def _raise_for_unreachable(name: str, error: Exception) -> None:
    """The library looked into the cache because the hub could not be asked, and the cache has not all of it."""
    from huggingface_hub import errors

    cause = error.__cause__
    if is_offline():
        raise ModelNotFoundError(f"{name} is not (wholly) in the cache, and HF_HUB_OFFLINE is set") from error
    if isinstance(cause, errors.HfHubHTTPError):
        _raise_for_answer(name, cause)
    raise TransientError(f"the hub cannot be reached: {type(cause or error).__name__}") from error


def _raise_for_answer(name: str, error: HfHubHTTPError) -> None:
    response = error.response
    status = response.status_code
    if status in (401, 403):
        token = "HF_TOKEN was refused" if os.environ.get("HF_TOKEN") else "no HF_TOKEN is set"
        raise ModelAuthError(f"the hub answers {status} for {name}: not public or not there, and {token}") from error
    if status in (404, 410):
        raise ModelNotFoundError(f"the hub has no model {name}") from error
    if status in (408, 429) or status >= 500:
        after = str(response.headers.get("Retry-After", ""))
        retry_after_s = min(_MAX_RETRY_AFTER_S, float(after)) if after.isdecimal() else 0.0
        raise TransientError(f"the hub answers {status}", retry_after_s) from error
    raise HubUnavailableError(f"the hub answers {status} for {name}") from error


def _raise_for_os_error(error: OSError) -> None:
    if error.errno in _NO_SPACE:
        raise StorageError(f"the disk is full: {error}") from error
    # Without a number: the library's own check that a file has the size it should have.
    if error.errno is None or isinstance(error, ConnectionError | TimeoutError):
        raise TransientError(f"{type(error).__name__}: {error}") from error
    raise StorageError(f"the cache cannot be written: {error}") from error
