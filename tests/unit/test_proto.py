"""The CRI definition and the Python modules generated from it: in step, complete, and documented."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import ServiceDescriptor

from crishim.cri.api import api_pb2

ROOT = Path(__file__).resolve().parents[2]
API = Path("crishim/cri/api")
GENERATED = ("api_pb2.py", "api_pb2.pyi", "api_pb2_grpc.py", "api_pb2_grpc.pyi")

RUNTIME_CALLS = """
    Version Status RuntimeConfig UpdateRuntimeConfig
    RunPodSandbox StopPodSandbox RemovePodSandbox PodSandboxStatus ListPodSandbox StreamPodSandboxes
    UpdatePodSandboxResources
    CreateContainer StartContainer StopContainer RemoveContainer ListContainers StreamContainers
    ContainerStatus UpdateContainerResources ReopenContainerLog CheckpointContainer
    ExecSync Exec Attach PortForward
    ContainerStats ListContainerStats StreamContainerStats
    PodSandboxStats ListPodSandboxStats StreamPodSandboxStats
    ListMetricDescriptors ListPodSandboxMetrics StreamPodSandboxMetrics
    GetContainerEvents
"""
IMAGE_CALLS = "ListImages StreamImages ImageStatus PullImage RemoveImage ImageFsInfo"


def service(name: str) -> ServiceDescriptor:
    """The descriptor of one of the two services."""
    return api_pb2.DESCRIPTOR.services_by_name[name]


def run_generate(*args: str) -> subprocess.CompletedProcess[str]:
    """Run hack/generate with the Python of the tests; the args may begin with options of that Python."""
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False)


def test_generated_modules_are_in_step(tmp_path: Path) -> None:
    """Generating again gives the modules of the source tree, byte by byte."""
    result = run_generate(str(ROOT / "hack/generate"), "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    fresh = {path.name: path.read_bytes() for path in (tmp_path / API).iterdir()}
    assert sorted(fresh) == sorted(GENERATED)
    assert not [name for name in fresh if fresh[name] != (ROOT / API / name).read_bytes()], "generate anew"


def test_generate_says_which_tool_is_missing() -> None:
    """Without grpcio-tools (-S hides all that pip installed), one sentence says so."""
    result = run_generate("-I", "-S", str(ROOT / "hack/generate"))
    assert result.returncode == 1
    assert result.stderr == f"hack/generate: grpcio-tools is not installed for {sys.executable}.\n"


def test_generated_modules_import_without_warnings() -> None:
    """The installed grpcio and protobuf take the generated code."""
    code = "from crishim.cri.api import api_pb2, api_pb2_grpc"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, check=False)
    assert result.returncode == 0


@pytest.mark.parametrize(
    ("name", "calls", "count"), [("RuntimeService", RUNTIME_CALLS, 35), ("ImageService", IMAGE_CALLS, 6)]
)
def test_services_have_all_calls(name: str, calls: str, count: int) -> None:
    """The services have their 41 calls, under the names that clients use."""
    assert service(name).full_name == f"runtime.v1.{name}"
    assert [method.name for method in service(name).methods] == calls.split()
    assert len(calls.split()) == count


def test_streaming_calls() -> None:
    """Only events and the Stream calls answer with a stream, and no call takes one."""
    methods = [*service("RuntimeService").methods, *service("ImageService").methods]
    streams = {method.name for method in methods if method.server_streaming}
    assert streams == {"GetContainerEvents"} | {m.name for m in methods if m.name.startswith("Stream")}
    assert not [method.name for method in methods if method.client_streaming]


@pytest.mark.parametrize(
    ("message", "field", "number"),
    [
        ("ContainerStatus", "stop_signal", 19),
        ("ContainerConfig", "CDI_devices", 17),
        ("ImageSpec", "user_specified_image", 18),
        ("LinuxSandboxSecurityContext", "run_as_group", 8),
        ("LinuxContainerSecurityContext", "supplemental_groups_policy", 17),
        ("Mount", "image_sub_path", 10),
        ("Namespace", "options", 2),
        ("PodSandboxStatusResponse", "timestamp", 4),
    ],
)
def test_field_numbers(message: str, field: str, number: int) -> None:
    """Fields whose number is not their place in the message, and some of the newest ones."""
    assert api_pb2.DESCRIPTOR.message_types_by_name[message].fields_by_name[field].number == number


def test_enum_values() -> None:
    """Signals have numbers of their own, not those of the kernel; profile types are nested."""
    assert api_pb2.SIGTERM == 23
    assert api_pb2.SIGRTMAX == 65
    assert api_pb2.SecurityProfile.Localhost == 2


def test_wire_bytes() -> None:
    """A message in the bytes of the wire; values of environment variables need not be UTF-8."""
    message = api_pb2.KeyValue(key="A", value=b"\xff")
    assert message.SerializeToString() == b"\x0a\x01A\x12\x01\xff"


def test_every_definition_has_a_comment() -> None:
    """Each service, call, message and enum of the .proto has a comment on the line above it."""
    lines = (ROOT / "proto/runtime/v1/api.proto").read_text(encoding="utf-8").splitlines()
    starts = [i for i, line in enumerate(lines) if re.match(r"\s*(service|rpc|message|enum) ", line)]
    assert len(starts) > 200
    assert not [lines[i] for i in starts if not re.match(r"\s*// \S", lines[i - 1])]
