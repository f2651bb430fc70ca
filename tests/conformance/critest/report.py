"""What came out of a run, compared with what was expected."""

from __future__ import annotations

import json
import re
import textwrap
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Outcome = Literal["pass", "fail", "skip", "unselected"]
_MESSAGE_MAX = 400
_POINTER = re.compile(r"<\*[\w.]+ \| 0x[0-9a-f]+>: ?")
_ID = re.compile(r"\b([0-9a-f]{13})[0-9a-f]{51}\b")
_OUTCOMES: Mapping[str, Outcome] = {"passed": "pass", "skipped": "skip", "pending": "skip"}


@dataclass(frozen=True)
class Result:
    """How one spec ended."""

    name: str
    outcome: Outcome
    message: str = ""
    """What the failure comes to, or the reason of the skip."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Expectation:
    """Specs that are known not to pass, and why; ``host`` names the only kind of host it holds for."""

    spec: str
    outcome: Outcome
    reason: str
    host: str = ""

    def covers(self, result: Result) -> bool:
        """Whether it speaks of the spec of ``result``."""
        return re.search(self.spec, result.name) is not None


def read(path: Path) -> list[Result]:
    """Ginkgo's JSON report; nodes that are no specs count only if they failed."""
    suites = json.loads(path.read_text())
    found = [_result(spec) for suite in suites for spec in suite["SpecReports"] or []]
    return [result for spec, result in found if spec["LeafNodeType"] == "It" or result.outcome == "fail"]


def _result(spec: Mapping[str, Any]) -> tuple[Mapping[str, Any], Result]:
    parts = [*(spec["ContainerHierarchyTexts"] or []), spec["LeafNodeText"] or spec["LeafNodeType"]]
    failure = spec.get("Failure", {}).get("Message", "").strip()
    outcome = _OUTCOMES.get(spec["State"], "fail")
    if outcome == "skip" and not failure:
        outcome = "unselected"  # by --focus and --skip; critest itself leaves benchmarks out like this
    name = " ".join(parts).removeprefix("[k8s.io] ")
    return spec, Result(name, outcome, _gist(failure or spec["State"]), spec["RunTime"] / 1e9)


def _gist(text: str) -> str:
    """What a failure comes to: its first line, and the runtime's error if that is not in it.

    Gomega's own beginnings ("Expected", "Timed out after 60 s.") say nothing without the lines that follow.
    """
    lines = [line.strip() for line in _POINTER.sub("", text).splitlines() if line.strip()] or [""]
    if re.fullmatch(r"Expected|Timed out after .*|Unexpected error:", lines[0]):
        return " ".join(lines[:4])
    error = next((line for line in lines if "rpc error:" in line), lines[0])
    return lines[0] if error in lines[0] else f"{lines[0].removesuffix(':')}: {error}"


def expectations(path: Path, applies: Callable[[str], bool]) -> list[Expectation]:
    """The list in ``path``, as far as it ``applies`` to this kind of host."""
    entries = [Expectation(**entry) for entry in tomllib.loads(path.read_text())["expected"]]
    return [entry for entry in entries if not entry.host or applies(entry.host)]


@dataclass(frozen=True)
class Verdict:
    """The results of all rounds by spec, and what is known about them."""

    results: Mapping[str, Sequence[Result]]
    expected: Sequence[Expectation]

    @classmethod
    def of(cls, rounds: Iterable[Iterable[Result]], expected: Sequence[Expectation]) -> Verdict:
        """Put the rounds together."""
        found: dict[str, list[Result]] = {}
        for results in rounds:
            for result in results:
                found.setdefault(result.name, []).append(result)
        return cls(found, expected)

    def known(self, result: Result) -> Expectation | None:
        """What is expected of the spec of ``result``."""
        return next((entry for entry in self.expected if entry.covers(result)), None)

    def wrong(self, result: Result) -> bool:
        """Whether this is not as expected."""
        known = self.known(result)
        return result.outcome not in ("unselected", known.outcome if known else "pass")

    def of_outcome(self, outcome: Outcome) -> list[Result]:
        """Everything that ended so, in the order of names."""
        return [item for _, items in sorted(self.results.items()) for item in items if item.outcome == outcome]

    @property
    def good(self) -> bool:
        """Whether everything is as expected, and something was."""
        every = [item for items in self.results.values() for item in items]
        return any(item.outcome != "unselected" for item in every) and not any(map(self.wrong, every))


def table(verdict: Verdict) -> Iterator[str]:
    """The lines to print: what was skipped, by reason; what failed, with the error; the numbers."""
    yield from _skipped(verdict)
    yield from _section("failed", verdict.of_outcome("fail"), verdict)
    surprises = [result for result in verdict.of_outcome("pass") if verdict.wrong(result)]
    yield from _section("passed, but listed as not passing", surprises, verdict)
    for name, results in sorted(verdict.results.items()):
        if len({result.outcome for result in results}) > 1:
            yield f"unstable: {name}: {', '.join(result.outcome for result in results)}"
    yield _numbers(verdict)


def _numbers(verdict: Verdict) -> str:
    counts = {kind: len(verdict.of_outcome(kind)) for kind in ("pass", "fail", "skip", "unselected")}
    wrong = sum(verdict.wrong(result) for results in verdict.results.values() for result in results)
    known = f"{wrong} not as expected" if wrong else "all as expected" if verdict.good else "nothing ran"
    return "{pass} passed, {fail} failed, {skip} skipped, {unselected} not selected; ".format(**counts) + known


def _skipped(verdict: Verdict) -> Iterator[str]:
    reasons: dict[str, list[Result]] = {}
    for result in verdict.of_outcome("skip"):
        reasons.setdefault(result.message, []).append(result)
    for reason, results in sorted(reasons.items()):
        yield f"skipped: {reason}"
        yield from _specs(results, verdict)
        yield ""


def _section(title: str, results: Sequence[Result], verdict: Verdict) -> Iterator[str]:
    if results:
        yield f"{title}:"
        yield from _specs(results, verdict, explained=title == "failed")
        yield ""


def _specs(results: Sequence[Result], verdict: Verdict, *, explained: bool = False) -> Iterator[str]:
    """A line or two for each spec, marked if it is not as expected; what differs between rounds only once."""
    times = Counter(result.name for result in results)
    last = {result.name: result for result in results}
    for name, result in last.items():
        known = verdict.known(result)
        again = f" ({times[name]} times)" if times[name] > 1 else ""
        listed = f" [listed as {known.outcome}: {known.reason}]" if known and result.outcome != "skip" else ""
        yield f" {'!' if verdict.wrong(result) else ' '} {name}{again}{listed}"
        if explained:
            yield "      " + textwrap.shorten(_ID.sub(r"\1...", result.message), _MESSAGE_MAX)
