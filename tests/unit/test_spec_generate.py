"""From the kubelet's wishes to ``config.json``, feature by feature, in the names of the runtime specification."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from crishim.errors import InvalidArgument
from crishim.model.cri import (
    Capability,
    ContainerConfig,
    HugepageLimit,
    KeyValue,
    LinuxContainerConfig,
    LinuxContainerResources,
    LinuxContainerSecurityContext,
    LinuxContainerUser,
    Mount,
    MountPropagation,
    NamespaceMode,
)
from crishim.model.records import ImageConfig
from crishim.spec import oci
from crishim.spec.generate import (
    HostInputs,
    Inputs,
    PodInputs,
    arguments,
    environment,
    generate,
    namespace_paths,
)
from crishim.spec.mounts import PodFiles
from crishim.spec.resources import Controllers
from crishim.spec.user import Identity

PINNED = {"net": "/ns/net", "uts": "/ns/uts", "ipc": "/ns/ipc"}
POD_NAMESPACES = {"network": "/ns/net", "uts": "/ns/uts", "ipc": "/ns/ipc", "pid": ""}
CONTROLLERS = Controllers(frozenset({"cpu", "cpuset", "memory", "pids"}), unified=True, swap=True)
V1 = Controllers(CONTROLLERS.available, unified=False, swap=True)
IMAGE = ImageConfig(entrypoint=["/entry"], cmd=["serve"], env=["PATH=/bin", "LANG=C"], working_dir="/srv")

BASE = Inputs(
    config=ContainerConfig(),
    image=IMAGE,
    identity=Identity(LinuxContainerUser(0, 0, [0]), "/root"),
    pod=PodInputs("web-0", POD_NAMESPACES, PodFiles("/pod/shm", "/pod/resolv.conf", "/pod/hostname")),
    host=HostInputs(frozenset(range(41)), -1000, CONTROLLERS),
    cgroups_path="/pods/crishim-1",
    mount_sources={},
)


def encoded(inputs: Inputs) -> Any:
    """The file as a runtime reads it."""
    return json.loads(generate(inputs).spec.encode())


def with_config(inputs: Inputs = BASE, **fields: Any) -> Inputs:
    """Other fields of the container's configuration."""
    return replace(inputs, config=msgspec.structs.replace(inputs.config, **fields))


def with_security(inputs: Inputs = BASE, **fields: Any) -> Inputs:
    """A security context."""
    linux = inputs.config.linux or LinuxContainerConfig()
    context = LinuxContainerSecurityContext(**fields)
    return with_config(inputs, linux=msgspec.structs.replace(linux, security_context=context))


def with_resources(inputs: Inputs = BASE, **fields: Any) -> Inputs:
    """Resources."""
    linux = inputs.config.linux or LinuxContainerConfig()
    return with_config(inputs, linux=msgspec.structs.replace(linux, resources=LinuxContainerResources(**fields)))


def with_pod(**fields: Any) -> Inputs:
    """Another pod."""
    return replace(BASE, pod=replace(BASE.pod, **fields))


def with_host(inputs: Inputs = BASE, **fields: Any) -> Inputs:
    """Another host."""
    return replace(inputs, host=replace(inputs.host, **fields))


def with_mounts(*mounts: Mount) -> Inputs:
    """Mounts from where they say."""
    return replace(with_config(mounts=list(mounts)), mount_sources={m.host_path: m.host_path for m in mounts})


def namespaces(spec: Any) -> dict[str, str | None]:
    """Type to path, None for a new one."""
    found = spec["linux"]["namespaces"]
    assert len(found) == len({item["type"] for item in found}), "a type twice"
    return {item["type"]: item.get("path") for item in found}


def mount_at(spec: Any, destination: str) -> Any:
    """The only mount at a place."""
    (found,) = [mount for mount in spec["mounts"] if mount["destination"] == destination]
    return found


