"""Where everything lies below ``root`` and ``state``; all paths of an object follow from its ID."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from crishim.config.settings import Config


@dataclass(frozen=True)
class Paths:
    """The directories of one daemon."""

    root: Path
    state: Path

    @classmethod
    def of(cls, config: Config) -> Paths:
        """The paths that ``config`` asks for."""
        return cls(Path(config.root), Path(config.state))

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.root / "crishim.db"

    @property
    def layers(self) -> Path:
        """One directory a layer, named by its number."""
        return self.root / "layers"

    @property
    def sandboxes(self) -> Path:
        """Volatile files of all sandboxes."""
        return self.state / "sandboxes"

    @property
    def containers(self) -> Path:
        """Volatile files of all containers."""
        return self.state / "containers"

    @property
    def writable(self) -> Path:
        """The writable layers of all containers."""
        return self.root / "containers"

    @property
    def exits(self) -> Path:
        """conmon's exit files, named by container ID."""
        return self.state / "exits"

    @property
    def attach(self) -> Path:
        """conmon's attach sockets."""
        return self.state / "attach"

    def runtime_root(self, handler: str) -> Path:
        """The OCI runtime's own state directory."""
        return self.state / "runtimes" / handler

    def sandbox(self, sandbox_id: str) -> Path:
        """Volatile files of one sandbox."""
        return self.sandboxes / sandbox_id

    def namespaces(self, sandbox_id: str) -> Path:
        """Where the namespaces of one sandbox are pinned."""
        return self.sandbox(sandbox_id) / "ns"

    def shm(self, sandbox_id: str) -> Path:
        """The shared memory file system of one sandbox."""
        return self.sandbox(sandbox_id) / "shm"

    def bundle(self, container_id: str) -> Path:
        """The OCI bundle of one container."""
        return self.containers / container_id

    def prepare(self) -> None:
        """Make the directories, closed to everyone but root."""
        for path, mode in (
            (self.root, 0o700),
            (self.layers, 0o700),
            (self.writable, 0o700),
            (self.state, 0o711),
            (self.sandboxes, 0o711),
            (self.containers, 0o711),
            (self.exits, 0o700),
            (self.attach, 0o700),
        ):
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(mode)
