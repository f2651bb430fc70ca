"""The system calls that Python's standard library does not offer, through libc.

Every function raises :class:`OSError` with the kernel's errno. Calls release the interpreter lock.
Numbers are those of the asm-generic table, which x86-64 and arm64 share for all calls made after 2019;
sources: mount(2), umount2(2), unshare(2), setns(2), openat2(2), prctl(2), syncfs(2).
"""

from __future__ import annotations

import ctypes
import errno
import os

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MS_SLAVE = 0x80000
MS_SHARED = 0x100000

MNT_DETACH = 0x2
UMOUNT_NOFOLLOW = 0x8

CLONE_FS = 0x200
CLONE_NEWNS = 0x20000
CLONE_NEWUTS = 0x4000000
CLONE_NEWPID = 0x20000000
CLONE_NEWIPC = 0x8000000
CLONE_NEWNET = 0x40000000

PR_SET_PDEATHSIG = 1
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

_SYS_OPENAT2 = 437
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41}
_SYS_SETRESUID = {"x86_64": 117, "aarch64": 147, "riscv64": 147}
_SYS_SETRESGID = {"x86_64": 119, "aarch64": 149, "riscv64": 149}
_SYS_SETGROUPS = {"x86_64": 116, "aarch64": 159, "riscv64": 159}

_libc = ctypes.CDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


def _check(result: int, *names: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), *names[:1])
    return result


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """Mount ``source`` on ``target``; ``data`` is the comma-separated option string of the file system."""
    _check(
        _libc.mount(
            os.fsencode(source),
            os.fsencode(target),
            fstype.encode() or None,
            ctypes.c_ulong(flags),
            os.fsencode(data) or None,
        ),
        target,
    )


def umount(target: str, flags: int = 0) -> None:
    """Unmount what is on ``target``."""
    _check(_libc.umount2(os.fsencode(target), flags), target)


def unshare(flags: int) -> None:
    """Give the calling thread new namespaces or a working directory of its own."""
    _check(_libc.unshare(flags))


def setns(fd: int, kind: int) -> None:
    """Move the calling thread into the namespace that ``fd`` stands for."""
    _check(_libc.setns(fd, kind))


def prctl(option: int, value: int = 0) -> None:
    """Set an attribute of the calling process."""
    _check(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0))


def syncfs(fd: int) -> None:
    """Write all dirty data of the file system of ``fd`` to its device."""
    _check(_libc.syncfs(fd))


def openat2(dir_fd: int, path: str | bytes, flags: int, *, mode: int = 0, resolve: int = 0) -> int:
    """Open ``path`` below ``dir_fd`` under the ``RESOLVE_*`` rules; the result is a new descriptor."""
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    while True:
        result = _libc.syscall(
            _SYS_OPENAT2, dir_fd, os.fsencode(path), ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how))
        )
        if result >= 0 or ctypes.get_errno() != errno.EAGAIN:  # something was renamed meanwhile
            return _check(result, os.fsdecode(path))


def pivot_to(root: str | os.PathLike[str]) -> None:
    """Make ``root`` all that the calling thread, in a mount namespace of its own, can see: pivot_root(2)."""
    path = os.fspath(root)
    mount("", "/", "", MS_REC | MS_PRIVATE)
    mount(path, path, "", MS_BIND)
    mount("", path, "", MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir(path)
    _check(_libc.syscall(_number(_SYS_PIVOT_ROOT), b".", b"."), path)
    umount(".", MNT_DETACH)
    os.chdir("/")


def become_in_thread(user: int) -> None:
    """Make the calling thread alone, and what it starts, run as ``user`` without groups and capabilities.

    libc's own functions would change all threads of the process: nptl(7).
    """
    _check(_libc.syscall(_number(_SYS_SETGROUPS), 0, None))
    _check(_libc.syscall(_number(_SYS_SETRESGID), user, user, user))
    _check(_libc.syscall(_number(_SYS_SETRESUID), user, user, user))


def _number(table: dict[str, int]) -> int:
    machine = os.uname().machine
    if machine not in table:
        raise OSError(errno.ENOSYS, f"unknown system call numbers of {machine}")
    return table[machine]


class _CapHeader(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _CapData(ctypes.Structure):
    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]


_CAP_VERSION_3 = 0x20080522


def set_capabilities(mask: int) -> None:
    """Make ``mask`` the effective and permitted set of the calling thread, nothing inheritable: capset(2)."""
    header = _CapHeader(_CAP_VERSION_3, 0)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    data = (_CapData * 2)(_CapData(low, low, 0), _CapData(high, high, 0))
    _check(_libc.capset(ctypes.byref(header), ctypes.byref(data)))