def test_golden() -> None:
    """A whole container, as the specification writes it."""
    inputs = replace(
        with_security(
            with_resources(
                with_config(
                    command=["/run"], args=["-v"], envs=[KeyValue("A", b"b")], working_dir="/w", tty=True,
                    mounts=[Mount("/data", "/link", readonly=True)],
                ),
                cpu_period=100000, cpu_quota=50000, cpu_shares=512, memory_limit_in_bytes=1 << 30,
                memory_swap_limit_in_bytes=1 << 30, cpuset_cpus="0", cpuset_mems="0", oom_score_adj=968,
                unified={"memory.high": "1"},
            ),
            capabilities=Capability(["NET_ADMIN"], ["ALL"], []), no_new_privs=True, readonly_rootfs=True,
            masked_paths=["/proc/kcore"], readonly_paths=["/proc/sys"],
        ),
        identity=Identity(LinuxContainerUser(1000, 1001, [1001, 5, 6]), "/home/me"),
        mount_sources={"/link": "/real"},
        devices=((oci.LinuxDevice("/dev/x", "c", 10, 200, 0o660, 1, 2), "rw"),),
        pids_limit=100,
        apparmor_profile="mine",
        annotations={"io.kubernetes.cri.container-type": "container"},
    )  # fmt: skip
    spec = encoded(inputs)
    mounts = spec.pop("mounts")
    assert spec == {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": True,
            "user": {"uid": 1000, "gid": 1001, "additionalGids": [1001, 5, 6]},
            "args": ["/run", "-v"],
            "env": ["PATH=/bin", "HOSTNAME=web-0", "TERM=xterm", "LANG=C", "A=b", "HOME=/home/me"],
            "cwd": "/w",
            "capabilities": {"bounding": ["CAP_NET_ADMIN"]},
            "noNewPrivileges": True,
            "oomScoreAdj": 968,
            "apparmorProfile": "mine",
        },
        "root": {"path": "rootfs", "readonly": True},
        "annotations": {"io.kubernetes.cri.container-type": "container"},
        "linux": {
            "cgroupsPath": "/pods/crishim-1",
            "namespaces": [
                {"type": "mount"},
                {"type": "network", "path": "/ns/net"},
                {"type": "uts", "path": "/ns/uts"},
                {"type": "ipc", "path": "/ns/ipc"},
                {"type": "pid"},
                {"type": "cgroup"},
            ],
            "devices": [
                {"path": "/dev/x", "type": "c", "major": 10, "minor": 200, "fileMode": 0o660, "uid": 1, "gid": 2}
            ],
            "resources": {
                "devices": [
                    {"allow": False, "access": "rwm", "type": "a", "major": None, "minor": None},
                    {"allow": True, "access": "rw", "type": "c", "major": 10, "minor": 200},
                ],
                "cpu": {"shares": 512, "quota": 50000, "period": 100000, "cpus": "0", "mems": "0"},
                "memory": {"limit": 1 << 30, "swap": 1 << 30},
                "pids": {"limit": 100},
                "unified": {"memory.high": "1"},
            },
            "maskedPaths": ["/proc/kcore"],
            "readonlyPaths": ["/proc/sys"],
        },
    }
    assert [mount["destination"] for mount in mounts] == [
        "/proc", "/dev", "/sys", "/data",
        "/dev/pts", "/dev/mqueue", "/dev/shm", "/etc/resolv.conf", "/etc/hostname", "/sys/fs/cgroup",
    ]  # fmt: skip
    assert mounts[3] == {
        "destination": "/data", "type": "bind", "source": "/real", "options": ["rbind", "rprivate", "ro"]
    }  # fmt: skip


