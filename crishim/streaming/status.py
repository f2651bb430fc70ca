"""How a command's end is told on the error stream.

Since version 4 by a JSON Status object (k8s.io/apimachinery, meta/v1) that carries the exit code; before, by plain
text in case of failure and by nothing otherwise.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

MAX_MESSAGE = 4096
"""Characters of an error that are told."""


@dataclass(frozen=True)
class Outcome:
    """``exit_code`` of a command that ran, or the ``error`` that kept it from running."""

    exit_code: int = 0
    error: str = ""

    def as_json(self) -> bytes:
        """The Status object."""
        return json.dumps(self._status(), separators=(",", ":")).encode()

    def as_text(self) -> bytes:
        """For versions before 4."""
        return b"" if self == Outcome() else self._message().encode(errors="replace")

    def _message(self) -> str:
        if self.error:
            return f"Internal error occurred: {self.error}"[:MAX_MESSAGE]
        return f"command terminated with non-zero exit code: {self.exit_code}"

    def _status(self) -> dict[str, Any]:
        status: dict[str, Any] = {"metadata": {}, "status": "Success"}
        if self.error:
            causes = [{"message": self.error[:MAX_MESSAGE]}]
            status |= {"status": "Failure", "reason": "InternalError", "code": 500}
            status |= {"message": self._message(), "details": {"causes": causes}}
        elif self.exit_code:
            causes = [{"reason": "ExitCode", "message": str(self.exit_code)}]
            status |= {"status": "Failure", "reason": "NonZeroExitCode"}
            status |= {"message": self._message(), "details": {"causes": causes}}
        return status
