"""How runs ended is kept for other tools, whoever writes at the same time, and a command is told without a shell."""

from __future__ import annotations

import json
import os
import resource
import sqlite3
import stat
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qualification import history

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable


def _summary(verdict: str = "pass", **more: Any) -> dict[str, Any]:
    return {"finished": "2026-11-27T10:00:00+00:00", "verdict": verdict, **more}


def _rows(path: Path, query: str = "SELECT * FROM history ORDER BY id") -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute(query).fetchall()


# The file.


def test_what_was_stored_last_is_the_status(tmp_path: Path) -> None:
    path = tmp_path / "made" / "history.sqlite"
    for number, verdict in enumerate(("pass", "not_run", "fail")):
        history.store(path, history.KEY, _summary(verdict, number=number))
    assert history.last(path) == _summary("fail", number=2)
    assert [row[0] for row in _rows(path)] == [1, 2, 3], "a row was lost or replaced"
    key, finished, verdict, summary = _rows(path, "SELECT key, finished, verdict, summary FROM history")[1]
    assert (key, finished, verdict) == ("hive/tests/oom-prevention", "2026-11-27T10:00:00+00:00", "not_run")
    assert json.loads(summary) == _summary("not_run", number=1), (
        f"the summary is not the JSON that was given: {summary}"
    )