def test_names_of_all_fields() -> None:
    """What the other tests do not make appear: the names are those of the specification."""
    process = oci.Process(
        oci.User(1, 2, [3], umask=0o22), ["a"], "/", rlimits=[oci.Rlimit("RLIMIT_NOFILE", 2, 1)],
        capabilities=oci.Capabilities(["A"], ["B"], ["C"], ["D"], ["E"]), oom_score_adj=0,
    )  # fmt: skip
    assert json.loads(msgspec.json.encode(process)) == {
        "user": {"uid": 1, "gid": 2, "umask": 18, "additionalGids": [3]},
        "args": ["a"],
        "cwd": "/",
        "capabilities": {
            "bounding": ["A"], "effective": ["B"], "permitted": ["C"], "inheritable": ["D"], "ambient": ["E"]
        },
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 2, "soft": 1}],
        "oomScoreAdj": 0,
    }  # fmt: skip
    linux = oci.Linux(
        [oci.Namespace("mount")], "/c", rootfs_propagation="rslave",
        resources=oci.Resources(hugepage_limits=[oci.HugepageLimit("2MB", 0)], pids=oci.Pids(1)),
    )  # fmt: skip
    assert json.loads(msgspec.json.encode(linux)) == {
        "namespaces": [{"type": "mount"}],
        "cgroupsPath": "/c",
        "rootfsPropagation": "rslave",
        "resources": {"hugepageLimits": [{"pageSize": "2MB", "limit": 0}], "pids": {"limit": 1}},
    }
    root_user = json.loads(msgspec.json.encode(oci.User(0, 0)))
    assert root_user == {"uid": 0, "gid": 0}, "numbers of 0 must be there"


@pytest.mark.parametrize(
    ("command", "args", "entrypoint", "cmd", "expected"),
    [
        ([], [], ["/e", "x"], ["c"], ["/e", "x", "c"]),
        ([], ["a"], ["/e", "x"], ["c"], ["/e", "x", "a"]),
        (["k"], [], ["/e"], ["c"], ["k"]),
        (["k"], ["a", "b"], ["/e"], ["c"], ["k", "a", "b"]),
        ([], [], None, ["c", "d"], ["c", "d"]),
        ([], ["a"], None, ["c"], ["a"]),
        ([], [], ["/e"], None, ["/e"]),
        (["k"], [], None, None, ["k"]),
        ([], ["a"], [], [], ["a"]),
    ],
)
def test_arguments(
    command: list[str], args: list[str], entrypoint: list[str] | None, cmd: list[str] | None, expected: list[str]
) -> None:
    """The Kubernetes rules: command replaces ENTRYPOINT and drops CMD, args replace CMD."""
    config, image = ContainerConfig(command=command, args=args), ImageConfig(entrypoint=entrypoint, cmd=cmd)
    assert arguments(config, image) == expected
    assert encoded(replace(BASE, config=config, image=image))["process"]["args"] == expected


@pytest.mark.parametrize("image", [ImageConfig(), ImageConfig(entrypoint=[], cmd=[])])
def test_no_arguments_at_all(image: ImageConfig) -> None:
    """Refused before a runtime stumbles over it."""
    with pytest.raises(InvalidArgument, match="no command"):
        generate(replace(BASE, image=image))


def test_environment_order() -> None:
    """Defaults, the image's, the container's; a name keeps its place and the last one gives its value."""
    config = ContainerConfig(envs=[KeyValue("B", b"pod"), KeyValue("C", b"1"), KeyValue("C", b"2"), KeyValue("Z", b"")])
    image = ImageConfig(env=["A=image", "B=image", "EMPTY=", "EQ=a=b"])
    assert environment(config, image, "host", "/home") == [
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOSTNAME=host",
        "A=image", "B=pod", "EMPTY=", "EQ=a=b", "C=2", "Z=", "HOME=/home",
    ]  # fmt: skip


def test_environment_defaults_can_be_replaced() -> None:
    """By the image, and over it by the container."""
    image = ImageConfig(env=["PATH=/image", "HOSTNAME=image", "TERM=dumb", "HOME=/image"])
    config = ContainerConfig(envs=[KeyValue("HOME", b"/pod")], tty=True)
    assert environment(config, image, "host", "/passwd") == [
        "PATH=/image", "HOSTNAME=image", "TERM=dumb", "HOME=/pod"
    ]  # fmt: skip


def test_term_only_with_a_terminal() -> None:
    """Programs take TERM for a terminal."""
    assert not [item for item in environment(ContainerConfig(), ImageConfig(), "h", "/") if item.startswith("TERM")]
    assert "TERM=xterm" in environment(ContainerConfig(tty=True), ImageConfig(), "h", "/")


