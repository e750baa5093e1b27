"""The engine's error tree and its table of exit codes.

Owns: what each exit code means. The operator keeps the same table (a test compares them), because a pod's exit code is
how it learns what went wrong. May not import anything of ours.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of `toka`. 1 and 128+n are left to Python and to signals."""

    OK = 0
    CONFIG_INVALID = 2
    MODEL_NOT_FOUND = 3
    MODEL_AUTH_FAILED = 4
    MODEL_INVALID = 5
    PORT_IN_USE = 6
    OUT_OF_MEMORY = 7
    DEVICE_UNAVAILABLE = 8
    STORAGE_FAILED = 9
    PROCESS_DIED = 10
    PROCESS_STALLED = 11
    HUB_UNAVAILABLE = 12


REASONS: dict[ExitCode, str] = {
    ExitCode.OK: "Completed",
    ExitCode.CONFIG_INVALID: "ConfigInvalid",
    ExitCode.MODEL_NOT_FOUND: "ModelNotFound",
    ExitCode.MODEL_AUTH_FAILED: "ModelAuthFailed",
    ExitCode.MODEL_INVALID: "ModelInvalid",
    ExitCode.PORT_IN_USE: "PortInUse",
    ExitCode.OUT_OF_MEMORY: "OutOfMemory",
    ExitCode.DEVICE_UNAVAILABLE: "DeviceUnavailable",
    ExitCode.STORAGE_FAILED: "StorageFailed",
    ExitCode.PROCESS_DIED: "EngineProcessDied",
    ExitCode.PROCESS_STALLED: "EngineProcessStalled",
    ExitCode.HUB_UNAVAILABLE: "HubUnavailable",
}
"""The CamelCase reason that the operator shows for each code."""


class TokaError(Exception):
    """Base of every error that a user, a file or the machine can cause; `exit_code` is how the engine ends on it."""

    exit_code: ExitCode = ExitCode.PROCESS_DIED


class ConfigError(TokaError):
    """A key or value of the command line is unknown or invalid. The message names the key."""

    exit_code = ExitCode.CONFIG_INVALID


class ModelNotFoundError(TokaError):
    exit_code = ExitCode.MODEL_NOT_FOUND


class ModelAuthError(TokaError):
    exit_code = ExitCode.MODEL_AUTH_FAILED


class ModelInvalidError(TokaError):
    """The model folder lacks a file, or its config, weights or architecture cannot be used."""

    exit_code = ExitCode.MODEL_INVALID


class PortInUseError(TokaError):
    exit_code = ExitCode.PORT_IN_USE


class OutOfMemoryError(TokaError):
    exit_code = ExitCode.OUT_OF_MEMORY


class DeviceUnavailableError(TokaError):
    exit_code = ExitCode.DEVICE_UNAVAILABLE


class StorageError(TokaError):
    exit_code = ExitCode.STORAGE_FAILED


class HubUnavailableError(TokaError):
    """The model hub cannot be reached or is in trouble, after every attempt: of the model nothing is known."""

    exit_code = ExitCode.HUB_UNAVAILABLE


class EngineDiedError(TokaError):
    """The engine of a script has ended: a process of it died or got stuck, or it was closed."""

    exit_code = ExitCode.PROCESS_DIED


class RequestError(TokaError):
    """The engine refused a request of a script. `param` names the option that is wrong; `code` is the API's."""

    def __init__(self, message: str, status: int, param: str | None, code: str | None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class PeerClosedError(TokaError):
    """The process at the other end of a channel is gone."""


class RanksDisagreeError(TokaError):
    """Ranks that hold one model together are at different steps: a defect of ours. The message has both values."""


class MessageError(TokaError):
    """A frame on a channel could not be decoded: a defect of ours, never of a user."""
