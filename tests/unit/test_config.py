"""The settings: their defaults are a contract, and what is wrong is refused with a name and a reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from crishim.config import load as loading
from crishim.config.load import keys, load
from crishim.config.paths import Paths
from crishim.config.settings import Config, HandlerSettings, effective_handlers
from crishim.errors import Code, ConfigError

CONTRACT: dict[str, Any] = {
    "root": "/var/lib/crishim",
    "state": "/run/crishim",
    "api.max_message_bytes": 16 << 20,
    "log.level": "info",
    "log.format": "text",
    "api.listen": "/run/crishim/crishim.sock",
    "api.stream_address": "127.0.0.1",
    "api.stream_port": 0,
    "runtime.default": "runc",
    "runtime.cgroup_manager": "auto",
    "runtime.conmon": "/usr/bin/conmon",
    "image.registries_conf": "/etc/containers/registries.conf",
    "image.certs_dir": "/etc/containers/certs.d",
    "image.policy": "/etc/containers/policy.json",
    "image.auth_file": "",
    "network.conf_dir": "/etc/cni/net.d",
    "network.bin_dirs": ["/opt/cni/bin", "/usr/lib/cni"],
    "metrics.listen": "",
}


def value(config: Config, key: str) -> Any:
    """The setting of a dotted key."""
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where a test puts its configuration; there are no runtimes on PATH to depend on."""
    return tmp_path / "crishim.toml"


@pytest.fixture(autouse=True)
def no_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A PATH of our own, with nothing on it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def program(folder: Path, name: str) -> str:
    """An executable file."""
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


def put(file: Path, text: str) -> Config:
    """The settings that a file's text makes."""
    file.write_text(text)
    return load(file)


def drop_in(file: Path, name: str, text: str) -> None:
    """Add to the drop-in directory of ``file``."""
    folder = Path(f"{file}.d")
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)


@pytest.mark.parametrize("key", CONTRACT)
def test_defaults(key: str, file: Path) -> None:
    """An empty file gives the documented settings."""
    assert value(put(file, ""), key) == CONTRACT[key]


