"""Signals by the names that images use and by the CRI's enum."""

from __future__ import annotations

import re
import signal

from crishim.errors import InvalidArgument

CRI_NAMES = (
    "RUNTIME_DEFAULT", "SIGABRT", "SIGALRM", "SIGBUS", "SIGCHLD", "SIGCLD", "SIGCONT", "SIGFPE", "SIGHUP",
    "SIGILL", "SIGINT", "SIGIO", "SIGIOT", "SIGKILL", "SIGPIPE", "SIGPOLL", "SIGPROF", "SIGPWR", "SIGQUIT",
    "SIGSEGV", "SIGSTKFLT", "SIGSTOP", "SIGSYS", "SIGTERM", "SIGTRAP", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGURG",
    "SIGUSR1", "SIGUSR2", "SIGVTALRM", "SIGWINCH", "SIGXCPU", "SIGXFSZ", "SIGRTMIN",
    *(f"SIGRTMINPLUS{count}" for count in range(1, 16)),
    *(f"SIGRTMAXMINUS{count}" for count in range(14, 0, -1)),
    "SIGRTMAX",
)  # fmt: skip
"""Names in the order of the CRI's enum ``Signal``."""

_REALTIME = re.compile(r"(RTMIN|RTMAX)(?:(?:PLUS|\+|MINUS|-)(\d+))?")


def parse(text: str) -> int:
    """The number of ``SIGTERM``, ``TERM``, ``15``, ``SIGRTMIN+3`` or the CRI's ``SIGRTMINPLUS3``."""
    name = text.strip().upper().removeprefix("SIG")
    number = int(name) if name.isdecimal() else _by_name(name)
    if number is None or not 1 <= number <= signal.SIGRTMAX:
        raise InvalidArgument(f"unknown signal {text!r}")
    return number


def from_cri(value: int) -> int:
    """The number of a value of the enum; 0 stays 0 (the image or the runtime decides)."""
    if not 0 <= value < len(CRI_NAMES):
        raise InvalidArgument(f"unknown stop_signal {value}")
    return parse(CRI_NAMES[value]) if value else 0


def to_cri(number: int) -> int:
    """The value of the enum for a number; the first name where there are several."""
    return next((value for value in range(1, len(CRI_NAMES)) if from_cri(value) == number), 0)


def _by_name(name: str) -> int | None:
    realtime = _REALTIME.fullmatch(name)
    if realtime:
        count = int(realtime[2] or 0)
        return int(signal.SIGRTMIN) + count if realtime[1] == "RTMIN" else int(signal.SIGRTMAX) - count
    found = signal.__dict__.get(f"SIG{name}")
    return int(found) if isinstance(found, signal.Signals) else None
