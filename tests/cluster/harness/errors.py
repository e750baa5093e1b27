"""The harness's errors. Each says what failed in a sentence and shows the end of the logs that explain it."""

from __future__ import annotations


class HarnessError(Exception):
    """Base of the harness's own errors."""


class ToolsMissing(HarnessError):
    """A command has not been built yet, or its go.mod has changed since."""


class CommandFailed(HarnessError):
    """A command ended with a non-zero status.

    `stderr` and `stdout` are kept, since tests read the refusal that a user would see.
    """

    def __init__(self, argv: list[str], returncode: int, stdout: str, stderr: str) -> None:
        self.argv = argv
        self.returncode = returncode
        self.stdout = stdout
        self.stderr = stderr
        super().__init__(f"{' '.join(argv)} ended with status {returncode}: {(stderr or stdout).strip()[-4000:]}")


class WaitTimeout(HarnessError, AssertionError):
    """A test waited for something that did not come true in time."""