def test_default_file_may_be_absent(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any file the daemon runs with the defaults, and with drop-ins of the file that is not there."""
    monkeypatch.setattr(loading, "DEFAULT_FILE", file)
    assert load(None) == Config()
    drop_in(file, "a.toml", "root = '/r'")
    assert load(None).root == "/r"


def test_default_file_is_in_etc() -> None:
    """Where administrators look for it."""
    assert str(loading.DEFAULT_FILE) == "/etc/crishim/crishim.toml"


def test_a_named_file_must_be_there(file: Path) -> None:
    """--config with a typing error does not quietly start a daemon with the defaults."""
    with pytest.raises(ConfigError, match=r"crishim\.toml does not exist"):
        load(file)


def test_all_settings_from_a_file(file: Path) -> None:
    """Every key but the table of handlers can be set, to a value of its type."""
    words = {
        "runtime.cgroup_manager": "cgroupfs",
        "log.level": "debug",
        "log.format": "json",
        "api.stream_tls_min_version": "1.3",
    }
    wanted: dict[str, Any] = {}
    for key, kind, default in keys():
        wanted[key] = words.get(key, "/x")
        if kind in (int, float):
            wanted[key] = default + 7
        elif kind is bool:
            wanted[key] = not default
        elif kind == list[str]:
            wanted[key] = ["/a", "/b"]
    config = put(file, "".join(f"{key} = {json.dumps(item)}\n" for key, item in wanted.items()))
    assert {key: value(config, key) for key in wanted} == wanted


def test_keys_have_types_and_defaults() -> None:
    """What the flags are made of: every dotted key but the table of handlers."""
    found = {key: (kind, default) for key, kind, default in keys()}
    assert CONTRACT.keys() <= found.keys()
    assert found["api.stream_port"] == (int, 0)
    assert found["network.bin_dirs"] == (list[str], ["/opt/cni/bin", "/usr/lib/cni"])
    assert found["image.stall_seconds"][0] is float
    assert not [key for key in found if "handlers" in key]


def test_drop_ins_in_the_order_of_their_names(file: Path) -> None:
    """The last one to set a key wins; others keep what earlier ones set; only *.toml counts."""
    drop_in(file, "20-b.toml", "[api]\nstream_port = 20\nstream_address = '::1'\n[log]\nlevel = 'debug'")
    drop_in(file, "10-a.toml", "[api]\nstream_port = 10\nlisten = '/ten'\n")
    drop_in(file, "30-c.toml.bak", "[api]\nstream_port = 30")
    config = put(file, "root = '/main'\n[api]\nstream_port = 1\nlisten = '/main'\n")
    assert (config.root, config.log.level) == ("/main", "debug")
    assert (config.api.listen, config.api.stream_port, config.api.stream_address) == ("/ten", 20, "::1")


def test_drop_ins_replace_lists_and_merge_handlers(file: Path) -> None:
    """A list is one value; the table of handlers, and each handler, is a section."""
    drop_in(
        file, "1.toml",
        "[network]\nbin_dirs = ['/c']\n[runtime.handlers.kata]\nargs = ['-v']\n[runtime.handlers.x]\npath = '/x'",
    )  # fmt: skip
    config = put(file, "[runtime]\ndefault = 'kata'\nhandlers.kata.path = '/k'\n[network]\nbin_dirs = ['/a', '/b']\n")
    assert config.network.bin_dirs == ["/c"]
    assert config.runtime.handlers == {"kata": HandlerSettings("/k", ["-v"]), "x": HandlerSettings("/x", [])}


def test_flags_win_over_files(file: Path) -> None:
    """Over drop-ins too; a flag of one section leaves the rest of it."""
    drop_in(file, "1.toml", "state = '/drop-in'\n[api]\nlisten = '/drop-in'\n")
    file.write_text("root = '/file'\n[api]\nstream_port = 5\n")
    config = load(file, {"api.listen": "/flag", "root": "/flag", "network.bin_dirs": ["/f"]})
    assert (config.root, config.state) == ("/flag", "/drop-in")
    assert (config.api.listen, config.api.stream_port) == ("/flag", 5)
    assert config.network.bin_dirs == ["/f"]


def test_flags_are_checked(file: Path) -> None:
    """Like values of files."""
    file.write_text("")
    for flags in ({"log.level": "loud"}, {"api.stream_port": "x"}, {"api.nonsense": 1}, {"root": "relative"}):
        with pytest.raises(ConfigError, match=next(iter(flags)).rpartition(".")[2]):
            load(file, flags)


@pytest.mark.parametrize(
    ("text", "unknown", "hint"),
    [
        ("rooot = '/r'", "rooot", "root"),
        ("[metric]\nlisten = ':1'", "metric", "metrics"),
        ("[api]\nlistn = '/s'", "api.listn", "api.listen"),
        ("[api]\nstream-port = 1", "api.stream-port", "api.stream_port"),
        ("[runtime]\ncgroup_driver = 'x'", "runtime.cgroup_driver", "runtime.cgroup_manager"),
        ("[runtime.handler.kata]\npath = '/k'", "runtime.handler", "runtime.handlers"),
        ("[runtime.handlers.kata]\npaht = '/k'", "runtime.handlers.kata.paht", "runtime.handlers.kata.path"),
        ("[runtime.handlers]\nx.arg = ['a']", "runtime.handlers.x.arg", "runtime.handlers.x.args"),
        ("[image]\nregistry_conf = ''", "image.registry_conf", "image.registries_conf"),
    ],
)
def test_unknown_keys_are_refused(file: Path, text: str, unknown: str, hint: str) -> None:
    """With the file, the key and the nearest valid one, at each level."""
    with pytest.raises(ConfigError) as caught:
        put(file, text)
    message = str(caught.value)
    assert str(file) in message
    assert f"unknown key {unknown}" in message
    assert message.endswith(f"did you mean {hint}")


def test_unknown_keys_far_from_all_others(file: Path) -> None:
    """Then all that are known are named."""
    with pytest.raises(ConfigError, match=r"unknown key qqqq, known are root, state, api, runtime, image, network"):
        put(file, "qqqq = 1")


def test_unknown_keys_of_drop_ins_name_the_drop_in(file: Path) -> None:
    """Not the main file."""
    drop_in(file, "x.toml", "[log]\nlevl = 'debug'")
    with pytest.raises(ConfigError, match=r"crishim\.toml\.d/x\.toml: unknown key log\.levl"):
        put(file, "")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("root = 5", "root"),
        ("root = 2020-01-01", "root"),
        ("api = '/run/x.sock'", "api"),
        ("[api]\nstream_port = '10'", "api.stream_port"),
        ("[api]\nstream_port = true", "api.stream_port"),
        ("[api]\nstream_port = 1.5", "api.stream_port"),
        ("[network]\nbin_dirs = '/opt/cni/bin'", "network.bin_dirs"),
        ("[network]\nbin_dirs = [1]", "network.bin_dirs"),
        ("[network]\nplugin_timeout = '60s'", "network.plugin_timeout"),
        ("[runtime]\nhandlers = ['kata']", "runtime.handlers"),
        ("[runtime.handlers]\nkata = '/usr/bin/kata'", "runtime.handlers"),
        ("[runtime.handlers.kata]\nargs = '-v'", "runtime.handlers"),
    ],
)
def test_wrong_types_are_refused(file: Path, text: str, key: str) -> None:
    """With the file and the key; nothing is converted behind the administrator's back."""
    with pytest.raises(ConfigError) as caught:
        put(file, text)
    assert str(file) in str(caught.value)
    assert f"$.{key}" in str(caught.value)


def test_wrong_types_of_drop_ins_name_the_drop_in(file: Path) -> None:
    """And a flag's name the flags."""
    drop_in(file, "x.toml", "[api]\nstream_port = 'x'")
    with pytest.raises(ConfigError, match=r"d/x\.toml: expected `int`.*api\.stream_port"):
        put(file, "[api]\nlisten = '/x'")
    Path(f"{file}.d/x.toml").unlink()
    with pytest.raises(ConfigError, match=r"^flags: expected `int`.*api\.stream_port"):
        load(file, {"api.stream_port": "x"})


def test_whole_numbers_are_good_for_seconds(file: Path) -> None:
    """TOML tells 60 from 60.0; administrators do not."""
    assert put(file, "[network]\nplugin_timeout = 5").network.plugin_timeout == 5.0


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"root = ", "invalid value"),
        (b"[api\nlisten = '/x'", "line 1"),
        (b"root = '/a'\nroot = '/b'", "overwrite"),
        (b"root = '/\xff'", "utf-8"),
    ],
)
def test_invalid_toml(file: Path, content: bytes, cause: str) -> None:
    """The file and the place are named."""
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert cause in str(caught.value)


