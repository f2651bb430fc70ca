"""``crishim check``: what makes a requirement met, and what makes the command fail."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from crishim.cli import check as command
from crishim.cli import elf
from crishim.cli.check import lines, verdict
from crishim.cli.requirements import cgroups, files, kernel, network, programs
from crishim.cli.requirements.requirement import Requirement, can_run_pods
from crishim.cni.config import NetworkConfig
from crishim.config.settings import Config, HandlerSettings, ImageSettings, RuntimeSettings
from crishim.errors import HostFailure
from crishim.host.facts import HostFacts

GOOD = Requirement("conmon", "/usr/bin/conmon", advice="install conmon")
WARNING = Requirement("ip_forward", "off", ok=False, needed=False, advice="turn it on")
MISSING = Requirement("runtime runc", "not on PATH", ok=False, advice="install runc")

FACTS = HostFacts(
    kernel="6.1.0",
    boot_id="",
    capabilities=frozenset(),
    oom_score_adj=0,
    apparmor=False,
    selinux=False,
    seccomp=True,
    systemd=False,
)


@pytest.mark.parametrize(
    ("found", "status"), [([GOOD], 0), ([GOOD, WARNING], 0), ([GOOD, MISSING, WARNING], 1), ([], 0)]
)
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["text", "json"])
def test_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: list[Requirement], status: int, flags: list[str]
) -> None:
    """1 if something is missing that pods need; warnings are none."""

    async def examine(_config: Config) -> list[Requirement]:
        return found

    monkeypatch.setattr(command, "examine", examine)
    (tmp_path / "crishim.toml").touch()
    done = CliRunner().invoke(command.check, ["--config", str(tmp_path / "crishim.toml"), *flags])
    assert done.exit_code == status
    assert can_run_pods(found) == (status == 0)
    if flags:
        assert json.loads(done.output) == [dataclasses.asdict(item) for item in found]


def test_lines_are_aligned() -> None:
    """Verdict, name, what was found; advice only where something is wrong."""
    plain = [line.replace("\033[32m", "").replace("\033[33m", "").replace("\033[31m", "").replace("\033[0m", "")
             for line in lines([GOOD, WARNING, MISSING])]  # fmt: skip
    assert plain == [
        "ok       conmon        /usr/bin/conmon",
        "warning  ip_forward    off -> turn it on",
        "missing  runtime runc  not on PATH -> install runc",
    ]


def test_verdict_is_a_sentence() -> None:
    """It names what is missing."""
    assert verdict([GOOD]) == "Pods can run on this host."
    assert verdict([GOOD, WARNING]) == "Pods can run on this host, with 1 warning."
    assert verdict([GOOD, WARNING, MISSING]) == "Pods cannot run on this host: runtime runc must be mended first."


@pytest.mark.parametrize(
    ("release", "ok"),
    [("5.5.19", False), ("5.6.0", True), ("6.18.44-cloud-amd64", True), ("4.19", False), ("unknown", False)],
)
def test_kernel_version(release: str, ok: bool) -> None:
    """Numbers are compared as numbers."""
    assert kernel.version(release).ok == ok


def test_capabilities() -> None:
    """The effective ones count, by number; without CAP_SYS_RESOURCE there is only a warning."""
    everything = kernel.effective_capabilities("CapPrm:\t0000000000000000\nCapEff:\t000001ffffffffff\n")
    assert {"CHOWN", "SYS_ADMIN", "CHECKPOINT_RESTORE"} <= everything
    assert [item.verdict for item in kernel.capabilities(everything)] == ["ok", "ok"]
    assert [item.verdict for item in kernel.capabilities(everything - {"SYS_RESOURCE"})] == ["ok", "warning"]
    lacking = kernel.capabilities(everything - {"SYS_ADMIN", "MKNOD"})
    assert (lacking[0].verdict, lacking[0].found) == ("missing", "lacks SYS_ADMIN, MKNOD")
    assert kernel.effective_capabilities("Name:\tx\n") == frozenset()


def test_user_and_modules() -> None:
    """Root is needed; security modules are not."""
    assert kernel.user(0).verdict == "ok"
    assert (kernel.user(1000).verdict, kernel.user(1000).found) == ("missing", "user 1000")
    assert kernel.security_modules(FACTS).ok
    assert kernel.security_modules(dataclasses.replace(FACTS, apparmor=True)).found == "AppArmor"


def cgroup_mount(top: Path, *names: str, unified: str | None = None) -> Path:
    """Version 1 hierarchies, and perhaps a version 2 one beside them."""
    for name in names:
        (top / name).mkdir(parents=True)
    if unified is not None:
        (top / "unified").mkdir()
        (top / "unified" / "cgroup.controllers").write_text(unified)
    return top


V1 = ("blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "memory", "pids")


def test_cgroups_version_1(tmp_path: Path) -> None:
    """All hierarchies are there."""
    found = cgroups.examine(RuntimeSettings(), systemd=False, mount=cgroup_mount(tmp_path, *V1))
    assert [item.ok for item in found] == [True, True, True]
    assert found[0].found == "version 1, driver cgroupfs"


def test_cgroups_version_2(tmp_path: Path) -> None:
    """One controller is missing."""
    (tmp_path / "cgroup.controllers").write_text("cpu io memory pids\n")
    found = cgroups.examine(RuntimeSettings(), systemd=True, mount=tmp_path)
    assert found[0].found == "version 2, driver systemd"
    assert (found[1].verdict, found[1].found) == ("missing", "no cpuset")


def test_cgroups_as_configured(tmp_path: Path) -> None:
    """The systemd driver without systemd is what the daemon would refuse."""
    found = cgroups.examine(RuntimeSettings(cgroup_manager="systemd"), systemd=False, mount=tmp_path)
    assert [item.verdict for item in found] == ["missing"]


def test_no_cgroups(tmp_path: Path) -> None:
    """Nothing is mounted there."""
    found = cgroups.examine(RuntimeSettings(), systemd=False, mount=tmp_path)
    assert found[0].verdict == "missing"


def test_crun_on_hybrid_hosts(tmp_path: Path) -> None:
    """It is an error for the default runtime, otherwise a warning; without controllers there it is fine."""
    mount = cgroup_mount(tmp_path / "a", *V1, unified="hugetlb\n")
    assert cgroups.hybrid_controllers(mount) == ["hugetlb"]
    assert cgroups.hybrid_controllers(tmp_path) == []
    assert "hybrid" in cgroups.examine(RuntimeSettings(), systemd=False, mount=mount)[0].found
    assert cgroups.crun_on_hybrid(["hugetlb"], is_default=True).verdict == "missing"
    assert cgroups.crun_on_hybrid(["hugetlb"], is_default=False).verdict == "warning"
    assert cgroups.crun_on_hybrid([], is_default=True).verdict == "ok"


def program(path: Path, text: str = "echo tool version 1.2; echo more") -> Path:
    """A shell script."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


