"""Who a container runs as: from the CRI's security context, the image's USER, and the image's own files."""

from __future__ import annotations

from dataclasses import dataclass

from crishim.errors import InvalidArgument
from crishim.model.cri import LinuxContainerSecurityContext, LinuxContainerUser, SupplementalGroupsPolicy

_MAX_ID = 2**32 - 2


@dataclass(frozen=True)
class Account:
    """A line of passwd(5)."""

    name: str
    uid: int
    gid: int
    home: str


@dataclass(frozen=True)
class AccountFiles:
    """/etc/passwd and /etc/group of an image, parsed; lines that are not well formed do not count."""

    accounts: tuple[Account, ...]
    groups: tuple[tuple[str, int, tuple[str, ...]], ...]

    @classmethod
    def parse(cls, passwd: bytes | None, group: bytes | None) -> AccountFiles:
        """Read both files; either may be missing."""
        accounts = tuple(
            Account(parts[0], int(parts[2]), int(parts[3]), parts[5])
            for parts in _rows(passwd)
            if len(parts) >= 6 and _is_number(parts[2]) and _is_number(parts[3])
        )
        groups = tuple(
            (parts[0], int(parts[2]), tuple(filter(None, parts[3].split(","))))
            for parts in _rows(group)
            if len(parts) >= 4 and _is_number(parts[2])
        )
        return cls(accounts, groups)

    def by_name(self, name: str) -> Account | None:
        """The account of a name."""
        return next((account for account in self.accounts if account.name == name), None)

    def by_uid(self, uid: int) -> Account | None:
        """The first account of a number."""
        return next((account for account in self.accounts if account.uid == uid), None)

    def group_id(self, group: str) -> int:
        """The number of a group given by name or number."""
        if _is_number(group):
            return int(group)
        found = next((gid for name, gid, _ in self.groups if name == group), None)
        if found is None:
            raise InvalidArgument(f"the image has no group {group!r} in /etc/group")
        return found

    def memberships(self, name: str) -> list[int]:
        """The groups that list ``name``."""
        return [gid for _, gid, members in self.groups if name in members]


@dataclass(frozen=True)
class Identity:
    """The result: numbers for the kernel, and the home directory for ``HOME``."""

    user: LinuxContainerUser
    home: str


def resolve(context: LinuxContainerSecurityContext, image_user: str, files: AccountFiles) -> Identity:
    """Decide the identity as the CRI defines it (LinuxContainerSecurityContext in api.proto).

    ``run_as_user`` or ``run_as_username`` replace the image's user; ``run_as_group`` replaces its group.
    The groups of /etc/group are added under the Merge policy, for a user that the files know.
    """
    by_number, by_name = context.run_as_user, context.run_as_username
    if by_number is not None and by_name:
        raise InvalidArgument("run_as_user and run_as_username are both given")
    image_name, _, image_group = image_user.partition(":")
    if by_number is not None:
        user, image_group = str(by_number), ""
    elif by_name:
        user, image_group = by_name, ""
    else:
        user = image_name
    if context.run_as_group is not None and by_number is None and not by_name:
        raise InvalidArgument("run_as_group needs run_as_user or run_as_username")
    account = _account(user or "0", files)
    gid = account.gid
    if context.run_as_group is not None:
        gid = context.run_as_group
    elif image_group:
        gid = files.group_id(image_group)
    groups = [gid]
    if context.supplemental_groups_policy is SupplementalGroupsPolicy.Merge and account.name:
        groups += files.memberships(account.name)
    groups += context.supplemental_groups
    for number in (account.uid, *groups):
        if not 0 <= number <= _MAX_ID:
            raise InvalidArgument(f"user or group number {number} is out of range")
    return Identity(LinuxContainerUser(account.uid, gid, list(dict.fromkeys(groups))), account.home or "/")


def _account(user: str, files: AccountFiles) -> Account:
    if _is_number(user.removeprefix("-")):
        # a number is never a name: an image's account "1000" may well be root
        number = int(user)
        return files.by_uid(number) or Account("", number, 0, "/root" if number == 0 else "/")
    found = files.by_name(user)
    if found is None:
        raise InvalidArgument(f"the image has no user {user!r} in /etc/passwd")
    return found


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 20  # more is no number of anything


def _rows(text: bytes | None) -> list[list[str]]:
    lines = (text or b"").decode(errors="replace").splitlines()
    return [line.split(":") for line in lines if line[:1] != "#"]
