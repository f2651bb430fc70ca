"""Where the host's programs are, what they need, and where those come from that are not installed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

_PACKAGES = {
    "busybox": "busybox",
    "catatonit": "catatonit",
    "docker-registry": "docker-registry",
    "ipcmk": "util-linux-extra or util-linux",
    "ipcs": "util-linux-extra or util-linux",
    "pgrep": "procps",
}
_LOADERS = ("/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1")


class Missing(Exception):
    """Something that this needs is not on the host; the message says how to get it."""


def find(name: str) -> Path:
    """The program ``name`` of the host."""
    place = shutil.which(name)
    if place is None:
        raise Missing(f"{name} is not installed: apt-get install {_PACKAGES.get(name, name)}")
    return Path(place).resolve()


def check(names: Iterable[str] = tuple(_PACKAGES)) -> None:
    """Refuse a host that lacks one of the programs."""
    for name in names:
        find(name)


def nginx(cache: Path) -> Path:
    """nginx: the host's own or one out of Debian's package, which is unpacked and not installed, so nothing serves."""
    installed = shutil.which("nginx")
    place = Path(installed).resolve() if installed else cache / "nginx/usr/sbin/nginx"
    if not place.exists():
        downloads = cache / "nginx.deb"
        downloads.mkdir(parents=True, exist_ok=True)
        _run(["apt-get", "-o", "APT::Sandbox::User=root", "download", "nginx"], downloads)
        package = max(downloads.glob("nginx_*.deb"), key=lambda path: path.stat().st_mtime)
        _run(["dpkg-deb", "-x", str(package), str(cache / "nginx")], downloads)
    return place


def _run(command: list[str], directory: Path) -> None:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Missing(f"cannot get nginx, neither installed nor to be had by {command[0]}: {last}")


def libraries(program: Path) -> list[Path]:
    """The loader and the libraries of ``program``, by the names that it asks for; none of one that is static."""
    loader = next((path for path in _LOADERS if Path(path).exists()), "")
    done = subprocess.run([loader, "--list", str(program)], capture_output=True, text=True, check=False)
    if done.returncode != 0 and "not found" not in done.stdout + done.stderr:
        return []
    lost = [line.split()[0] for line in done.stdout.splitlines() if line.endswith("not found")]
    if done.returncode != 0 or lost:
        raise Missing(f"{program} needs libraries that are not installed: {', '.join(lost) or done.stderr.strip()}")
    words = [word for line in done.stdout.splitlines() for word in line.split() if word.startswith("/")]
    return [Path(word) for word in dict.fromkeys([loader, *words])]
