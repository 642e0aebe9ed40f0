"""Which records prove something: whole, of one run, of this version of the suite, and of one version of the subject."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qualification import identity
from qualification.criteria import CRITERIA
from qualification.records import SCHEMA_VERSION as RECORD_VERSION
from qualification.report.gather import CUT_OFF, Evidence, Source, copies
from qualification.report.text import some


@dataclass(frozen=True)
class Expected:
    """What a record has to be of: these sources of the suite, and of the subject that ships."""

    suite_sha256: str
    shipped_subject_sha256: str
    pins: Path = identity.ROOT / "constraints"

    @classmethod
    def here(cls) -> Expected:
        """Take this checkout."""
        return cls(identity.suite()["suite_sha256"], identity.shipped_subject()["subject_sha256"])


def wrong_records(evidence: Evidence, expected: Expected, pairs: set[tuple[str, str]]) -> dict[Source, str]:
    """Say of each record that proves nothing, why."""
    wrong = {each: each.problem for each in evidence if each.problem}
    for source, reason in copies(evidence).items():
        wrong[source] = f"{reason}; {wrong[source]}" if source in wrong else reason
    # Of the sound ones of this suite, the last says which subject it is about.
    sound = [each for each in evidence if each not in wrong and not each.run.get("not_run")]
    newest = next((each.run for each in reversed(sound) if _version(each, expected) == ""), {})
    resumed = _resumed(evidence, wrong)
    for source in evidence:
        version = _version(source, expected)
        if source in resumed and not version:
            wrong.pop(source, None)  # cut off, and gone on with: the other record has all of it
            continue
        reason = (
            version
            or ("" if (source.backend, source.environment) in pairs else _undeclared(source))
            or _subject(source, newest)
            or _too_few(source)
            or _without_what_it_goes_on_with(source, evidence)
        )
        if reason:
            wrong.setdefault(source, reason)
    return wrong


def _version(source: Source, expected: Expected) -> str:
    """Say how a record is of another version of the suite, or of the subject that ships."""
    run = source.run
    if source.record is None:
        return ""
    if run.get("schema_version") != RECORD_VERSION:
        return f"another version of the suite: its schema is {run.get('schema_version')!r}, and not {RECORD_VERSION}"
    if run.get("suite_sha256") != expected.suite_sha256:
        which, here = run.get("suite_commit") or run.get("suite_version"), identity.suite()["suite_commit"]
        return (
            f"another version of the suite: {which}, sources {str(run.get('suite_sha256'))[:12]}; "
            f"this is {here}, {expected.suite_sha256[:12]}"
        )
    if (
        not run.get("not_run")
        and _ships(str(run.get("subject")))
        and run.get("subject_sha256") != expected.shipped_subject_sha256
    ):
        return (
            f"another version of the subject: {run.get('subject')} {run.get('subject_version')}, sources "
            f"{str(run.get('subject_sha256'))[:12]}; here they are {expected.shipped_subject_sha256[:12]}"
        )
    return ""


def _ships(subject: str) -> bool:
    """Whether a subject is of the package that ships, named as a module or as a file."""
    where = subject.rpartition(":")[0]
    return where.split(".")[0] == "protection" or Path(where).parent.name == "protection"


def _undeclared(source: Source) -> str:
    where = f"{source.backend} in {source.environment}" if source.backend else "no cell"
    return f"it is of {where}, which is not declared"


def _subject(source: Source, newest: Mapping[str, Any]) -> str:
    """Say how a record is about another subject, model or audio than the newest."""
    run = source.run
    if not run or run.get("not_run") or not newest:
        return ""
    # Without sources that can be hashed its version is all that is known.
    version = () if run.get("subject_sha256") else ("subject_version",)
    for name in ("subject", "subject_sha256", *version, "model_sha256", "audio_sha256"):
        # Of a file the name counts, wherever it lies.
        if Path(str(run.get(name))).name != Path(str(newest.get(name))).name:
            what = "version of the subject" if name == "subject_sha256" else name.removesuffix("_sha256")
            its, newer = str(run.get(name))[:80], str(newest.get(name))[:80]
            return f"another {what} than in the newest record: {its}, and there {newer}"
    return ""


def _too_few(source: Source) -> str:
    """Say what a record lacks of what it collected."""
    record = source.record
    if record is None or source.run.get("not_run"):
        return ""
    collected = source.run["collected"]
    if source.run.get("point"):
        return f"fewer results than collected: of the sweep it tried the point {source.run['point']} alone"
    if not collected:
        return "zero tests: it collected none"
    ended = {str(each.get("id")) for each in record.tests}
    missing = [str(each) for each in collected if each not in ended]
    if missing:
        return f"fewer results than collected: {len(ended)} of {len(collected)} tests, without {some(missing)}"
    measured = {(line.get("test"), line.get("criterion")) for line in record.criteria}
    names = {str(each.get("test")) for each in record.tests}
    lacking = [
        f"{each.test}/{each.name}" for each in CRITERIA if each.test in names and (each.test, each.name) not in measured
    ]
    if lacking:
        return f"fewer results than collected: {some(lacking)} has no verdict"
    return ""


def _without_what_it_goes_on_with(source: Source, evidence: Evidence) -> str:
    """Say which record that was cut off is not there any more: a failure may be in it that was not repeated."""
    there = {(each.name, each.sha256) for each in evidence}
    gone = [each["file"] for each in source.run.get("resumes") or () if (each["file"], each["sha256"]) not in there]
    return f"it goes on with {some(gone)}, which is not here as it was then" if gone else ""


def _resumed(evidence: Evidence, wrong: Mapping[Source, str]) -> set[Source]:
    """Give the records that were cut off, as far as they go sound, and that a whole one says it went on with."""
    taken = {
        (str(before["file"]), str(before["sha256"]), each.backend, each.environment, each.machine.get("id"))
        for each in evidence
        if each not in wrong and not _too_few(each)
        for before in each.run.get("resumes") or ()
    }
    return {
        each
        for each in evidence
        if each.record is not None
        and (each not in wrong or each.problem.startswith(CUT_OFF))
        # As it was when the other began: what was cut off it since may have been a failure.
        and (each.name, each.sha256, each.backend, each.environment, each.machine.get("id")) in taken
    }
