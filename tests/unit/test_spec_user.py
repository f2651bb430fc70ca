"""Who a container runs as: all forms of the image's USER, and what the pod may replace."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crishim.errors import InvalidArgument
from crishim.model.cri import LinuxContainerSecurityContext, LinuxContainerUser, SupplementalGroupsPolicy
from crishim.spec.user import AccountFiles, Identity, resolve

PASSWD = b"""root:x:0:0:root:/root:/bin/bash
daemon:x:1:1::/usr/sbin:/usr/sbin/nologin
www:x:33:34:www:/var/www:/bin/false
second:x:33:50::/second:/bin/false
homeless:x:77:77:::/bin/false
"""
GROUP = b"""root:x:0:
daemon:x:1:www
web:x:34:www,daemon
logs:x:40:www
staff:x:50:second,root
"""
FILES = AccountFiles.parse(PASSWD, GROUP)
NONE = AccountFiles.parse(None, None)
Context = LinuxContainerSecurityContext


def identity(uid: int, gid: int, groups: list[int], home: str) -> Identity:
    """A result."""
    return Identity(LinuxContainerUser(uid, gid, groups), home)


@pytest.mark.parametrize(
    ("user", "wanted"),
    [
        ("", identity(0, 0, [0, 50], "/root")),
        ("root", identity(0, 0, [0, 50], "/root")),
        ("0", identity(0, 0, [0, 50], "/root")),
        ("www", identity(33, 34, [34, 1, 40], "/var/www")),
        ("33", identity(33, 34, [34, 1, 40], "/var/www")),
        ("second", identity(33, 50, [50], "/second")),
        ("www:staff", identity(33, 50, [50, 1, 34, 40], "/var/www")),
        ("www:50", identity(33, 50, [50, 1, 34, 40], "/var/www")),
        ("33:logs", identity(33, 40, [40, 1, 34], "/var/www")),
        ("33:9999", identity(33, 9999, [9999, 1, 34, 40], "/var/www")),
        ("1000", identity(1000, 0, [0], "/")),
        ("1000:1000", identity(1000, 1000, [1000], "/")),
        ("1000:web", identity(1000, 34, [34], "/")),
        ("www:", identity(33, 34, [34, 1, 40], "/var/www")),
        (":web", identity(0, 34, [34, 50], "/root")),
        ("homeless", identity(77, 77, [77], "/")),
    ],
)
def test_user_of_the_image(user: str, wanted: Identity) -> None:
    """USER is NAME or NUMBER, then perhaps a group by name or number."""
    assert resolve(Context(), user, FILES) == wanted


@pytest.mark.parametrize(
    ("user", "uid", "gid"), [("", 0, 0), ("0:0", 0, 0), ("1000", 1000, 0), ("1000:2000", 1000, 2000)]
)
def test_image_without_account_files(user: str, uid: int, gid: int) -> None:
    """An image from scratch runs under numbers."""
    assert resolve(Context(), user, NONE) == identity(uid, gid, [gid], "/" if uid else "/root")


@pytest.mark.parametrize("user", ["nobody", "nobody:0", "-", "0x10", "1000 ", "\u0661", "--5", "9" * 5000, "1e3"])
def test_unknown_user_of_the_image(user: str) -> None:
    """What is no number must be a name in /etc/passwd, in ASCII digits or not at all."""
    with pytest.raises(InvalidArgument, match="the image has no user"):
        resolve(Context(), user, FILES)


@pytest.mark.parametrize("user", ["root:nogroup", "1000:x", "0:\u0661", "0:" + "9" * 5000])
def test_unknown_group_of_the_image(user: str) -> None:
    """The same for groups."""
    with pytest.raises(InvalidArgument, match="the image has no group"):
        resolve(Context(), user, FILES)


@pytest.mark.parametrize("user", ["-1", "4294967295", "4294967296", "0:4294967295", "18446744073709551616"])
def test_numbers_out_of_range(user: str) -> None:
    """2^32-1 means "leave it" to setuid(2): it would run as root. Larger ones would be cut off."""
    with pytest.raises(InvalidArgument, match="out of range"):
        resolve(Context(), user, FILES)


@pytest.mark.parametrize(
    "context",
    [
        Context(run_as_user=-1),
        Context(run_as_user=2**32),
        Context(run_as_user=2**63 - 1),
        Context(run_as_user=1, run_as_group=-1),
        Context(run_as_user=1, run_as_group=2**32 - 1),
        Context(supplemental_groups=[-5]),
    ],
)
def test_requested_numbers_out_of_range(context: LinuxContainerSecurityContext) -> None:
    """From the pod as well."""
    with pytest.raises(InvalidArgument, match="out of range"):
        resolve(context, "", FILES)


def test_largest_number() -> None:
    """One below is fine."""
    assert resolve(Context(run_as_user=2**32 - 2), "", FILES).user.uid == 2**32 - 2


def test_run_as_user() -> None:
    """Replaces the image's user and its group; the group is then that of /etc/passwd, else 0."""
    assert resolve(Context(run_as_user=33), "root:staff", FILES) == identity(33, 34, [34, 1, 40], "/var/www")
    assert resolve(Context(run_as_user=1000), "www:staff", FILES) == identity(1000, 0, [0], "/")
    assert resolve(Context(run_as_user=0), "www", FILES).user.uid == 0


