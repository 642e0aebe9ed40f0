"""The records that a report is made of: read from folders, verified, and merged.

Merging is the union of the records, so it does not matter how often and in which order it is done.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qualification import records
from qualification.records import Record, RecordError
from qualification.report import shape

#: ENVIRONMENT-BACKEND-TIME-PROCESS.jsonl
_NAME = re.compile(r"(?P<environment>[a-z][a-z0-9]*)-(?P<backend>[a-z0-9-]+)-\d{8}T\d{6}-\d+\.jsonl")
#: What a sweep or a test that was cut off keeps beside the records.
_UNFINISHED = "unfinished-"
#: How the problem begins of a record that is sound as far as it goes.
CUT_OFF = "truncated"
#: More than any record has; what is not one is not read whole.
_BYTES_MAX = 64 << 20


class GatherError(ValueError):
    """A folder cannot be read. The message says which."""


@dataclass(frozen=True)
class Source:
    """One file: a verified record, or what is wrong with it."""

    name: str
    #: Of the whole file.
    sha256: str
    #: As far as it is sound; None where not even its first line is.
    record: Record | None = field(compare=False)
    #: Why it proves nothing ("": it is sound and whole).
    problem: str = ""
    #: Which cell it is of, by its first line, or else by its name: ("", "") where neither says.
    backend: str = ""
    environment: str = ""

    @property
    def run(self) -> dict[str, Any]:
        """The fields of its first line; none where that is not sound."""
        return self.record.run if self.record is not None else {}

    @property
    def machine(self) -> dict[str, Any]:
        """What its first line says of the machine."""
        found = self.run.get("machine")
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Evidence:
    """Any number of records: ``a + b`` is those of both, each once."""

    sources: frozenset[Source] = frozenset()

    def __add__(self, other: Evidence) -> Evidence:
        """Merge two sets of records."""
        return Evidence(self.sources | other.sources)

    def __iter__(self) -> Iterator[Source]:
        """Go through them, the earliest first, the same way every time."""
        return iter(sorted(self.sources, key=lambda each: (str(each.run.get("began", "")), each.name, each.sha256)))


def gather(folders: Iterable[Path]) -> Evidence:
    """Read every record in some folders, and in what is below them. Raises GatherError."""
    found: set[Source] = set()
    for folder in folders:
        if not folder.is_dir():
            raise GatherError(f"{folder}: there is no such folder; expected one that a run wrote its records to")

        def refuse(error: OSError) -> None:
            # What may not be looked into could hold a failure.
            raise GatherError(f"{error.filename}: it cannot be read: {error.strerror}") from error

        seen: set[Path] = set()
        for where, below, names in os.walk(folder, onerror=refuse, followlinks=True):
            if (here := Path(where).resolve()) in seen:
                below.clear()  # a link into what was read already
                continue
            seen.add(here)
            paths = [Path(where) / name for name in names if name.endswith(".jsonl")]
            found |= {read(path) for path in paths if not path.name.startswith(_UNFINISHED)}
    return Evidence(frozenset(found))


def read(path: Path) -> Source:
    """Read one file, and say what is wrong with it: nothing is raised, for what is damaged belongs in the report."""
    named = _NAME.fullmatch(path.name)
    cell = (named["backend"], named["environment"]) if named else ("", "")
    try:
        size_bytes = path.stat().st_size
        if size_bytes > _BYTES_MAX:
            return Source(path.name, "", None, f"it has {size_bytes} bytes: no record is that large", *cell)
        raw = path.read_bytes()
    except OSError as error:
        return Source(path.name, "", None, f"it cannot be read: {error.strerror}", *cell)
    sha256 = hashlib.sha256(raw).hexdigest()
    problem, record = "", None
    try:
        record = records.read(path, partial=True)
    except RecordError as error:
        problem = str(error).removeprefix(f"{path}: ")
        record = _first_line_of(raw)
    if record is None:
        return Source(path.name, sha256, None, problem, *cell)
    if record.run.get("schema_version") != records.SCHEMA_VERSION:
        # What else it has means what it meant then.
        record = Record(shape.reduced(record.run), (), record.complete)
        own = (str(record.run.get("backend", "")), str(record.run.get("environment", "")))
        return Source(path.name, sha256, record, problem, *own)
    run = record.run
    own = (str(run.get("backend", "")), str(run.get("environment", "")))
    if not problem and (misshapen := shape.wrong_with(record)):
        # What it says cannot be relied on: not even which machine it is of.
        return Source(path.name, sha256, None, misshapen, *own)
    if not problem and not record.complete:
        problem = f"{CUT_OFF}: it has no end line, so the run was killed or the file was cut"
    problem = problem or _inconsistency(record, own, cell)
    return Source(path.name, sha256, record, problem, *own)


def _first_line_of(raw: bytes) -> Record | None:
    """Give what the first line of a damaged record says it is of: to be shown, and no proof of anything."""
    try:
        run = json.loads(raw.split(b"\n", 1)[0])
    except (ValueError, RecursionError):
        return None
    if not isinstance(run, dict) or not isinstance(run.get("backend"), str):
        return None
    record = Record(run, (), complete=False)
    # Of one that is not what it has to be, no more than whose it is.
    return Record(shape.reduced(run), (), complete=False) if shape.wrong_with(record) else record


def _inconsistency(record: Record, own: tuple[str, str], named: tuple[str, str]) -> str:
    """Say how a record contradicts itself, or its name."""
    if named == ("", ""):
        return "its name is not that of a record, ENVIRONMENT-BACKEND-TIME-PROCESS.jsonl: was it renamed?"
    if own != named:
        return (
            f"its name is of {' in '.join(named)}, and its first line of {' in '.join(own)}: it was copied or renamed"
        )
    for line in (*record.criteria, *record.sweeps, *record.tests):
        whose = (str(line.get("backend", "")), str(line.get("environment", "")))
        if whose != own:
            return f"a line of {line.get('test')} is of {' in '.join(whose)}, and its first line of {' in '.join(own)}"
    return ""


def copies(evidence: Evidence) -> dict[Source, str]:
    """Say of each file that holds the same run as another, the first by name, which that is."""
    first: dict[str, Source] = {}
    found: dict[Source, str] = {}
    for each in sorted(evidence.sources, key=lambda source: (source.name, source.sha256)):
        if not each.run:
            continue
        earlier = first.setdefault(json.dumps(each.run, sort_keys=True), each)
        if earlier is not each:
            same = "the same" if earlier.sha256 == each.sha256 else "other"
            found[each] = f"it is the same run as {earlier.name}, with {same} content: it was copied"
    return found