def test_unreadable_file(file: Path) -> None:
    """What cannot be read is not the same as what is not there."""
    file.mkdir()
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert str(caught.value) == f"{file}: is a directory"


def test_unreadable_drop_in(file: Path) -> None:
    """Whatever it may have said, the daemon does not start without it."""
    file.write_text("")
    Path(f"{file}.d/x.toml").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"x\.toml: is a directory"):
        load(file)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("root = 'var'", "root"),
        ("state = ''", "state"),
        ("[runtime]\ncgroup_manager = 'cgroup2'", "runtime.cgroup_manager"),
        ("[runtime.handlers.kata]\npath = 'kata'\n[runtime]\ndefault = 'kata'", "runtime.handlers.kata.path"),
        ("[runtime]\ndefault = 'gvisor'\n[runtime.handlers.kata]\npath = '/k'", "runtime.default"),
        ("[log]\nlevel = 'INFO'", "log.level"),
        ("[log]\nformat = 'xml'", "log.format"),
        ("[api]\nstream_port = -1", "api.stream_port"),
        ("[api]\nstream_port = 65536", "api.stream_port"),
        ("[api]\nmax_message_bytes = 0", "api.max_message_bytes"),
        ("[api]\nstream_idle_timeout = 0", "api.stream_idle_timeout"),
        ("[api]\nstream_creation_timeout = -1", "api.stream_creation_timeout"),
        ("[api]\nstream_tls_min_version = '1.1'", "api.stream_tls_min_version"),
        ("[api]\nstream_tls_cert = '/c.pem'", "api.stream_tls_cert and api.stream_tls_key"),
        ("[api]\nstream_tls_key = '/k.pem'", "api.stream_tls_cert and api.stream_tls_key"),
        ("[image]\nparallel_layers = 0", "image.parallel_layers"),
        ("[image]\nmax_layer_bytes = -1", "image.max_layer_bytes"),
        ("[image]\nmax_layer_entries = 0", "image.max_layer_entries"),
        ("[image]\nstall_seconds = 0", "image.stall_seconds"),
        ("[network]\nplugin_timeout = -0.5", "network.plugin_timeout"),
        ("[network]\nplugin_timeout = nan", "network.plugin_timeout"),
    ],
)
def test_bad_values_are_refused(file: Path, text: str, key: str) -> None:
    """With the key, and the value where there is one to show."""
    with pytest.raises(ConfigError, match=f"^{re.escape(key)} ") as caught:
        put(file, text)
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert not str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("key", "good"),
    [
        ("runtime.cgroup_manager", ["auto", "cgroupfs", "systemd"]),
        ("log.level", ["debug", "info", "warning", "error"]),
        ("log.format", ["text", "json"]),
        ("api.stream_tls_min_version", ["1.2", "1.3"]),
        ("api.stream_port", [0, 1, 65535]),
        ("image.parallel_layers", [1]),
        ("network.plugin_timeout", [0.1]),
    ],
)
def test_good_values(file: Path, key: str, good: list[Any]) -> None:
    """All that the documentation allows."""
    file.write_text("")
    for item in good:
        assert value(load(file, {key: item}), key) == item