def test_environment_of_an_image_may_be_malformed() -> None:
    """Entries without a name or a value are not variables."""
    assert environment(ContainerConfig(), ImageConfig(env=["", "=x", "ALONE", "A=1"]), "h", "/")[2:] == [
        "A=1",
        "HOME=/",
    ]


def test_environment_values_are_bytes() -> None:
    """UTF-8 arrives unchanged, newlines included; what JSON cannot carry is refused, without showing a secret."""
    inputs = with_config(envs=[KeyValue("A", "ü\n\U0001f600".encode())])
    assert "A=ü\n\U0001f600" in encoded(inputs)["process"]["env"]
    with pytest.raises(InvalidArgument, match="environment variable A is not UTF-8") as caught:
        generate(with_config(envs=[KeyValue("A", b"secret\xff")]))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "pair", [KeyValue("", b"x"), KeyValue("A=B", b"x"), KeyValue("A\0", b"x"), KeyValue("A", b"x\0y")]
)
def test_impossible_environment(pair: KeyValue) -> None:
    """Names that are none and values with a NUL."""
    with pytest.raises(InvalidArgument, match="environment variable"):
        generate(with_config(envs=[pair]))


@pytest.mark.parametrize(("pod", "image", "cwd"), [("/p", "/i", "/p"), ("", "/i", "/i"), ("", "", "/")])
def test_working_directory(pod: str, image: str, cwd: str) -> None:
    """The container's, else the image's, else the root."""
    inputs = replace(with_config(working_dir=pod), image=ImageConfig(cmd=["c"], working_dir=image))
    assert encoded(inputs)["process"]["cwd"] == cwd


def test_user() -> None:
    """The main group is among the additional ones, lest a set-group-ID program sheds it (CVE-2022-2995)."""
    user = Identity(LinuxContainerUser(33, 34, [34, 40, 1]), "/var/www")
    process = encoded(replace(BASE, identity=user))["process"]
    assert process["user"] == {"uid": 33, "gid": 34, "additionalGids": [34, 40, 1]}
    assert "HOME=/var/www" in process["env"]


def test_capabilities() -> None:
    """Those of the container's change, the user and the host, together."""
    capabilities = encoded(with_security(capabilities=Capability(["BPF"], ["ALL"])))["process"]["capabilities"]
    assert capabilities == {name: ["CAP_BPF"] for name in ("bounding", "effective", "permitted")}
    inputs = with_host(with_security(privileged=True), capabilities=frozenset({0, 5}))
    assert encoded(inputs)["process"]["capabilities"]["bounding"] == ["CAP_CHOWN", "CAP_KILL"]


def test_dropping_everything_is_written() -> None:
    """An absent object could mean the runtime's default."""
    capabilities = encoded(with_security(capabilities=Capability([], ["ALL"])))["process"]["capabilities"]
    assert not any(capabilities.values())


def test_ordinary_container() -> None:
    """What is not asked for is not there."""
    spec = encoded(BASE)
    assert not {"pids", "cpu", "memory"} & spec["linux"]["resources"].keys()
    assert not {"annotations", "hostname"} & spec.keys()
    assert "apparmorProfile" not in spec["process"]
    assert spec["root"] == {"path": "rootfs"}
    assert "noNewPrivileges" not in spec["process"]
    assert "terminal" not in spec["process"]
    assert spec["process"]["oomScoreAdj"] == 0
    assert not {"maskedPaths", "readonlyPaths", "devices", "rootfsPropagation"} & spec["linux"].keys()
    assert generate(BASE).remarks == ()


def test_privileged() -> None:
    """All devices, all capabilities, the host's cgroups; nothing masked or read-only but what is asked for."""
    inputs = with_security(
        privileged=True, masked_paths=["/proc/kcore"], readonly_paths=["/proc/sys"],
        capabilities=Capability([], ["ALL"]),
    )  # fmt: skip
    spec = encoded(inputs)
    assert len(spec["process"]["capabilities"]["effective"]) == 41
    assert not {"maskedPaths", "readonlyPaths"} & spec["linux"].keys()
    (rule,) = spec["linux"]["resources"]["devices"]
    assert rule == {"allow": True, "access": "rwm", "type": "a", "major": None, "minor": None}
    assert "cgroup" not in namespaces(spec)
    for place in ("/sys", "/sys/fs/cgroup"):
        assert "rw" in mount_at(spec, place)["options"]