def test_each_key_has_its_own_status(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    for key, verdict in (("a", "pass"), ("b", "fail"), ("a", "fail"), ("b", "pass")):
        history.store(path, key, _summary(verdict))
    assert [history.last(path, key) for key in ("a", "b", "c")] == [_summary("fail"), _summary("pass"), None]
    shown = _rows(path, "SELECT key, verdict FROM status ORDER BY key")
    assert shown == [("a", "fail"), ("b", "pass")], f"the view shows {shown}"


def test_the_file_is_private_whatever_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    before = os.umask(0)
    try:
        history.store(path, "k", _summary())
    finally:
        os.umask(before)
    assert (mode := stat.S_IMODE(path.stat().st_mode)) == 0o600, f"mode is {mode:o}"
    assert [each.name for each in tmp_path.iterdir()] == [path.name], "something else was left beside it"


def test_runs_that_end_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path, processes, each = tmp_path / "history.sqlite", 4, 8
    program = (
        "import sys, time; from pathlib import Path; from qualification import history\n"
        "time.sleep(max(0, float(sys.argv[3]) - time.time()))\n"
        "for number in range(int(sys.argv[4])):\n"
        "    summary = {'finished': 'now', 'verdict': 'pass', 'number': number}\n"
        "    history.store(Path(sys.argv[1]), sys.argv[2], summary)"
    )
    words = [PYTHON, "-c", program, str(path)]
    begin = str(time.time() + 1)
    writers = [
        subprocess.Popen([*words, key, begin, str(each)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for key in map(str, range(processes))
    ]
    said = [writer.communicate(timeout=60)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * processes, f"{said}"
    found = dict(_rows(path, "SELECT key, count(*) FROM history GROUP BY key"))
    assert found == {str(key): each for key in range(processes)}, f"rows by writer: {found}"
    assert all((history.last(path, str(key)) or {})["number"] == each - 1 for key in range(processes))


def test_it_waits_for_one_that_writes_and_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "history.sqlite"
    history.store(path, "k", _summary())
    monkeypatch.setattr(history, "_LOCKED_S", 0.2)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        for call in (partial(history.store, path, "k", _summary("fail")), partial(history.last, path, "k")):
            with pytest.raises(history.HistoryError, match=f"{path}: .*: database is locked"):
                call()
    assert history.last(path, "k") == _summary(), "what could not be stored changed the status"


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    file.write_bytes(b"this is no database, and it is long enough to be read as one: " * 20)
    cases = {
        folder: "Is a directory",
        file: "file is not a database",
        file / "history.sqlite": "Not a directory|File exists",
    }
    for path, reason in cases.items():
        with pytest.raises(history.HistoryError, match=f"{path}: the status cannot be stored: .*({reason})"):
            history.store(path, "k", _summary())
    with pytest.raises(history.HistoryError, match=f"{file}: the status cannot be read: file is not a database"):
        history.last(file)
    for path in (folder, tmp_path / "none"):
        with pytest.raises(history.HistoryError, match=f"{path}: there is no history; a run makes it"):
            history.last(path)
    assert not (tmp_path / "none").exists(), "looking for a status made a file"
    assert file.read_bytes().startswith(b"this is no database"), "a file of somebody else was written to"


def test_a_database_of_another_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE history (something TEXT)")
    with pytest.raises(history.HistoryError, match=r"other\.sqlite: the status cannot be read: no such column: "):
        history.last(path)
    with pytest.raises(history.HistoryError, match=r"other\.sqlite: the status cannot be stored: "):
        history.store(path, "k", _summary())
    assert _rows(path, "SELECT count(*) FROM history") == [(0,)]


@pytest.mark.parametrize("summary", ["[1]", "3", "null", "{", "{}"])
def test_a_summary_that_is_none_is_an_error(tmp_path: Path, summary: str) -> None:
    path = tmp_path / "history.sqlite"
    history.store(path, "k", _summary())
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE history SET summary = ?", (summary,))
    with pytest.raises(history.HistoryError, match=f"{path}: the status cannot be read: "):
        history.last(path, "k")


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/usr/bin/setpriv").exists(), reason="root may do everything here")
def test_without_permission_there_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "locked" / "history.sqlite"
    history.store(path, "k", _summary())
    program = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path; from qualification import history\n"
        "path, summary = Path(sys.argv[1]), {'finished': '', 'verdict': 'pass'}\n"
        "for call in (lambda: history.last(path), lambda: history.store(path, 'k', summary)):\n"
        "    try: call(); print('no error')\n"
        "    except history.HistoryError as error: print(error)"
    )
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--"] if os.geteuid() == 0 else []
    path.parent.chmod(0)
    try:
        done = subprocess.run(
            [*drop, PYTHON, "-c", program, str(path), str(ROOT)], capture_output=True, text=True, check=False
        )
    finally:
        path.parent.chmod(0o700)
    lines = done.stdout.splitlines()
    assert [line.startswith(f"{path}: the status cannot be ") for line in lines] == [True] * 2, f"{lines}{done.stderr}"
    assert all("Permission denied" in line for line in lines), f"{lines}"


def test_a_file_that_may_not_grow_keeps_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    history.store(path, "k", _summary())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, before[1]))
    try:
        with pytest.raises(history.HistoryError, match=f"{path}: the status cannot be stored: "):
            history.store(path, "k", _summary("fail", text="x" * 100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert history.last(path, "k") == _summary(), "the status before is lost"
    history.store(path, "k", _summary("fail"))
    assert history.last(path, "k") == _summary("fail"), "it is damaged"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    path.symlink_to("/dev/full")
    with pytest.raises(history.HistoryError, match=f"{path}: the status cannot be stored: "):
        history.store(path, "k", _summary())


def test_only_known_verdicts_are_stored(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    with pytest.raises(history.HistoryError, match=f"{path}: .*CHECK constraint failed"):
        history.store(path, "k", _summary("green"))
    assert history.last(path, "k") is None


# The command.


def _program(text: str) -> list[str]:
    return [PYTHON, "-c", text]


def test_the_command_gets_the_summary_on_its_standard_input(tmp_path: Path) -> None:
    out, summary = tmp_path / "out", _summary(text='Grüße, "quoted"\nand more', number=3)
    save = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.stdin.read())"
    assert history.tell([*_program(save), str(out)], summary) is None
    assert out.read_text().endswith("\n") and json.loads(out.read_text()) == summary, f"it got {out.read_text()}"


def test_no_shell_reads_the_command(tmp_path: Path) -> None:
    words = ["; touch x", "$(touch x)", "`touch x`", "* ~ $HOME > x", "a  b", ""]
    save = "import json, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(json.dumps(sys.argv[2:]))"
    assert history.tell([*_program(save), str(tmp_path / "out"), *words], _summary()) is None
    assert json.loads((tmp_path / "out").read_text()) == words, "words are not what was given"
    assert not (ROOT / "x").exists() and not Path("x").exists(), "a shell has read it"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (_program("raise SystemExit(3)"), f"--on-finish {PYTHON}: it ended with 3"),
        (_program("import os; os.abort()"), f"--on-finish {PYTHON}: it ended with -6"),
        (["/nowhere/hook"], "--on-finish /nowhere/hook: it cannot be run: "),
        (["/"], "--on-finish /: it cannot be run: "),
        (["a\0b"], "--on-finish a\0b: it cannot be run: embedded null byte"),
    ],
    ids=["status", "signal", "missing", "folder", "null"],
)
def test_a_command_that_fails_is_told_and_nothing_more(
    tmp_path: Path, command: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a core goes there, if anywhere
    said = history.tell(command, _summary())
    assert said is not None and said.startswith(expected), f"it says {said}"


@pytest.mark.parametrize("status", [0, 5])
def test_a_command_need_not_read_what_it_is_told(status: int) -> None:
    said = history.tell(_program(f"raise SystemExit({status})"), _summary(text="x" * (1 << 20)))
    expected = f"--on-finish {PYTHON}: it ended with {status}" if status else None
    assert said == expected, f"it says {said}"


@pytest.mark.parametrize("size", [1, 1 << 20], ids=["small", "more than a pipe holds"])
def test_a_command_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(history, "ON_FINISH_TIMEOUT_S", 1.0)
    late = tmp_path / "late"
    program = f"import pathlib, time; time.sleep(20); pathlib.Path({str(late)!r}).touch()"
    began_s = time.monotonic()
    said = history.tell(_program(program), _summary(text="x" * size))
    took_s = time.monotonic() - began_s
    assert said == f"--on-finish {PYTHON}: it took longer than 1 s, and was ended", f"it says {said}"
    assert took_s < 10, f"it was ended after {took_s:.1f} s, and not after 1 s"


def test_one_that_fails_does_not_keep_the_other_from_its_turn(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.stdin.read()); raise SystemExit(1)"
    wrong = history.publish(_summary(), tmp_path, "k", [*_program(save), str(out)])
    assert [each.split(": ")[0] for each in wrong] == [str(tmp_path), f"--on-finish {PYTHON}"], f"it says {wrong}"
    assert json.loads(out.read_text()) == _summary()
    assert history.publish(_summary(), tmp_path / "history.sqlite", "k") == []