async def test_versions_of_programs(tmp_path: Path) -> None:
    """The first line counts; a program that fails, hangs on or is none is not there."""
    good = program(tmp_path / "good")
    assert await programs.version(str(good)) == (f"{good}, tool version 1.2", "tool version 1.2")
    bad = program(tmp_path / "bad", "echo broken >&2; exit 3")
    assert await programs.version(str(bad)) == (f"{bad} does not run: broken", "")
    (tmp_path / "text").touch()
    assert await programs.version(f"{tmp_path}/text") == (f"{tmp_path}/text is not executable", "")
    assert await programs.version(f"{tmp_path}/none") == (f"{tmp_path}/none is missing", "")
    (tmp_path / "nonsense").write_text("no program")
    (tmp_path / "nonsense").chmod(0o755)
    assert (await programs.version(f"{tmp_path}/nonsense"))[1] == ""


async def test_crun_is_known_by_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the handler is called."""
    monkeypatch.setattr(cgroups, "hybrid_controllers", lambda: ["hugetlb"])
    crun = HandlerSettings(path=str(program(tmp_path / "fast", "echo crun version 1.8.1")))
    found = await programs.runtime("fast", crun, is_default=True)
    assert [(item.name, item.verdict) for item in found] == [
        ("runtime fast (default)", "ok"),
        ("crun with hybrid cgroups", "missing"),
    ]
    assert (
        len(await programs.runtime("runc", HandlerSettings(path=str(program(tmp_path / "runc"))), is_default=True)) == 1
    )


async def test_missing_runtimes() -> None:
    """Only the default one is needed."""
    assert [item.verdict for item in await programs.runtime("runc", HandlerSettings(), is_default=True)] == ["missing"]
    other = HandlerSettings(path="/nonexistent/other")
    assert [item.verdict for item in await programs.runtime("other", other, is_default=False)] == ["warning"]


def elf_program(loader: str = "") -> bytes:
    """A 64-bit program header table with one entry, and the name that it points to."""
    name = f"{loader}\0".encode()
    header = b"\x7fELF\x02\x01\x01".ljust(0x20, b"\0") + struct.pack("<Q", 64) + bytes(0x36 - 0x28)
    header += struct.pack("<HH", 56, 1) + bytes(64 - 0x3A)
    entry = struct.pack("<IIQQQQQQ", 3 if loader else 1, 4, 120, 0, 0, len(name), len(name), 1)
    return header + entry + name


def test_interpreter(tmp_path: Path) -> None:
    """The loader is read from the program headers."""
    for data, expected in ((elf_program("/lib/ld.so"), "/lib/ld.so"), (elf_program(), "")):
        (tmp_path / "program").write_bytes(data)
        assert elf.interpreter(tmp_path / "program") == expected
    for data in (b"", b"#!/bin/sh\n", elf_program()[:20], b"\x7fELF\x09"):
        (tmp_path / "program").write_bytes(data)
        with pytest.raises(HostFailure, match="is not an ELF program"):
            elf.interpreter(tmp_path / "program")
    with pytest.raises(HostFailure, match="no such file"):
        elf.interpreter(tmp_path / "none")


def test_holder_is_static(tmp_path: Path) -> None:
    """In its root there is no library to load. It is a warning: few pods need it."""
    path = tmp_path / "init"
    path.write_bytes(elf_program("/lib/ld.so"))
    path.chmod(0o755)
    assert (programs.holder(str(path)).verdict, programs.holder(str(path)).found) == (
        "warning",
        f"{path} is not static",
    )
    path.write_bytes(elf_program())
    assert programs.holder(str(path)).verdict == "ok"
    assert programs.holder(str(tmp_path / "none")).verdict == "warning"


def net(*plugins: dict[str, Any]) -> NetworkConfig:
    """A network of these plugins."""
    return NetworkConfig("net", "1.0.0", plugins)


def test_plugins_and_their_ipam() -> None:
    """Each program once, also those that give addresses."""
    config = net(
        {"type": "bridge", "ipam": {"type": "host-local"}}, {"type": "portmap"}, {"type": "tuning", "ipam": {}}
    )
    assert network.programs(config) == ["bridge", "portmap", "tuning", "host-local"]


@pytest.mark.parametrize(
    ("part", "verdict"),
    [
        ({"type": "bridge", "ipMasq": True}, "missing"),
        ({"type": "bridge", "ipMasq": True, "ipMasqBackend": "nftables"}, None),
        ({"type": "bridge"}, None),
        ({"type": "portmap"}, "warning"),
        ({"type": "portmap", "backend": "nftables"}, None),
        ({"type": "firewall"}, "missing"),
    ],
)
def test_iptables(part: dict[str, Any], verdict: str | None) -> None:
    """Needed where a plugin runs it for every pod; not spoken of where none does."""
    assert [item.verdict for item in network.iptables(net(part), None)] == ([verdict] if verdict else [])
    assert all(item.ok for item in network.iptables(net(part), "/usr/sbin/iptables"))


def test_plugin_must_be_executable(tmp_path: Path) -> None:
    """A file is not enough."""
    (tmp_path / "bridge").touch(mode=0o644)
    assert network.plugin("bridge", [str(tmp_path)]).verdict == "missing"
    (tmp_path / "bridge").chmod(0o755)
    assert network.plugin("bridge", [str(tmp_path)]).verdict == "ok"
    assert network.plugin("ptp", ["/a", "/b"]).found == "not in /a, /b"


def test_directories(tmp_path: Path) -> None:
    """One that is not there yet is judged by what is above it, and not made."""
    assert files.existing(tmp_path / "a" / "b") == tmp_path
    found = files.writable("root", tmp_path / "a" / "b")
    assert (found.ok, found.found) == (True, f"{tmp_path}/a/b, to be made in {tmp_path}")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    assert files.writable("root", tmp_path / "file").found == f"{tmp_path}/file is not a directory"
    assert files.writable("root", tmp_path / "file" / "below").verdict == "missing"
    assert not files.space("root", tmp_path).needed


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (2 << 30, "2.1 GB"), (3 << 40, "3.3 TB")]
)
def test_sizes_in_words(count: int, words: str) -> None:
    """Decimal units, as on disks."""
    assert files.in_words(count) == words


def test_image_settings(tmp_path: Path) -> None:
    """Absent files are fine where they may be absent; decisions of a policy are no errors."""
    absent = ImageSettings(registries_conf=str(tmp_path / "none"), policy=str(tmp_path / "none"))
    assert files.registries_conf(absent).verdict == "ok"
    assert files.policy(absent).verdict == "missing"
    (tmp_path / "policy").write_text('{"default": [{"type": "reject"}]}')
    assert files.policy(ImageSettings(policy=str(tmp_path / "policy"))).verdict == "ok"
    (tmp_path / "policy").write_text('{"default": {}}')
    assert files.policy(ImageSettings(policy=str(tmp_path / "policy"))).verdict == "missing"
    (tmp_path / "conf").write_text("[[registry]]\nprefx = 1")
    assert "prefx" in files.registries_conf(ImageSettings(registries_conf=str(tmp_path / "conf"))).found


def test_other_daemon(tmp_path: Path) -> None:
    """Known by its lock, which is not touched."""
    database = tmp_path / "crishim.db"
    assert files.holder_of(database).found == "none"
    lock = tmp_path / "crishim.lock"
    lock.touch()
    seen = lock.stat()
    device = f"{os.major(seen.st_dev):02x}:{os.minor(seen.st_dev):02x}"
    locks = tmp_path / "locks"
    locks.write_text(
        f"1: POSIX  ADVISORY  READ 11 {device}:{seen.st_ino} 128 128\n"
        f"2: FLOCK  ADVISORY  WRITE 4711 {device}:{seen.st_ino} 0 EOF\n"
    )
    assert files.holder_of(database, locks).found == "process 4711 uses this root"
    assert files.holder_of(database, locks).ok
    locks.write_text(f"2: FLOCK  ADVISORY  WRITE 4711 {device}:{seen.st_ino + 1} 0 EOF\n")
    assert files.holder_of(database, locks).found == "none"
