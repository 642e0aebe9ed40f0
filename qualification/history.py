"""How finished runs ended, for other tools: an SQLite file beside the records, and a command that is told.

    python -m qualification status [--history results/history.sqlite] [--key hive/tests/oom-prevention]

Table ``history``: ``id``, ``key``, ``finished`` (UTC), ``verdict`` (pass, fail or not_run) and ``summary``, which is
JSON. The last status is the row of the key with the greatest ``id``; the view ``status`` has it for every key. Audio
and answers never enter.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

FILE = "history.sqlite"
KEY = "hive/tests/oom-prevention"
#: A command that is told has to come to its end: the run waits for it.
ON_FINISH_TIMEOUT_S = 60.0
_LOCKED_S = 10.0
_TABLES = """
CREATE TABLE IF NOT EXISTS history (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL,
    finished TEXT NOT NULL,
    verdict TEXT NOT NULL CHECK (verdict IN ('pass', 'fail', 'not_run')),
    summary TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS history_key ON history (key, id);
CREATE VIEW IF NOT EXISTS status AS
    SELECT key, finished, verdict, summary FROM history WHERE id IN (SELECT max(id) FROM history GROUP BY key);
"""
_LAST = """
SELECT summary FROM history WHERE key = :key AND (:kind IS NULL OR json_extract(summary, '$.kind') = :kind)
ORDER BY id DESC LIMIT 1
"""


class HistoryError(Exception):
    """The history cannot be read or written. The message names the file."""


def store(path: Path, key: str, summary: Mapping[str, Any]) -> None:
    """Add the ``summary`` of a run, which has ``finished`` and ``verdict``, to the history (mode 0600).

    Raises HistoryError. Runs that end at the same time wait for each other.
    """
    row = (key, summary["finished"], summary["verdict"], json.dumps(summary, sort_keys=True))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))  # SQLite would make it for everyone
        with closing(sqlite3.connect(path, timeout=_LOCKED_S)) as database:
            database.executescript(_TABLES)
            with database:
                database.execute("INSERT INTO history (key, finished, verdict, summary) VALUES (?, ?, ?, ?)", row)
    except (OSError, sqlite3.Error) as error:
        raise HistoryError(f"{path}: the status cannot be stored: {error}") from error


def last(path: Path, key: str = KEY, kind: str | None = None) -> dict[str, Any] | None:
    """Give the summary that was stored last under a key, of a ``kind`` (run, report) or any, or None.

    Raises HistoryError.
    """
    try:
        if not path.is_file():
            raise HistoryError(f"{path}: there is no history; a run makes it")
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", timeout=_LOCKED_S, uri=True)) as database:
            row = database.execute(_LAST, {"key": key, "kind": kind}).fetchone()
        found = None if row is None else dict(json.loads(row[0]))
        if found is not None and "verdict" not in found:
            raise ValueError("its summary has no verdict")
        return found
    except (OSError, sqlite3.Error, ValueError, TypeError) as error:
        raise HistoryError(f"{path}: the status cannot be read: {error}") from error


def tell(command: Sequence[str], summary: Mapping[str, Any]) -> str | None:
    """Run a command, an argument vector and never a shell, with the summary as JSON on its standard input.

    Give None, or what went wrong: nothing of a run depends on it.
    """
    try:
        done = subprocess.run(
            list(command),
            input=json.dumps(summary, sort_keys=True) + "\n",
            text=True,
            timeout=ON_FINISH_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"--on-finish {command[0]}: it took longer than {ON_FINISH_TIMEOUT_S:g} s, and was ended"
    except (OSError, ValueError) as error:
        return f"--on-finish {command[0]}: it cannot be run: {error}"
    return f"--on-finish {command[0]}: it ended with {done.returncode}" if done.returncode else None


def publish(summary: Mapping[str, Any], path: Path, key: str, command: Sequence[str] = ()) -> list[str]:
    """Store a summary and tell the command of it; give what went wrong."""
    wrong = []
    try:
        store(path, key, summary)
    except HistoryError as error:
        wrong.append(str(error))
    if command and (failed := tell(command, summary)):
        wrong.append(failed)
    return wrong
