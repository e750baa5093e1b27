"""The operator's error tree, and its copy of the engine's table of exit codes.

Owns: what can go wrong between us and the API server, as exceptions of one tree. Decides nothing:
`reconcile` says which of them are retried and which become a condition. May not import anything of ours.
"""

from __future__ import annotations

from dataclasses import dataclass

EXIT_REASONS: dict[int, str] = {
    0: "Completed",
    2: "ConfigInvalid",
    3: "ModelNotFound",
    4: "ModelAuthFailed",
    5: "ModelInvalid",
    6: "PortInUse",
    7: "OutOfMemory",
    8: "DeviceUnavailable",
    9: "StorageFailed",
    10: "EngineProcessDied",
    11: "EngineProcessStalled",
    12: "HubUnavailable",
}
"""The engine's exit codes and the reason shown for each. The two programs share no code, so a test
compares them."""


@dataclass(frozen=True, slots=True)
class FieldError:
    """One invalid field of a TokaDeployment: its path (`spec.rollout.maxSurge`) and a sentence."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


class OperatorError(Exception):
    """Base of every error that the cluster or the environment can cause."""


class SettingsError(OperatorError):
    """A setting of the operator's environment is missing or invalid. The message names it."""


class NotLeaderError(OperatorError):
    """A write was refused by ourselves, because the lease is not (or no longer surely) held."""


class TransientError(OperatorError):
    """The API server could not be reached, or said to try later (429, 5xx). `retry_after_s` if it said
    when."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class WriteFailsError(TransientError):
    """500: the API server, or an admission webhook that it must ask, failed at this write (no address is left for a
    Service, say). It may be that only this object waits, for long, and that the API server itself is well."""


class ApiError(OperatorError):
    """The API server refused a request. `status` is the HTTP code, `reason` Kubernetes' word for it."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message


class NotFoundError(ApiError):
    """404: the object, or its resource type, does not exist."""


class ConflictError(ApiError):
    """409: it exists already, has changed meanwhile, or is another object (uid) than was meant."""


class GoneError(ApiError):
    """410: the resource version asked for is too old; list again."""


class NamespaceEndsError(ApiError):
    """403: the namespace is being deleted, so nothing can be created in it, and nothing needs to be."""
