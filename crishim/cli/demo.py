"""``crishim demo``: a pod from nothing, beside whatever else the machine runs."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass

import click

from crishim.cli.check import lines
from crishim.cli.options import with_config
from crishim.cli.requirements.requirement import Requirement
from crishim.cli.requirements.survey import examine
from crishim.cli.showcase import cleaning, daemon, place
from crishim.cli.showcase.narrator import Narrator
from crishim.cli.showcase.place import Place
from crishim.cli.showcase.story import Story
from crishim.config.settings import Config
from crishim.errors import CrishimError, HostFailure
from crishim.host.reaper import become_subreaper

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TAIL = 20


@click.command()
@with_config
def demo(settings: Config) -> None:
    """Run one pod, show every step, and leave nothing behind.

    Everything is the demo's own: daemon, directories, socket, registry, image, bridge and subnet. A kubelet, a
    containerd or a Docker on the same machine is not disturbed. Of the settings, only those count that say which
    programs are used.
    """
    if os.geteuid() != 0:
        raise HostFailure("the demo makes namespaces, mounts and a bridge: run it as root")
    sys.exit(asyncio.run(_demo(settings)))


@dataclass(frozen=True)
class Failure:
    """What went wrong, what the daemon said last, and what is wrong with the host."""

    message: str
    log: Sequence[str] = ()
    wrong: Sequence[Requirement] = ()


class Interruption:
    """Signals end the story, and nothing else: cleaning up after it is not interrupted by more of them."""

    def __init__(self) -> None:
        self.signals: list[int] = []
        self._story: asyncio.Future[None] | None = None
        for signum in _SIGNALS:
            asyncio.get_running_loop().add_signal_handler(signum, self._interrupt, signum)

    def _interrupt(self, signum: int) -> None:
        self.signals.append(signum)
        if self._story is not None:
            self._story.cancel()

    async def ends(self, story: Coroutine[None, None, None]) -> None:
        """Listen to ``story`` to its end or to a signal."""
        self._story = asyncio.ensure_future(story)
        await self._story


_INTERRUPTED = Failure("interrupted")


async def _demo(settings: Config) -> int:
    """The whole performance; its exit status."""
    interruption, narrator = Interruption(), Narrator()
    become_subreaper()  # so that whatever the daemon may leave behind is ours to find
    try:
        where = place.choose(settings)
    except CrishimError as err:
        return _explain(Failure(err.message, wrong=await _wrong(settings)))
    click.echo(f"A pod from nothing, in {where.root} and {where.state}:\n")
    failure = None
    try:
        await interruption.ends(Story(where, settings, narrator).tell())
    except asyncio.CancelledError:
        failure = _INTERRUPTED
    except CrishimError as err:
        failure = await _look_around(where, settings, err)
    finally:
        left = await _clean(where, narrator)
    return _end(narrator, failure, left, interruption.signals)


async def _look_around(where: Place, settings: Config, err: CrishimError) -> Failure:
    """While everything is still there."""
    wrong = await _wrong(place.own_settings(where, settings))
    return Failure(err.message, list(daemon.log_tail(where, _TAIL)), wrong)


async def _wrong(settings: Config) -> list[Requirement]:
    return [item for item in await examine(settings) if not item.ok]


async def _clean(where: Place, narrator: Narrator) -> list[str]:
    with narrator.step("Removing the demo's own things") as result:
        left = await cleaning.clean(where)
        result("; ".join(left) or "bridge, cgroup, directories")
    return left


def _end(narrator: Narrator, failure: Failure | None, left: Sequence[str], signals: Sequence[int]) -> int:
    """The last words, and the exit status."""
    if left:
        click.echo(click.style(f"\nSome things could not be removed: {'; '.join(left)}", fg="red"))
    elif failure is _INTERRUPTED:
        click.echo("\nInterrupted; nothing is left.")
        return 128 + signals[0]
    if failure is not None:
        return _explain(failure)
    if not left:
        click.echo(f"\nA pod ran on this machine: {narrator.steps} steps in {narrator.seconds:.1f} s, nothing is left.")
    return 1 if left else 0


def _explain(failure: Failure) -> int:
    click.echo(click.style(f"\nThe demo failed: {failure.message}", fg="red"))
    if failure.log:
        click.echo("\nThe daemon's last words:")
        for line in failure.log:
            click.echo(f"  {line}")
    click.echo("\nWhat crishim check finds wrong:" if failure.wrong else "\ncrishim check finds nothing wrong.")
    for line in lines(failure.wrong):
        click.echo(f"  {line}")
    return 1