def test_privileged_with_a_read_only_root() -> None:
    """The two do not exclude each other."""
    assert encoded(with_security(privileged=True, readonly_rootfs=True))["root"]["readonly"] is True


def test_read_only_root() -> None:
    """The pod's files are read-only with it."""
    spec = encoded(with_security(readonly_rootfs=True))
    assert spec["root"]["readonly"] is True
    assert "ro" in mount_at(spec, "/etc/resolv.conf")["options"]
    assert "rw" in mount_at(encoded(BASE), "/etc/resolv.conf")["options"]


def test_masked_and_read_only_paths() -> None:
    """Exactly those that the kubelet names (none for procMount Unmasked)."""
    linux = encoded(with_security(masked_paths=["/proc/a", "/b"], readonly_paths=["/proc/c"]))["linux"]
    assert (linux["maskedPaths"], linux["readonlyPaths"]) == (["/proc/a", "/b"], ["/proc/c"])


POD, NODE = NamespaceMode.POD, NamespaceMode.NODE


@pytest.mark.parametrize(
    ("network", "ipc", "pid", "expected"),
    [
        (POD, POD, "", {"network": "/ns/net", "uts": "/ns/uts", "ipc": "/ns/ipc", "pid": None}),
        (
            POD,
            POD,
            "/proc/7/ns/pid",
            {"network": "/ns/net", "uts": "/ns/uts", "ipc": "/ns/ipc", "pid": "/proc/7/ns/pid"},
        ),
        (POD, POD, None, {"network": "/ns/net", "uts": "/ns/uts", "ipc": "/ns/ipc"}),
        (NODE, POD, "", {"ipc": "/ns/ipc", "pid": None}),
        (POD, NODE, "", {"network": "/ns/net", "uts": "/ns/uts", "pid": None}),
        (NODE, NODE, None, {}),
    ],
)
def test_namespaces(network: NamespaceMode, ipc: NamespaceMode, pid: str | None, expected: dict[str, str]) -> None:
    """Joined by path, new, or the node's own by absence; a mount namespace is always new."""
    pinned = {name: path for name, path in PINNED.items() if name == "ipc" or network is POD}
    spec = encoded(with_pod(namespaces=namespace_paths(network, ipc, pinned, pid)))
    assert namespaces(spec) == {"mount": None, "cgroup": None, **expected}


def test_cgroup_namespace() -> None:
    """With version 2 a container sees its own cgroup as the root; with version 1 there is none, as elsewhere."""
    assert "cgroup" in namespaces(encoded(BASE))
    assert "cgroup" not in namespaces(encoded(with_host(controllers=V1)))
    assert "ro" in mount_at(encoded(with_host(controllers=V1)), "/sys/fs/cgroup")["options"]


def test_hostname() -> None:
    """The pinned UTS namespace has it; runtimes refuse to set it where they make no UTS namespace."""
    assert "hostname" not in encoded(BASE)
    for pid in ("", "/proc/7/ns/pid", None):
        paths = namespace_paths(NODE, POD, {"ipc": "/ns/ipc"}, pid)
        assert "hostname" not in encoded(with_pod(namespaces=paths))
    assert encoded(with_pod(namespaces={"uts": ""}))["hostname"] == "web-0"
    assert "HOSTNAME=web-0" in encoded(BASE)["process"]["env"]


def test_mounts_of_the_kubelet_replace_ours() -> None:
    """resolv.conf and shared memory among them: once each."""
    spec = encoded(with_mounts(Mount("/etc/resolv.conf", "/mine"), Mount("/dev/shm", "/volume")))
    assert mount_at(spec, "/etc/resolv.conf")["source"] == "/mine"
    assert mount_at(spec, "/dev/shm")["source"] == "/volume"
    assert mount_at(spec, "/etc/hostname")["source"] == "/pod/hostname"


