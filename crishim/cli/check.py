"""``crishim check``: whether this host can run pods, and what to do if it cannot."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import click
import msgspec

from crishim.cli.options import with_config
from crishim.cli.requirements.requirement import Requirement, can_run_pods
from crishim.cli.requirements.survey import examine
from crishim.config.settings import Config

_COLOURS = {"ok": "green", "warning": "yellow", "missing": "red"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="as a JSON list")
@with_config
def check(settings: Config, as_json: bool) -> None:
    """Look at everything that pods need of this host; changes nothing.

    The exit status is 0 if pods can run here, 1 if something that they need is missing.
    """
    found = asyncio.run(examine(settings))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode([asdict(item) for item in found]), indent=2).decode())
    else:
        for line in (*lines(found), "", verdict(found)):
            click.echo(line)  # which leaves colours out where nobody would see them
    sys.exit(0 if can_run_pods(found) else 1)


def lines(found: Sequence[Requirement]) -> Iterator[str]:
    """One aligned line a requirement; advice only where something is to be done."""
    width = max((len(item.name) for item in found), default=0)
    for item in found:
        mark = click.style(f"{item.verdict:7}", fg=_COLOURS[item.verdict])
        advice = f" -> {item.advice}" if item.advice and not item.ok else ""
        yield f"{mark}  {item.name:{width}}  {item.found}{advice}"


def verdict(found: Sequence[Requirement]) -> str:
    """All of it in one sentence."""
    missing = [item.name for item in found if item.verdict == "missing"]
    warnings = sum(item.verdict == "warning" for item in found)
    remark = f", with {warnings} warning{'s' if warnings > 1 else ''}" if warnings else ""
    if missing:
        return f"Pods cannot run on this host: {', '.join(missing)} must be mended first."
    return f"Pods can run on this host{remark}."
