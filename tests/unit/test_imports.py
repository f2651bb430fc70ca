"""The rules of the source tree: who may import whom, where processes start, and that everything is explained."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import crishim

ROOMS = (
    "cli", "cri", "streaming", "nri", "pods", "containers", "images", "layers", "spec", "runtimes", "cni",
    "cgroups", "state", "observe", "config", "host", "model", "errors",
)  # fmt: skip
"""Top to bottom: a room imports rooms below it, never above; everyone may import errors and model."""

PACKAGE = Path(crishim.__file__).parent
GENERATED = PACKAGE / "cri" / "api"
UNPACK_WORKER = "crishim.layers.worker"
UNPACK_CLIENT = "crishim.layers.client"

STARTS_PROCESSES = {
    "asyncio.create_subprocess_exec", "asyncio.create_subprocess_shell", "concurrent.futures.ProcessPoolExecutor",
    "multiprocessing.Process", "multiprocessing.Pool", "os.fork", "os.forkpty", "os.popen", "os.posix_spawn",
    "os.posix_spawnp", "os.system", "pty.fork", "pty.spawn",
    *(f"os.exec{kind}" for kind in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")),
    *(f"os.spawn{kind}" for kind in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")),
}  # fmt: skip


def module_name(path: Path, package: Path = PACKAGE) -> str:
    """The dotted name of a source file."""
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parse_all() -> dict[str, ast.Module]:
    """Every module of the package that a human wrote."""
    paths = [path for path in PACKAGE.rglob("*.py") if path.parent != GENERATED or path.name == "__init__.py"]
    return {module_name(path): ast.parse(path.read_bytes(), str(path)) for path in paths}


SOURCES = parse_all()


def imports(module: str, tree: ast.AST, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, also inside functions; ``from a import b`` is ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, *([base] if base else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def imports_of(module: str) -> list[tuple[int, str]]:
    """What a module of the package imports."""
    is_package = PACKAGE.parent.joinpath(*module.split(".")).is_dir()
    return list(imports(module, SOURCES[module], is_package=is_package))


def room(name: str) -> str | None:
    """The room of a dotted name, None for the package root and for what is not ours."""
    parts = name.split(".")
    return parts[1] if parts[0] == "crishim" and len(parts) > 1 and parts[1] in ROOMS else None


def trespasses(module: str, imported: list[tuple[int, str]]) -> list[str]:
    """The imports of ``module`` that go up."""
    own = room(module)
    if own is None:
        return []
    return [
        f"{module}:{line} imports {name}"
        for line, name in imported
        if (other := room(name)) is not None and ROOMS.index(other) < ROOMS.index(own)
    ]


def names(tree: ast.AST) -> dict[str, str]:
    """What the names that a module imports stand for."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found


def dotted(node: ast.expr, known: dict[str, str]) -> str:
    """The full name of an expression such as ``sp.run``, empty if it is not a name."""
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = dotted(node.value, known)
        return f"{base}.{node.attr}" if base else ""
    return ""