def test_mount_order() -> None:
    """Parents first, whatever the order of the request."""
    spec = encoded(with_mounts(Mount("/var/run/a", "/1"), Mount("/var", "/2"), Mount("/var/run", "/3")))
    found = [mount["destination"] for mount in spec["mounts"] if mount["destination"].startswith("/var")]
    assert found == ["/var", "/var/run", "/var/run/a"]


def test_dev_of_the_host() -> None:
    """No devpts or mqueue of ours over it."""
    found = [mount["destination"] for mount in encoded(with_mounts(Mount("/dev", "/dev")))["mounts"]]
    assert [place for place in found if place.startswith("/dev")] == ["/dev", "/dev/shm"]


@pytest.mark.parametrize(
    ("propagation", "option", "root"),
    [
        (MountPropagation.PROPAGATION_PRIVATE, "rprivate", None),
        (MountPropagation.PROPAGATION_HOST_TO_CONTAINER, "rslave", "rslave"),
        (MountPropagation.PROPAGATION_BIDIRECTIONAL, "rshared", "rshared"),
    ],
)
def test_propagation(propagation: MountPropagation, option: str, root: str | None) -> None:
    """On the mount, and on the root as far as it must."""
    spec = encoded(with_mounts(Mount("/m", "/m", propagation=propagation)))
    assert option in mount_at(spec, "/m")["options"]
    assert spec["linux"].get("rootfsPropagation") == root


def test_limits_that_the_host_cannot_do() -> None:
    """Left out of the spec and named in the remarks."""
    inputs = with_resources(
        with_host(controllers=V1), hugepage_limits=[HugepageLimit("2MB", 0)], unified={"memory.high": "1"}
    )
    found = generate(inputs)
    resources = json.loads(found.spec.encode())["linux"]["resources"]
    assert not {"hugepageLimits", "unified"} & resources.keys()
    assert found.remarks == (
        "hugepage limits: the host has no hugetlb controller",
        "memory.high: the host has no cgroup version 2",
    )


@pytest.mark.parametrize(
    ("wanted", "lowest", "given"),
    [(-997, -1000, -997), (-997, -500, -500), (0, 100, 100), (500, 100, 500), (-1000, -1000, -1000)],
)
def test_oom_score_adj(wanted: int, lowest: int, given: int) -> None:
    """As low as the daemon may; the log says so where that is not low enough."""
    found = generate(with_host(with_resources(oom_score_adj=wanted), lowest_oom_score_adj=lowest))
    assert found.spec.process.oom_score_adj == given
    assert bool(found.remarks) == (wanted != given)
    assert all(str(wanted) in remark and str(lowest) in remark for remark in found.remarks)


def test_devices() -> None:
    """Made in the container, and allowed as far as was asked, after everything else is forbidden."""
    null = oci.LinuxDevice("/dev/mynull", "c", 1, 3)
    disk = oci.LinuxDevice("/dev/disk", "b", 8, 0, 0o600)
    linux = encoded(replace(BASE, devices=((null, "rwm"), (disk, "r"))))["linux"]
    assert linux["devices"] == [
        {"path": "/dev/mynull", "type": "c", "major": 1, "minor": 3},
        {"path": "/dev/disk", "type": "b", "major": 8, "minor": 0, "fileMode": 0o600},
    ]
    rules = linux["resources"]["devices"]
    assert rules[0]["allow"] is False
    assert [(r["allow"], r["access"], r["type"], r["major"], r["minor"]) for r in rules[1:]] == [
        (True, "rwm", "c", 1, 3),
        (True, "r", "b", 8, 0),
    ]


def test_all_devices_of_the_host() -> None:
    """A privileged container has the nodes, and one rule for all."""
    inputs = replace(with_security(privileged=True), devices=((oci.LinuxDevice("/dev/sda", "b", 8, 0), "rwm"),))
    linux = encoded(inputs)["linux"]
    assert [device["path"] for device in linux["devices"]] == ["/dev/sda"]
    assert [rule["allow"] for rule in linux["resources"]["devices"]] == [True]


def test_generate_changes_nothing() -> None:
    """The same inputs give the same spec."""
    inputs = with_mounts(Mount("/a", "/b"))
    assert generate(inputs) == generate(inputs)
