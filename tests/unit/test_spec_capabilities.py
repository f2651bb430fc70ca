"""Capability sets: what is added, dropped and missing."""

from __future__ import annotations

import itertools

import pytest

from crishim.errors import InvalidArgument
from crishim.model.cri import Capability
from crishim.spec.capabilities import DEFAULT, NAMES, wanted
from crishim.spec.oci import Capabilities

ALL = frozenset(range(41))
EVERY = sorted(f"CAP_{name}" for name in NAMES)
DEFAULT_SET = sorted(f"CAP_{name}" for name in DEFAULT)


def ask(
    add: list[str] | None = None, drop: list[str] | None = None, ambient: list[str] | None = None, *,
    privileged: bool = False, host: frozenset[int] = ALL, root: bool = True,
) -> Capabilities:  # fmt: skip
    """The sets for a change."""
    change = Capability(add or [], drop or [], ambient or [])
    return wanted(change, privileged=privileged, host=host, root=root)


def without(*names: str) -> frozenset[int]:
    """A host that lacks some."""
    return ALL - {NAMES.index(name) for name in names}


KERNEL = """
    0 chown 1 dac_override 2 dac_read_search 3 fowner 4 fsetid 5 kill 6 setgid 7 setuid 8 setpcap
    9 linux_immutable 10 net_bind_service 11 net_broadcast 12 net_admin 13 net_raw 14 ipc_lock 15 ipc_owner
    16 sys_module 17 sys_rawio 18 sys_chroot 19 sys_ptrace 20 sys_pacct 21 sys_admin 22 sys_boot 23 sys_nice
    24 sys_resource 25 sys_time 26 sys_tty_config 27 mknod 28 lease 29 audit_write 30 audit_control 31 setfcap
    32 mac_override 33 mac_admin 34 syslog 35 wake_alarm 36 block_suspend 37 audit_read 38 perfmon 39 bpf
    40 checkpoint_restore
""".split()
"""linux/capability.h."""


def test_numbers_are_those_of_the_kernel() -> None:
    """All 41."""
    assert {str(number): name.lower() for number, name in enumerate(NAMES)} == dict(
        zip(KERNEL[::2], KERNEL[1::2], strict=True)
    )


@pytest.mark.parametrize("change", [None, Capability()])
def test_default(change: Capability | None) -> None:
    """Docker's 14; nothing is inheritable (CVE-2022-24769) or ambient."""
    names = (
        "AUDIT_WRITE CHOWN DAC_OVERRIDE FOWNER FSETID KILL MKNOD NET_BIND_SERVICE NET_RAW SETFCAP SETGID SETPCAP "
        "SETUID SYS_CHROOT"
    ).split()
    expected = [f"CAP_{name}" for name in names]
    found = wanted(change, privileged=False, host=ALL, root=True)
    assert found == Capabilities(bounding=expected, effective=expected, permitted=expected)


@pytest.mark.parametrize("name", ["NET_ADMIN", "CAP_NET_ADMIN", "net_admin", "cap_net_admin"])
def test_add_and_drop_in_any_spelling(name: str) -> None:
    """With or without CAP_, in any case."""
    assert ask(add=[name]).bounding == sorted([*DEFAULT_SET, "CAP_NET_ADMIN"])
    assert ask(add=["NET_ADMIN"], drop=[name]).bounding == DEFAULT_SET


def test_drop_one() -> None:
    """From every set."""
    found = ask(drop=["CHOWN"])
    assert found.bounding == found.effective == found.permitted == [n for n in DEFAULT_SET if n != "CAP_CHOWN"]


@pytest.mark.parametrize(
    ("add", "drop", "expected"),
    [
        (["ALL"], [], EVERY),
        (["CAP_ALL"], [], EVERY),
        (["all"], ["NET_RAW"], [name for name in EVERY if name != "CAP_NET_RAW"]),
        (["ALL", "NET_RAW"], ["NET_RAW"], [name for name in EVERY if name != "CAP_NET_RAW"]),
        ([], ["ALL"], []),
        (["NET_BIND_SERVICE"], ["ALL"], ["CAP_NET_BIND_SERVICE"]),
        (["NET_BIND_SERVICE", "KILL"], ["ALL", "KILL"], ["CAP_NET_BIND_SERVICE"]),
        (["ALL"], ["ALL"], []),
        (["ALL", "KILL"], ["ALL"], ["CAP_KILL"]),
        (["CHOWN"], [], DEFAULT_SET),
        ([], ["SYS_ADMIN"], DEFAULT_SET),
    ],
)
def test_all(add: list[str], drop: list[str], expected: list[str]) -> None:
    """ALL first, then single ones, drops last: the order of CRI-O and containerd."""
    found = ask(add, drop)
    assert found.bounding == found.effective == found.permitted == expected
    assert found.ambient == found.inheritable == []


