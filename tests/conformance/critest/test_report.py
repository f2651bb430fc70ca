"""The comparison of a run with what is expected of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .report import Expectation, Result, Verdict, expectations, read, table

LISTED = Expectation("^Streaming ", "fail", "not built yet")


def spec(name: str, state: str, message: str = "", kind: str = "It") -> dict[str, Any]:
    """One entry of Ginkgo's report."""
    return {
        "ContainerHierarchyTexts": ["[k8s.io] Streaming"] if kind == "It" else None,
        "LeafNodeText": name,
        "LeafNodeType": kind,
        "State": state,
        "Failure": {"Message": message},
        "RunTime": 2_000_000_000,
    }


def write(path: Path, *specs: dict[str, Any]) -> Path:
    """A report."""
    path.write_text(json.dumps([{"SpecReports": list(specs)}]))
    return path


def test_a_spec_that_asked_to_be_skipped_differs_from_one_that_was_not_selected(tmp_path: Path) -> None:
    report = write(tmp_path / "r", spec("a", "skipped", "no AppArmor"), spec("b", "skipped"), spec("c", "passed"))
    assert [item.outcome for item in read(report)] == ["skip", "unselected", "pass"]


def test_only_failed_nodes_count_besides_specs(tmp_path: Path) -> None:
    report = write(tmp_path / "r", spec("", "failed", "no daemon", "BeforeSuite"), spec("", "passed", "", "AfterSuite"))
    assert read(report) == [Result("BeforeSuite", "fail", "no daemon", 2.0)]


@pytest.mark.parametrize(
    ("message", "gist"),
    [
        ("cannot exec\nUnexpected error:\n  <*x.Y | 0x1f>: \n  rpc error: no", "cannot exec: rpc error: no"),
        ("failed: rpc error: no\nUnexpected error:\n rpc error: no", "failed: rpc error: no"),
        ("Expected\n    <string>: a\nto equal\n    <string>: b", "Expected <string>: a to equal <string>: b"),
        ("", "failed"),
    ],
)
def test_a_failure_is_told_in_one_line_with_its_cause(tmp_path: Path, message: str, gist: str) -> None:
    assert read(write(tmp_path / "r", spec("a", "failed", message)))[0].message == gist


@pytest.mark.parametrize(
    ("name", "outcome", "good"),
    [
        ("Pod a", "pass", True),
        ("Pod a", "fail", False),
        ("Pod a", "skip", False),
        ("Pod a", "unselected", False),
        ("Streaming a", "fail", True),
        ("Streaming a", "skip", False),
        ("Streaming a", "pass", False),
    ],
)
def test_a_run_is_good_if_every_spec_did_what_is_listed(name: str, outcome: Any, good: bool) -> None:
    assert Verdict.of([[Result(name, outcome)]], [LISTED]).good is good


def test_a_spec_that_differs_between_rounds_is_named() -> None:
    verdict = Verdict.of([[Result("Pod a", "pass")], [Result("Pod a", "fail", "why")]], [])
    assert "unstable: Pod a: pass, fail" in list(table(verdict))
    assert not verdict.good


def test_entries_for_other_hosts_do_not_count() -> None:
    path = Path(__file__).with_name("expected.toml")
    everywhere = expectations(path, lambda _host: False)
    assert all(entry.host and entry not in everywhere for entry in expectations(path, bool) if entry.host)
    assert all(entry.outcome in ("fail", "skip") and entry.reason for entry in expectations(path, bool))
