"""``crishim demo``: a pod from nothing, beside whatever else the machine runs."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import dataclass, field

import click

from crishim.cli.check import lines
from crishim.cli.options import with_config
from crishim.cli.requirements.survey import examine
from crishim.cli.showcase import cleaning, daemon, place
from crishim.cli.showcase.narrator import Narrator
from crishim.cli.showcase.place import Place
from crishim.cli.showcase.story import Story
from crishim.config.settings import Config
from crishim.errors import CrishimError, HostFailure

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TAIL = 20


@click.command()
@with_config
def demo(settings: Config) -> None:
    """Run one pod, show every step, and leave nothing behind.

    Everything is the demo's own: daemon, directories, socket, registry, image, bridge and subnet. A kubelet, a
    containerd or a Docker on the same machine is not disturbed. Settings decide which programs are used.
    """
    if os.geteuid() != 0:
        raise HostFailure("the demo makes namespaces, mounts and a bridge: run it as root")
    sys.exit(asyncio.run(_demo(settings)))


@dataclass
class _Outcome:
    status: int = 0
    failure: str = ""
    log: list[str] = field(default_factory=list)
    signals: list[int] = field(default_factory=list)


async def _demo(settings: Config) -> int:
    """The first signal ends the story; cleaning up after it is not interrupted by more of them."""
    narrator, outcome = Narrator(), _Outcome()
    telling = asyncio.ensure_future(_perform(settings, narrator, outcome))
    loop = asyncio.get_running_loop()
    for signum in _SIGNALS:
        loop.add_signal_handler(signum, outcome.signals.append, signum)
    await telling
    if outcome.failure:
        await _explain(settings, outcome)
    elif outcome.status == 0:
        click.echo(f"\nA pod ran on this machine: {narrator.steps} steps in {narrator.seconds:.1f} s, nothing is left.")
    return outcome.status


async def _perform(settings: Config, narrator: Narrator, outcome: _Outcome) -> None:
    try:
        where = place.make(settings)
    except CrishimError as err:
        outcome.status, outcome.failure = 1, err.message
        return
    click.echo(f"A pod from nothing, in {where.root} and {where.state}:\n")
    story = asyncio.ensure_future(Story(where, settings, narrator).tell())
    try:
        await _interruptible(story, outcome)
    except CrishimError as err:
        outcome.status, outcome.failure = 1, err.message
        outcome.log = list(daemon.log_tail(where, _TAIL))
    finally:
        await _clean(where, narrator, outcome)


async def _interruptible(story: asyncio.Future[None], outcome: _Outcome) -> None:
    loop = asyncio.get_running_loop()

    def interrupt(signum: int) -> None:
        if not outcome.signals:
            story.cancel()
        outcome.signals.append(signum)

    for signum in _SIGNALS:
        loop.add_signal_handler(signum, interrupt, signum)
    try:
        await story
    except asyncio.CancelledError:
        outcome.status = 128 + outcome.signals[0]


async def _clean(where: Place, narrator: Narrator, outcome: _Outcome) -> None:
    with narrator.step("Removing the demo's own things") as result:
        failures = await cleaning.clean(where)
        result("bridge, cgroup and directories" if not failures else "; ".join(failures))
    if failures:
        outcome.status, outcome.failure = 1, outcome.failure or f"some things are left: {'; '.join(failures)}"


async def _explain(settings: Config, outcome: _Outcome) -> None:
    click.echo(click.style(f"\nThe demo failed: {outcome.failure}", fg="red"))
    if outcome.log:
        click.echo("\nThe daemon's last words:")
        for line in outcome.log:
            click.echo(f"  {line}")
    wrong = [item for item in await examine(settings) if not item.ok]
    click.echo("\nWhat crishim check finds wrong:" if wrong else "\ncrishim check finds nothing wrong.")
    for line in lines(wrong):
        click.echo(f"  {line}")
