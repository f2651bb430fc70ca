"""Reads the settings: file, then drop-ins in order, then flags; the last one to set a key wins."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import msgspec

from crishim.config.settings import Config, Settings, effective_handlers
from crishim.errors import ConfigError

DEFAULT_FILE = Path("/etc/crishim/crishim.toml")


def load(file: Path | None, flags: Mapping[str, Any] | None = None) -> Config:
    """The settings from ``file`` (default: :data:`DEFAULT_FILE`, which may be absent) and its drop-ins.

    ``flags`` maps dotted keys such as ``api.listen`` to values. Errors are :class:`ConfigError` and name
    the file and the key.
    """
    merged: dict[str, Any] = {}
    for path in _files(file):
        data = _read(path)
        _check_names(data, Config, str(path))
        _convert(data, str(path))
        _merge(merged, data)
    for key, value in (flags or {}).items():
        _set(merged, key.split("."), value)
    config = _convert(merged, "flags")
    _check_values(config)
    return config


def keys(section: type[Settings] = Config, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every dotted key that has a flag, with its type and default."""
    hints = get_type_hints(section)
    for info in msgspec.structs.fields(section):
        kind = hints[info.name]
        if isinstance(kind, type) and issubclass(kind, Settings):
            yield from keys(kind, f"{prefix}{info.name}.")
        elif get_origin(kind) is not dict:
            default = info.default if info.default is not msgspec.NODEFAULT else info.default_factory()
            yield f"{prefix}{info.name}", kind, default


def _files(file: Path | None) -> list[Path]:
    main = file or DEFAULT_FILE
    if file is not None and not main.exists():
        raise ConfigError(f"configuration file {main} does not exist")
    drop_ins = sorted(Path(f"{main}.d").glob("*.toml"))
    return [*([main] if main.exists() else []), *drop_ins]


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as err:
        raise ConfigError(f"{path}: {_lower(err.strerror or str(err))}") from err
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as err:
        raise ConfigError(f"{path}: {_lower(str(err))}") from err


def _convert(data: Mapping[str, Any], where: str) -> Config:
    try:
        return msgspec.convert(data, Config)
    except msgspec.ValidationError as err:
        raise ConfigError(f"{where}: {_lower(str(err))}") from err


def _check_names(data: Mapping[str, Any], section: type[Settings], where: str, prefix: str = "") -> None:
    hints = get_type_hints(section)
    for name, value in data.items():
        if name not in hints:
            close = difflib.get_close_matches(name, hints, n=1, cutoff=0.5)
            hint = f", did you mean {prefix}{close[0]}" if close else f", known are {', '.join(hints)}"
            raise ConfigError(f"{where}: unknown key {prefix}{name}{hint}")
        for kind, sub, path in _sections(hints[name], value, f"{prefix}{name}."):
            _check_names(sub, kind, where, path)


def _sections(kind: Any, value: Any, prefix: str) -> Iterator[tuple[type[Settings], dict[str, Any], str]]:
    """The parts of ``value`` that are sections themselves: the section, or each one of a table of them."""
    if not isinstance(value, dict):
        return
    if isinstance(kind, type) and issubclass(kind, Settings):
        yield kind, value, prefix
    elif get_origin(kind) is dict:
        inner = get_args(kind)[1]
        for name, sub in value.items():
            yield from _sections(inner, sub, f"{prefix}{name}.")


def _merge(into: dict[str, Any], data: Mapping[str, Any]) -> None:
    for name, value in data.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value


def _set(into: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        into = into.setdefault(name, {})
    into[path[-1]] = value


def _check_values(config: Config) -> None:
    runtime = config.runtime
    _one_of("runtime.cgroup_manager", runtime.cgroup_manager, ("auto", "cgroupfs", "systemd"))
    _one_of("log.level", config.log.level, ("debug", "info", "warning", "error"))
    _one_of("log.format", config.log.format, ("text", "json"))
    handlers = effective_handlers(runtime)
    for name, handler in runtime.handlers.items():
        if handler.path and not handler.path.startswith("/"):
            raise ConfigError(f"runtime.handlers.{name}.path {handler.path!r} is not absolute")
    if handlers and runtime.default not in handlers:
        raise ConfigError(
            f"runtime.default names {runtime.default!r}, which is no runtime handler; known are {', '.join(handlers)}"
        )
    for key in ("root", "state"):
        if not getattr(config, key).startswith("/"):
            raise ConfigError(f"{key} {getattr(config, key)!r} is not an absolute path")
    _positive(config)


def _positive(config: Config) -> None:
    image, api = config.image, config.api
    for key, number in (
        ("image.parallel_layers", image.parallel_layers),
        ("image.max_layer_bytes", image.max_layer_bytes),
        ("image.max_layer_entries", image.max_layer_entries),
        ("image.stall_seconds", image.stall_seconds),
        ("network.plugin_timeout", config.network.plugin_timeout),
        ("api.max_message_bytes", api.max_message_bytes),
        ("api.stream_idle_timeout", api.stream_idle_timeout),
        ("api.stream_creation_timeout", api.stream_creation_timeout),
    ):
        if not number > 0:  # nan is neither
            raise ConfigError(f"{key} must be more than 0, not {number}")
    if not 0 <= api.stream_port <= 65535:
        raise ConfigError(f"api.stream_port {api.stream_port} is not a port")
    _one_of("api.stream_tls_min_version", api.stream_tls_min_version, ("1.2", "1.3"))
    if bool(api.stream_tls_cert) != bool(api.stream_tls_key):
        raise ConfigError("api.stream_tls_cert and api.stream_tls_key are only of use together")


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{key} must be one of {', '.join(choices)}, not {value!r}")


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
