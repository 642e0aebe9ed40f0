"""The verdicts of one test: each criterion measured, recorded as it comes, and none forgotten."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from backends.contract import FaultRecord, Provenance
from qualification.criteria import Criterion
from qualification.quoting import unquoted

Write = Callable[..., None]
#: Of a fault, where there is none.
NO_FAULT = "none was brought about"


@dataclass(frozen=True)
class Verdict:
    """One criterion, measured or not."""

    criterion: Criterion
    verdict: str
    value: float | None
    fault: FaultRecord | None
    reason: str

    def lines(self, repeat: str) -> list[str]:
        """The four lines that a failure begins with."""
        value = (
            "nothing"
            if self.value is None
            else f"{self.criterion.name} = {self.value:.6g} {self.criterion.unit}".strip()
        )
        because = f" ({self.reason})" if self.reason else ""
        return [
            f"promised: {self.criterion.promise}",
            f"measured: {value}, limit {self.criterion.limit_text}{because}",
            f"fault:    {describe(self.fault)}",
            f"repeat:   {repeat}",
        ]


def describe(fault: FaultRecord | None) -> str:
    """Say in a line what a fault was."""
    if fault is None:
        return NO_FAULT
    how = fault.provenance.value if fault.provenance else None
    return fault_text(how, fault.points_seen, fault.faults_fired, fault.absorbed, fault.detail)


def fault_text(provenance: str | None, points_seen: int, faults_fired: int, absorbed: int, detail: str) -> str:
    """Say in a line what a fault was, by what a record has of it."""
    text = f"{provenance or 'never fired'}: {points_seen} points seen, {faults_fired} fired, {absorbed} absorbed"
    return (f"{text}; {detail}" if detail else text).replace("\n", " ")


@dataclass
class Judge:
    """Takes the measured values of one test. Every criterion of the test has to be judged exactly once."""

    test: str
    criteria: list[Criterion]
    write: Write
    verdicts: list[Verdict] = field(default_factory=list)
    evidence: list[str] = field(default_factory=list)
    #: What was written to the records, as it was.
    written: list[dict[str, Any]] = field(default_factory=list)
    #: The last line of a failure, instead of the promises that were broken.
    complaint: str = ""
    #: The capability that the backend says it does not have, and the test needs.
    lacking: str | None = None

    def __call__(
        self,
        name: str,
        value: float,
        *,
        fault: FaultRecord | None = None,
        series: Mapping[str, list[tuple[float, float]]] | None = None,
        unproved: str = "",
    ) -> None:
        """Judge one criterion and record it at once.

        A given fault that never fired is a failure, whatever the value, and so is what is ``unproved``, and why.
        """
        criterion = self._open(name)
        value = float(value)
        reason = ""
        passed = criterion.holds(value)
        if not math.isfinite(value):
            passed, reason = False, f"the value is {value}"
        if fault is not None and fault.faults_fired < 1:
            absorbed = "the runtime absorbed it" if fault.absorbed else "it never fired"
            passed, reason = False, f"the fault proves nothing: {absorbed}"
        if unproved:
            passed, reason = False, unproved
        self._add(Verdict(criterion, "pass" if passed else "fail", value, fault, reason), series)

    def limit(self, name: str) -> float:
        """Give the limit of a criterion of this test. Raises StopIteration for another name."""
        return next(each.limit for each in self.criteria if each.name == name)

    def say(self, line: str) -> None:
        """Add a line of evidence, shown when the test fails; what it has of a subject's words is to be ``quoted``."""
        self.evidence.append(line)

    @property
    def recorded(self) -> list[str]:
        """The evidence as it may be recorded."""
        return [unquoted(each) for each in self.evidence]

    @property
    def failed(self) -> list[Verdict]:
        """The verdicts that failed."""
        return [each for each in self.verdicts if each.verdict == "fail"]

    @property
    def unjudged(self) -> list[Criterion]:
        """The criteria that have no verdict yet."""
        judged = {each.criterion.name for each in self.verdicts}
        return [each for each in self.criteria if each.name not in judged]

    def end(self, verdict: str, reason: str, series: Mapping[str, list[tuple[float, float]]] | None = None) -> None:
        """Give every criterion that has none this verdict, with the reason; the first keeps ``series``."""
        for criterion in self.unjudged:
            self._add(Verdict(criterion, verdict, None, None, reason), series)
            series = None

    def _open(self, name: str) -> Criterion:
        for criterion in self.unjudged:
            if criterion.name == name:
                return criterion
        names = ", ".join(each.name for each in self.criteria)
        raise ValueError(f"{self.test} has no open criterion {name!r}: it has {names}, and each is judged once")

    def take(self, written: Sequence[Mapping[str, Any]], reason: str) -> None:
        """Take verdicts that another run had ``written`` as those of this one, and say so in their reasons."""
        for fields in written:
            fault = None
            if fields["provenance"] is not None or fields["points_seen"]:
                provenance = None if fields["provenance"] is None else Provenance(fields["provenance"])
                counts = (fields["points_seen"], fields["faults_fired"], fields["absorbed"])
                fault = FaultRecord(*counts, provenance, fields["detail"])
            why = "; ".join(each for each in (fields["reason"], reason) if each)
            verdict = Verdict(self._open(fields["criterion"]), fields["verdict"], fields["value"], fault, why)
            self._add(verdict, fields["series"])

    def _add(self, verdict: Verdict, series: Mapping[str, Any] | None) -> None:
        self.verdicts.append(verdict)
        fault = verdict.fault
        fields = {
            "test": self.test,
            "criterion": verdict.criterion.name,
            "verdict": verdict.verdict,
            "value": verdict.value,
            "relation": verdict.criterion.relation,
            "limit": verdict.criterion.limit,
            "unit": verdict.criterion.unit,
            "provenance": fault.provenance.value if fault and fault.provenance else None,
            "points_seen": fault.points_seen if fault else 0,
            "faults_fired": fault.faults_fired if fault else 0,
            "absorbed": fault.absorbed if fault else 0,
            "detail": unquoted(fault.detail) if fault else "",
            "reason": unquoted(verdict.reason),
            "capability": self.lacking if verdict.verdict == "not_run" else None,
            "series": series,
        }
        self.written.append(fields)
        self.write(**fields)