def calls(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and full name of all that is called."""
    known = names(tree)
    return [(node.lineno, dotted(node.func, known)) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def is_or_below(name: str, parent: str) -> bool:
    """Whether a dotted name is ``parent`` or something in it."""
    return name == parent or name.startswith(f"{parent}.")


def undocumented(name: str, tree: ast.Module | ast.ClassDef) -> list[str]:
    """The public definitions without a docstring, and the module itself."""
    missing = [] if ast.get_docstring(tree) else [name]
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            missing += undocumented(f"{name}.{node.name}", node)
        elif not ast.get_docstring(node):
            missing.append(f"{name}.{node.name}")
    return missing


def test_sources_are_found() -> None:
    """The checks below look at something: every room has modules."""
    assert {name for name in ROOMS if name not in ("nri", "streaming")} <= {room(name) for name in SOURCES}
    assert "crishim.cri.api.api_pb2" not in SOURCES


def test_every_module_is_in_a_room() -> None:
    """A new room is put into the order first; beside the rooms there is only what starts the command."""
    assert not [name for name in SOURCES if room(name) is None and name not in ("crishim", "crishim.__main__")]


def test_imports_go_down() -> None:
    """No room imports one above it."""
    found = [fault for name in sorted(SOURCES) for fault in trespasses(name, imports_of(name))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "faults"),
    [
        ("crishim.host.process", "from crishim.cli import main", 1),
        ("crishim.host.process", "import crishim.state.store as s", 1),
        ("crishim.host.process", "def f():\n    from crishim import config, errors, pods", 2),
        ("crishim.host.process", "from ..images import pull", 1),
        ("crishim.host.process", "from . import libc\nfrom crishim import __version__", 0),
        ("crishim.model.cri", "from crishim import host", 1),
        ("crishim.cni.network", "from crishim.host import process\nimport json, grpc", 0),
        ("crishim.cli.main", "import crishim.cri.server, crishim.errors", 0),
    ],
)
def test_upward_imports_are_seen(module: str, source: str, faults: int) -> None:
    """In each of their forms."""
    assert len(trespasses(module, list(imports(module, ast.parse(source), is_package=False)))) == faults


def test_only_host_touches_libc_and_processes() -> None:
    """subprocess and ctypes are imported in crishim.host; the unpack client may name subprocess' constants."""
    found = [
        f"{module}:{line} imports {name}"
        for module in sorted(SOURCES)
        for line, name in imports_of(module)
        if (is_or_below(name, "subprocess") or is_or_below(name, "ctypes") or is_or_below(name, "_ctypes"))
        and room(module) != "host"
        and not (module == UNPACK_CLIENT and name == "subprocess")
    ]
    assert not found, "\n".join(found)


def test_only_host_starts_processes() -> None:
    """By whatever function; the unpack worker forks, confines itself and does nothing else."""
    allowed = {(UNPACK_WORKER, "os.fork"), (UNPACK_WORKER, "os.chroot")}
    forbidden = STARTS_PROCESSES | {"os.chroot"}
    found = [
        f"{module}:{line} calls {name}"
        for module in sorted(SOURCES)
        for line, name in calls(SOURCES[module])
        if (name in forbidden or is_or_below(name, "subprocess"))
        and (room(module) != "host" or name in ("os.chroot", "os.fork"))
        and (module, name) not in allowed
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "called"),
    [
        ("import subprocess as sp\nsp.run([])", "subprocess.run"),
        ("from subprocess import Popen as P\ndef f():\n    P([])", "subprocess.Popen"),
        ("from os import fork\nfork()", "os.fork"),
        ("import asyncio.subprocess\nasyncio.create_subprocess_exec()", "asyncio.create_subprocess_exec"),
        ("import subprocess\nx = subprocess.PIPE", ""),
    ],
)
def test_calls_are_seen(source: str, called: str) -> None:
    """Under any name."""
    assert [name for _, name in calls(ast.parse(source))] == ([called] if called else [])


def test_only_the_door_knows_grpc() -> None:
    """grpc and the generated messages are imported in crishim.cri."""
    found = [
        f"{module}:{line} imports {name}"
        for module in sorted(SOURCES)
        for line, name in imports_of(module)
        if (is_or_below(name, "grpc") or is_or_below(name, "crishim.cri.api")) and room(module) != "cri"
    ]
    assert not found, "\n".join(found)


def test_modules_say_what_they_are_for() -> None:
    """Nothing is called utils or helpers."""
    vague = {"util", "utils", "helper", "helpers"}
    assert not [name for name in SOURCES if vague & set(name.split("."))]


def test_everything_public_has_a_docstring() -> None:
    """Modules, classes, functions and methods."""
    found = [name for module in sorted(SOURCES) for name in undocumented(module, SOURCES[module])]
    assert not found, "\n".join(found)


def test_missing_docstrings_are_seen() -> None:
    """At each level; what is private needs none."""
    source = (
        "class A:\n    '''A.'''\n    def f(self): pass\n    def _g(self): pass\nasync def h(): pass\nclass _B: pass"
    )
    assert undocumented("m", ast.parse(source)) == ["m", "m.A.f", "m.h"]