def test_ambient_is_in_every_set() -> None:
    """For root, besides what it has anyway; otherwise it is what execve(2) leaves."""
    found = ask(ambient=["NET_ADMIN"])
    assert found.bounding == found.effective == found.permitted == sorted([*DEFAULT_SET, "CAP_NET_ADMIN"])
    assert found.ambient == found.inheritable == ["CAP_NET_ADMIN"]
    found = ask(ambient=["NET_ADMIN"], root=False)
    assert found.effective == found.permitted == found.ambient == found.inheritable == ["CAP_NET_ADMIN"]
    assert found.bounding == sorted([*DEFAULT_SET, "CAP_NET_ADMIN"])


def test_ambient_with_drop() -> None:
    """Dropping ALL leaves it; dropping it by name takes it out of every set."""
    found = ask(drop=["ALL"], ambient=["NET_RAW"])
    assert found == Capabilities(*[["CAP_NET_RAW"]] * 5)
    found = ask(drop=["NET_RAW"], ambient=["NET_RAW", "KILL"])
    assert found.ambient == ["CAP_KILL"]
    assert "CAP_NET_RAW" not in found.bounding


def test_ambient_all() -> None:
    """All that there are."""
    assert ask(ambient=["ALL"], root=False) == Capabilities(*[EVERY] * 5)


def test_others_than_root() -> None:
    """Keep the bounding set, for programs with file capabilities, and have nothing effective."""
    found = ask(add=["NET_ADMIN"], root=False)
    assert found.bounding == sorted([*DEFAULT_SET, "CAP_NET_ADMIN"])
    assert found.effective == found.permitted == found.inheritable == found.ambient == []


def test_privileged() -> None:
    """All of the node's, whatever the changes say."""
    expected = Capabilities(bounding=EVERY, effective=EVERY, permitted=EVERY)
    assert ask(privileged=True) == expected
    assert ask(["KILL"], ["ALL"], ["NET_ADMIN"], privileged=True) == expected
    assert ask(ambient=["BPF"], privileged=True, host=without("BPF")).ambient == []


def test_default_ones_that_the_host_lacks() -> None:
    """Are left out: a container that did not ask for them runs."""
    host = without("MKNOD", "AUDIT_WRITE", "BPF")
    expected = [name for name in DEFAULT_SET if name not in ("CAP_MKNOD", "CAP_AUDIT_WRITE")]
    assert ask(host=host).bounding == expected
    assert ask(add=["CHOWN"], host=host).bounding == expected
    assert ask(host=frozenset()) == Capabilities()


@pytest.mark.parametrize(("privileged", "add"), [(True, []), (False, ["ALL"])])
def test_all_is_all_that_the_host_has(privileged: bool, add: list[str]) -> None:
    """The kernel gives no more."""
    found = ask(add, privileged=privileged, host=without("BPF", "SYS_ADMIN"))
    assert found.bounding == [name for name in EVERY if name not in ("CAP_BPF", "CAP_SYS_ADMIN")]


@pytest.mark.parametrize(("add", "ambient"), [(["BPF"], []), ([], ["BPF"]), (["ALL", "BPF"], []), ([], ["ALL", "BPF"])])
def test_requested_one_that_the_host_lacks(add: list[str], ambient: list[str]) -> None:
    """Is refused by name."""
    with pytest.raises(InvalidArgument, match="BPF"):
        ask(add, [], ambient, host=without("BPF"))


def test_requested_and_dropped_one_that_the_host_lacks() -> None:
    """Is not missed."""
    assert ask(["BPF"], ["BPF"], host=without("BPF")).bounding == DEFAULT_SET


@pytest.mark.parametrize("field", [0, 1, 2])
@pytest.mark.parametrize("name", ["NET_ADMINN", "", "CAP_", "cap_cap_kill", "*"])
def test_unknown_names(field: int, name: str) -> None:
    """A typing error in a drop would leave the capability: refused in each list."""
    lists: list[list[str]] = [[], [], []]
    lists[field] = [name]
    with pytest.raises(InvalidArgument, match="unknown capability"):
        ask(*lists)


def test_newer_kernels() -> None:
    """Numbers that we have no name for are left out."""
    assert ask(["ALL"], host=ALL | {41, 63}).bounding == EVERY


def test_sets_keep_the_order_of_inclusion() -> None:
    """Whatever is asked: ambient in inheritable and permitted, effective in permitted, all in bounding."""
    some = [[], ["ALL"], ["KILL"], ["NET_ADMIN", "CHOWN"]]
    for add, drop, ambient, root in itertools.product(some, some, some, (True, False)):
        found = ask(add, drop, ambient, root=root)
        assert set(found.ambient) <= set(found.inheritable) & set(found.permitted)
        assert set(found.effective) <= set(found.permitted) <= set(found.bounding)
        assert not {f"CAP_{name}" for name in drop if name != "ALL"} & set(found.bounding)
