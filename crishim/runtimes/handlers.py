"""The runtime handlers of this node: the OCI runtimes that a pod can ask for by name."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping

from crishim.config.paths import Paths
from crishim.config.settings import RuntimeSettings, effective_handlers
from crishim.errors import InvalidArgument
from crishim.runtimes.driver import OciRuntime
from crishim.runtimes.features import probe


class Handlers:
    """All handlers by name; the name ``""`` is the default one."""

    def __init__(self, settings: RuntimeSettings, paths: Paths, *, systemd_cgroup: bool) -> None:
        self.default = settings.default
        self._conmon = settings.conmon
        self._runtimes = {
            name: OciRuntime(name, handler, paths.runtime_root(name), systemd_cgroup=systemd_cgroup)
            for name, handler in effective_handlers(settings).items()
        }

    async def probe(self) -> None:
        """Ask every runtime what it can do."""
        runtimes = list(self._runtimes.values())
        for runtime, found in zip(
            runtimes, await asyncio.gather(*(probe(r.path, r.arguments) for r in runtimes)), strict=True
        ):
            runtime.features = found

    def get(self, name: str) -> OciRuntime:
        """The runtime of a handler; :class:`InvalidArgument` for one that is not configured."""
        runtime = self._runtimes.get(name or self.default)
        if runtime is None:
            raise InvalidArgument(
                f"runtime handler {name!r} is not configured; known are {', '.join(self._runtimes) or 'none'}"
            )
        return runtime

    def all(self) -> Mapping[str, OciRuntime]:
        """Every handler."""
        return self._runtimes

    def problem(self) -> str:
        """Why the default handler cannot run containers, or empty."""
        runtime = self._runtimes.get(self.default)
        if runtime is None:
            return f"runtime handler {self.default!r} is not configured and not on PATH"
        if not os.access(runtime.path, os.X_OK):
            return f"{runtime.path} of runtime handler {self.default!r} is not an executable file"
        if not os.access(self._conmon, os.X_OK):
            return f"runtime.conmon {self._conmon} is not an executable file"
        return ""
