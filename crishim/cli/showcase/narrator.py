"""Tells the story on the terminal: a line a step, what came of it, how long it took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator

import click

_TITLE, _RESULT, _TIME = 41, 42, 9


class Narrator:
    """Prints steps as they begin and end."""

    def __init__(self) -> None:
        self.steps = 0
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """How long the story has lasted."""
        return time.perf_counter() - self._began

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[Callable[[str], None]]:
        """A step; the body is given a function that takes what came of it."""
        results: list[str] = []
        began = time.perf_counter()
        _say(f"  {title + ' …':{_TITLE}} ", nl=False)
        try:
            yield results.append
        except BaseException as err:
            _say(click.style("failed" if isinstance(err, Exception) else "interrupted", fg="red"))
            raise
        took = f"{(time.perf_counter() - began) * 1e3:.0f} ms"
        _say(f"{', '.join(results):{_RESULT}} {took:>{_TIME}}")
        self.steps += 1

    def quote(self, lines: Iterable[str]) -> None:
        """What somebody else said, set off."""
        for line in lines:
            _say(click.style(f"      | {line}", dim=True))


def _say(text: str, *, nl: bool = True) -> None:
    """A story whose listener has gone (a closed pipe, a lost terminal) is still told to its end, which cleans up."""
    with contextlib.suppress(OSError):
        click.echo(text, nl=nl)