def test_default_handler_must_be_known(file: Path, no_programs: Path) -> None:
    """The message lists those that are: configured ones and those found on PATH."""
    program(no_programs, "crun")
    with pytest.raises(ConfigError, match=r"runtime\.default names 'runc'.*known are kata, crun"):
        put(file, "[runtime.handlers.kata]\npath = '/k'")
    assert put(file, "[runtime]\ndefault = 'crun'").runtime.default == "crun"


def test_handlers_are_found_on_path(file: Path, no_programs: Path) -> None:
    """runc and crun where they are installed; a configured path wins, arguments stay."""
    runc, kata = program(no_programs, "runc"), program(no_programs, "kata")
    config = put(file, "[runtime.handlers.kata]\nargs = ['-x']\n[runtime.handlers.crun]\npath = '/opt/crun'\n")
    assert effective_handlers(config.runtime) == {
        "kata": HandlerSettings(kata, ["-x"]),
        "crun": HandlerSettings("/opt/crun"),
        "runc": HandlerSettings(runc),
    }


def test_configured_handler_without_a_program(file: Path) -> None:
    """Stays known, without a path: a pod that asks for it hears of that, not of an unknown handler."""
    config = put(file, "[runtime]\ndefault = 'kata'\n[runtime.handlers.kata]")
    assert effective_handlers(config.runtime) == {"kata": HandlerSettings()}


def test_paths_follow_from_root_and_state(tmp_path: Path) -> None:
    """What must survive a reboot is below root, the rest below state; only root may look inside."""
    paths = Paths.of(Config(root=str(tmp_path / "lib"), state=str(tmp_path / "run")))
    durable = (paths.database, paths.layers, paths.writable)
    volatile = (paths.sandboxes, paths.containers, paths.exits, paths.attach, paths.runtime_root("runc"))
    assert all(path.is_relative_to(paths.root) for path in durable)
    assert all(path.is_relative_to(paths.state) for path in volatile)
    paths.prepare()
    paths.prepare()
    assert {path: path.stat().st_mode & 0o777 for path in (paths.root, paths.layers, paths.exits)} == {
        paths.root: 0o700,
        paths.layers: 0o700,
        paths.exits: 0o700,
    }
    assert paths.state.stat().st_mode & 0o066 == 0
