"""The programs that containers run under: OCI runtimes, conmon, the holder of shared PID namespaces."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from crishim.cli import elf
from crishim.cli.requirements import cgroups
from crishim.cli.requirements.requirement import Requirement
from crishim.config.settings import HandlerSettings, RuntimeSettings, effective_handlers
from crishim.errors import HostFailure
from crishim.host import process

_SECONDS = 10.0


async def examine(settings: RuntimeSettings) -> list[Requirement]:
    """Every runtime handler, conmon and the holder."""
    handlers = effective_handlers(settings)
    found = []
    for name, handler in {settings.default: HandlerSettings(), **handlers}.items():
        found += await runtime(name, handler, is_default=name == settings.default)
    return [*found, await monitor(settings.conmon), holder(settings.holder)]


async def runtime(name: str, handler: HandlerSettings, *, is_default: bool) -> list[Requirement]:
    """One handler's program; crun also minds the host's cgroups."""
    what = f"runtime {name}" + (" (default)" if is_default else "")
    with tempfile.TemporaryDirectory(prefix="crishim-check-") as root:  # crun makes one, even to tell its version
        found, line = await version(handler.path, f"--root={root}") if handler.path else ("not on PATH", "")
    advice = f"install {name}, or set runtime.handlers.{name}.path"
    listed = [Requirement(what, found, bool(line), needed=is_default, advice=advice)]
    controllers = cgroups.hybrid_controllers()
    if line.startswith("crun") and controllers:
        listed.append(cgroups.crun_on_hybrid(controllers, is_default=is_default))
    return listed


async def monitor(path: str) -> Requirement:
    """conmon."""
    found, line = await version(path)
    return Requirement("conmon", found, bool(line), advice="install conmon, or set runtime.conmon")


def holder(path: str) -> Requirement:
    """The init of pods with a shared PID namespace: alone in its root, so it has to be static."""
    found, ok = path, True
    try:
        loader = elf.interpreter(Path(path))
        if loader or not os.access(path, os.X_OK):
            found, ok = f"{path} is {'not static' if loader else 'not executable'}", False
    except HostFailure as err:
        found, ok = err.message, False
    return Requirement(
        "holder",
        found,
        ok,
        needed=False,
        advice="install catatonit, or set runtime.holder: without it no pod can share its PID namespace",
    )


async def version(path: str, *arguments: str) -> tuple[str, str]:
    """What was found at ``path`` in words, and the first line that it says of its version, empty if it cannot run."""
    if not os.access(path, os.X_OK):
        return f"{path} is {'not executable' if os.path.exists(path) else 'missing'}", ""
    try:
        done = await process.run(process.Command([path, *arguments, "--version"], timeout=_SECONDS))
    except HostFailure as err:
        return err.message, ""
    if done.timed_out or done.returncode != 0:
        return f"{path} does not run: {'no answer' if done.timed_out else done.complaint}", ""
    line = (done.stdout.decode(errors="replace").strip().splitlines() or ["unknown version"])[0]
    return f"{path}, {line}", line
