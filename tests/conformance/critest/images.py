"""The images that critest pulls, made of the host's own Debian packages."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from root.harness.images import ARCHITECTURE, Entry, Image, Layer, folder, hard_link, layer

from . import programs

E2E = "registry.k8s.io/e2e-test-images"
STAGING = "gcr.io/k8s-staging-cri-tools"
HOSTS = ("registry.k8s.io", "k8s.gcr.io", "gcr.io")
HOST_NETWORK_PORT = 12003

_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PASSWD = """root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
default-user:x:1000:1000:Linux User,,,:/home/default-user:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/bin/false
"""
_GROUP = """root:x:0:
daemon:x:1:
www-data:x:33:
default-user:x:1000:
nogroup:x:65534:
"""
_PREDEFINED_GROUP = "group-defined-in-image:x:50000:default-user\n"
_FOLDERS = ("dev", "etc", "home", "proc", "root", "run", "sys", "var/log", "var/run", "var/www")
_USERS = {"uid": "1002", "username": "www-data", "uid-group": "1003:1003", "username-group": "www-data:www-data"}
_NGINX_FOLDERS = ("var/lib/nginx", "var/log/nginx", "var/lock")
_NGINX_CONF = """user www-data;
worker_processes 1;
pid /var/run/nginx.pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    server {{ listen {port}; location / {{ default_type text/plain; return 200 "nginx\\n"; }} }}
}}
"""
_HTTPD = "echo httpd: resuming normal operations; exec busybox httpd -f -p 80 -h /var/www"
_EFFECTIVE_UID = 'echo "Effective uid: $EUID"'


def catalog(nginx: Path) -> dict[str, Image]:
    """Every image by its full name; ``nginx`` is the program."""
    busybox = _busybox()
    return {
        f"{E2E}/busybox:1.29-2": busybox,
        f"{E2E}/nginx:1.14-2": _nginx(busybox, nginx, 80),
        f"{E2E}/httpd:2.4.39-4": _httpd(busybox),
        f"{E2E}/nonewprivs:1.3": _nonewprivs(),
        **dict.fromkeys(("registry.k8s.io/pause:3.9", "k8s.gcr.io/pause:3.9"), _pause()),
        f"{STAGING}/hostnet-nginx-{ARCHITECTURE}:latest": _nginx(busybox, nginx, HOST_NETWORK_PORT),
        f"{STAGING}/test-image-predefined-group:latest": _predefined_group(busybox),
        **{f"{STAGING}/test-image-user-{kind}:latest": busybox.with_config(User=user) for kind, user in _USERS.items()},
        **dict(_test_images(busybox)),
    }


def _test_images(busybox: Image) -> Iterator[tuple[str, Image]]:
    """Images that differ from each other by one file, under one tag each, and one under three tags."""
    for name in ("test-image-latest:latest", "test-image-tag:test", "test-image-tag:all"):
        yield f"{STAGING}/{name}", _marked(busybox, name)
    for number in "123":
        name = f"test-image-{number}:latest"
        yield f"{STAGING}/{name}", _marked(busybox, name)
        yield f"{STAGING}/test-image-tags:{number}", _marked(busybox, "test-image-tags")


def _marked(image: Image, mark: str) -> Image:
    return image.above(_pack([Entry("mark", mark.encode())]))


def _busybox() -> Image:
    """Debian's busybox: its shell executes applets from the file system, and every applet is a hard link."""
    program = programs.find("busybox")
    applets = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.split()
    entries = [
        *(folder(name) for name in _FOLDERS),
        folder("tmp", 0o1777),
        Entry("etc/passwd", _PASSWD.encode()),
        Entry("etc/group", _GROUP.encode()),
        *_program("bin/busybox", program),
        *(hard_link(f"bin/{name}", "bin/busybox") for name in applets if name != "busybox"),
        *_program("usr/bin/pgrep", programs.find("pgrep")),
        *_program("usr/bin/ipcs", programs.find("ipcs")),
    ]
    return Image((_pack(entries),), {"Cmd": ["sh"], "Env": [_PATH]})


def _nginx(base: Image, program: Path, port: int) -> Image:
    entries = [
        *(folder(name) for name in _NGINX_FOLDERS),
        Entry("etc/nginx/nginx.conf", _NGINX_CONF.format(port=port).encode()),
        *_program("usr/sbin/nginx", program),
    ]
    return base.above(_pack(entries), Cmd=["nginx", "-g", "daemon off;"], StopSignal="SIGQUIT")


def _httpd(base: Image) -> Image:
    """busybox's own web server; the suite wants "httpd" in its log."""
    return base.above(_pack([Entry("var/www/index.html", b"It works!\n")]), Cmd=["sh", "-c", _HTTPD])


def _nonewprivs() -> Image:
    """A program that is setuid root and tells its effective user: bash, which keeps that user with ``-p``."""
    entries = _program("nonewprivs", programs.find("bash"), 0o4755)
    return Image((_pack(entries),), {"Entrypoint": ["/nonewprivs", "-p", "-c", _EFFECTIVE_UID]})


def _pause() -> Image:
    entries = _program("pause", programs.find("catatonit"))
    return Image((_pack(entries),), {"Entrypoint": ["/pause", "-P"]})


def _predefined_group(base: Image) -> Image:
    group = Entry("etc/group", (_GROUP + _PREDEFINED_GROUP).encode())
    return base.above(_pack([group]), User="1000")


def _program(name: str, source: Path, mode: int = 0o755) -> list[Entry]:
    """A program of the host under a new name, and its libraries where it looks for them."""
    shared = [Entry(str(path).lstrip("/"), path.read_bytes(), 0o755) for path in programs.libraries(source)]
    return [Entry(name, source.read_bytes(), mode), *shared]


def _pack(entries: Iterable[Entry]) -> Layer:
    """A layer that has every path once, and every directory before what is in it."""
    found: dict[str, Entry] = {}
    for entry in entries:
        for parent in reversed(PurePosixPath(entry.name).parents[:-1]):
            found.setdefault(str(parent), folder(str(parent)))
        found.setdefault(entry.name, entry)
    return layer(found.values())


def registries_conf(port: int) -> str:
    """containers-registries.conf(5) that sends the suite's registries to the one on ``port``."""
    return "".join(_mirror(host, f"127.0.0.1:{port}/{host}") for host in HOSTS)


def _mirror(host: str, place: str) -> str:
    entry = f"[[registry]]\nprefix = {json.dumps(host)}\nlocation = {json.dumps(host)}\n"
    return f"{entry}[[registry.mirror]]\nlocation = {json.dumps(place)}\ninsecure = true\n\n"
