"""One flag for every configuration key: ``api.listen`` is ``--api-listen``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_origin

import click

from crishim.config.load import keys, load


def with_config(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give ``command`` the options ``--config`` and one per key; it gets the loaded configuration."""

    @functools.wraps(command)
    def run(config_file: Path | None, **flags: Any) -> Any:
        own = {name: value for name, value in flags.items() if not name.startswith("key_")}
        given = {
            key: list(value) if isinstance(value, tuple) else value
            for key, name in _names().items()
            if (value := flags[name]) not in (None, ())
        }
        return command(load(config_file, given), **own)

    wrapped: Callable[..., Any] = run
    for key, kind, default in reversed(list(keys())):
        is_list = get_origin(kind) is list
        wrapped = click.option(
            f"--{key.replace('.', '-').replace('_', '-')}",
            f"key_{key.replace('.', '_')}",
            type=str if is_list else kind,
            multiple=is_list,
            default=None,
            help=f"{key} (default: {_shown(default)})",
        )(wrapped)
    return click.option(
        "--config", "config_file", type=click.Path(path_type=Path), help="configuration file; drop-ins in FILE.d"
    )(wrapped)


def _names() -> dict[str, str]:
    return {key: f"key_{key.replace('.', '_')}" for key, _, _ in keys()}


def _shown(default: Any) -> str:
    return ", ".join(default) if isinstance(default, list) else str(default) or "none"
