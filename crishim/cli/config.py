"""``crishim config``: the settings in force."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click
import msgspec

from crishim.cli.options import with_config
from crishim.config.settings import Config, effective_handlers


@click.command()
@click.option("--json", "as_json", is_flag=True, help="as JSON instead of TOML")
@with_config
def config(settings: Config, as_json: bool) -> None:
    """Print the settings in force: defaults, file, drop-ins and flags together."""
    runtime = msgspec.structs.replace(settings.runtime, handlers=effective_handlers(settings.runtime))
    values = msgspec.to_builtins(msgspec.structs.replace(settings, runtime=runtime))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(values), indent=2).decode())
    else:
        click.echo("\n".join(_toml(values)))


def _toml(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Scalars first, then tables: TOML's order."""
    for name, value in values.items():
        if not isinstance(value, dict):
            yield f"{name} = {msgspec.json.encode(value).decode()}"
    for name, value in values.items():
        if isinstance(value, dict):
            yield ""
            yield f"[{prefix}{name}]"
            yield from _toml(value, f"{prefix}{name}.")