def test_run_as_username() -> None:
    """Looked up in the image, which must have it."""
    assert resolve(Context(run_as_username="www"), "root:staff", FILES) == identity(33, 34, [34, 1, 40], "/var/www")
    with pytest.raises(InvalidArgument, match="'nobody'"):
        resolve(Context(run_as_username="nobody"), "", FILES)
    with pytest.raises(InvalidArgument, match="'www'"):
        resolve(Context(run_as_username="www"), "", NONE)


def test_run_as_user_and_username() -> None:
    """Only one may be given, even if they agree."""
    with pytest.raises(InvalidArgument, match="run_as_user and run_as_username"):
        resolve(Context(run_as_user=33, run_as_username="www"), "", FILES)


def test_run_as_group() -> None:
    """Replaces the group of whoever it is, and need not be in /etc/group."""
    assert resolve(Context(run_as_user=33, run_as_group=9), "", FILES) == identity(33, 9, [9, 1, 34, 40], "/var/www")
    assert resolve(Context(run_as_username="www", run_as_group=0), "", FILES).user.gid == 0
    assert resolve(Context(run_as_user=1000, run_as_group=0), "www", FILES).user.gid == 0


@pytest.mark.parametrize("group", [0, 5])
def test_run_as_group_alone(group: int) -> None:
    """An error, even where the image names a user."""
    with pytest.raises(InvalidArgument, match="run_as_group needs run_as_user"):
        resolve(Context(run_as_group=group), "www", FILES)


def test_merge_adds_the_groups_of_the_image() -> None:
    """Main group first, those of the image, those of the pod; each one once."""
    context = Context(run_as_user=33, supplemental_groups=[7, 40, 7])
    assert resolve(context, "", FILES).user.supplemental_groups == [34, 1, 40, 7]


def test_strict_has_only_the_groups_of_the_pod() -> None:
    """Whoever wrote the image's /etc/group has no say; the main group still counts."""
    context = Context(
        run_as_user=33, supplemental_groups=[7], supplemental_groups_policy=SupplementalGroupsPolicy.Strict
    )
    assert resolve(context, "", FILES).user == LinuxContainerUser(33, 34, [34, 7])
    strict = Context(supplemental_groups_policy=SupplementalGroupsPolicy.Strict)
    assert resolve(strict, "www:staff", FILES).user == LinuxContainerUser(33, 50, [50])


def test_numbers_are_never_names() -> None:
    """An image whose account "1000" is root does not make a pod that must not be root run as root."""
    files = AccountFiles.parse(b"1000:x:0:0::/root:/bin/sh\nme:x:1001:1001::/me:\n", b"1000:x:0:me\n2000:x:0:\n")
    assert resolve(Context(run_as_user=1000), "", files).user.uid == 1000
    assert resolve(Context(), "1000", files).user.uid == 1000
    assert resolve(Context(), "me:2000", files).user.gid == 2000


def test_broken_lines_do_not_count() -> None:
    """Comments, NIS entries, missing fields and numbers that are none are skipped; the rest is read."""
    files = AccountFiles.parse(
        b"#root:x:5:5::/x:\n\n+::::::\nshort:x:1:1\nbad:x:one:1::/x:\nhuge:x:" + b"9" * 5000 + b":1::/x:\n"
        b"minus:x:-1:0::/x:\n\xff\xfe:x:3:3::/x:\nroot:x:0:0::/root",
        b"#x:x:1:\nshort:x:1\nbad:x:g:root\n\nok:x:9:,root,,other",
    )
    assert {account.name for account in files.accounts} == {"root", "\ufffd\ufffd"}
    assert [group[:2] for group in files.groups] == [("ok", 9)]
    assert resolve(Context(), "", files) == identity(0, 0, [0, 9], "/root")


def test_the_first_account_of_a_number_counts() -> None:
    """As getpwuid(3) has it."""
    assert resolve(Context(run_as_user=33), "", FILES).home == "/var/www"


@given(st.binary(max_size=200), st.binary(max_size=200), st.text(max_size=20))
def test_files_of_an_image_are_any_bytes(passwd: bytes, group: bytes, user: str) -> None:
    """Whatever an image holds, the answer is an identity or a refusal."""
    try:
        found = resolve(Context(), user, AccountFiles.parse(passwd, group)).user
    except InvalidArgument:
        return
    assert 0 <= found.uid < 2**32 - 1
    assert found.gid in found.supplemental_groups


ROWS = st.builds(
    "{}:x:{}:{}::{}:/bin/sh".format,
    st.sampled_from(["root", "a", "7", "-7", ""]), st.sampled_from(["0", "7", "-7", "x", "4294967296"]),
    st.sampled_from(["0", "7", ""]), st.sampled_from(["", "/h"]),
)  # fmt: skip


@given(st.lists(ROWS, max_size=4), st.sampled_from([None, 0, 7, 8]))
def test_run_as_user_is_what_it_says(rows: list[str], uid: int | None) -> None:
    """A given number is the number that the process gets, whatever the image says."""
    files = AccountFiles.parse("\n".join(rows).encode(), None)
    try:
        found = resolve(Context(run_as_user=uid), "7", files).user
    except InvalidArgument:
        return
    assert found.uid == (7 if uid is None else uid)
