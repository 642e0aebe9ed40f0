"""What a result is about stays the same wherever the checkout lies, and changes with every source that judges."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from qualification import __version__, identity
from qualification.subject import DEFAULT_SUBJECT, load_factory

ROOT = Path(__file__).resolve().parents[2]
SHA256 = re.compile("[0-9a-f]{64}")
#: What Python runs where nothing is installed: these are refused, and so is all else that is not its own.
BARE = """
import sys
from importlib.abc import MetaPathFinder

class Refusing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in (*sys.stdlib_module_names, "qualification", "backends"):
            raise ImportError(f"{name} is not Python's own")

sys.meta_path.insert(0, Refusing())
sys.path.insert(0, sys.argv[1])
"""


def _sources(root: Path) -> list[Path]:
    return [path for pattern in identity.SUITE for path in root.glob(pattern)]


@pytest.fixture(scope="module")
def checkouts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two copies of what there is, at places of another depth."""
    skipped = shutil.ignore_patterns("__pycache__", ".git", ".nox", ".venv", "results", "*.svg", ".*cache")
    base = tmp_path_factory.mktemp("checkouts")
    places = [base / "a", base / "b" / "deeper" / "main"]
    for place in places:
        for name in ("backends", "qualification", "protection", "tests", "docs", "gates"):
            shutil.copytree(ROOT / name, place / name, ignore=skipped)
        shutil.copy(ROOT / "pytest_memory.ini", place)
    return places


# The suite.


def test_the_digest_does_not_depend_on_where_the_checkout_lies(checkouts: list[Path]) -> None:
    here, *there = [identity.digest(root, _sources(root)) for root in (ROOT, *checkouts)]
    assert there == [here, here], f"here {here[:12]}, elsewhere {[each[:12] for each in there]}"
    assert identity.suite()["suite_sha256"] == here


@pytest.mark.parametrize(
    ("name", "judges"),
    [
        ("backends/cpu.py", True),
        ("backends/faults/interposer.c", True),
        ("backends/data/acoustic.onnx", True),
        ("qualification/criteria.py", True),
        ("qualification/sweep/points.py", True),
        ("tests/test_oom_recovery.py", True),
        ("tests/data/speech.wav", True),
        ("pytest_memory.ini", True),
        ("qualification/report/verdict.py", False),
        ("qualification/report/page.html.jinja", False),
        ("protection/ladder.py", False),
        ("docs/architecture.md", False),
        ("gates/release.toml", False),
        ("tests/unit/test_criteria.py", False),
        ("tests/meta/broken.py", False),
    ],
)
def test_it_changes_with_what_judges_and_with_nothing_else(checkouts: list[Path], name: str, judges: bool) -> None:
    root = checkouts[0]
    path, before = root / name, identity.digest(root, _sources(root))
    content = path.read_bytes()
    path.write_bytes(content + b"\n")
    try:
        changed = identity.digest(root, _sources(root)) != before
    finally:
        path.write_bytes(content)
    assert changed is judges, f"a change in {name} {'makes another' if changed else 'leaves the'} suite"
    assert identity.digest(root, _sources(root)) == before


def test_names_and_ends_of_files_count(tmp_path: Path) -> None:
    def digest(files: dict[str, str]) -> str:
        folder = tmp_path / hashlib.sha256(json.dumps(files).encode()).hexdigest()
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return identity.digest(folder, [folder])

    same = digest({"a.py": "x = 1", "b/c.py": "y = 2"})
    assert same == digest({"a.py": "x = 1", "b/c.py": "y = 2", "notes.txt": "", "b/d.pyc": "old"})
    others = [{"a.py": "x = 1"}, {"a.py": "x = 1", "c.py": "y = 2"}, {"a.py": "x = 1y", "b/c.py": " = 2"}]
    found = [digest(each) for each in others]
    assert same not in found and len(set(found)) == 3, f"of three other folders: {found}, as {same}"


def test_the_suite_names_version_and_commit() -> None:
    found = identity.suite()
    assert found["suite_version"] == __version__
    assert found["suite_commit"] == identity.commit(ROOT)
    assert SHA256.fullmatch(found["suite_sha256"])


def test_a_commit_is_told_with_what_was_changed_in_it(tmp_path: Path) -> None:
    assert identity.commit(tmp_path) is None, "a folder that is of no repository has a commit"
    assert identity.commit(tmp_path / "none") is None
    if shutil.which("git") is None:
        pytest.skip("not run: git is not installed")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    (tmp_path / "a.py").write_text("x = 1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *words], check=True)
    clean = identity.commit(tmp_path)
    (tmp_path / "a.py").write_text("x = 2")
    assert clean and identity.commit(tmp_path) == f"{clean}-dirty", f"clean {clean}, then {identity.commit(tmp_path)}"


# The subject.


def test_the_subject_that_ships_is_found_without_importing_it() -> None:
    assert identity.shipped_subject() == identity.subject(load_factory(DEFAULT_SUBJECT))


def _made(folder: Path, name: str, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    return load_factory(name)


FACTORY = "def factory(context):\n    return None\n"


def test_a_package_is_all_that_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"mine_whole/__init__.py": "", "mine_whole/app.py": FACTORY, "mine_whole/deep/more.py": "x = 1\n"}
    factory = _made(tmp_path, "mine_whole.app:factory", files, monkeypatch)
    first = identity.subject(factory)
    assert first["subject_version"] is None and SHA256.fullmatch(first["subject_sha256"])
    (tmp_path / "beside.py").write_text("y = 1\n")
    assert identity.subject(factory) == first, "what is not in the package counts"
    (tmp_path / "mine_whole" / "deep" / "more.py").write_text("x = 2\n")
    assert identity.subject(factory)["subject_sha256"] != first["subject_sha256"], "what is deep in it does not count"


def test_an_installed_package_has_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = tmp_path / "mine_app-1.2.3.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine-app\nVersion: 1.2.3\n")
    (about / "top_level.txt").write_text("mine_app\n")
    (about / "RECORD").write_text("")
    factory = _made(tmp_path, "mine_app:factory", {"mine_app/__init__.py": FACTORY}, monkeypatch)
    assert identity.subject(factory)["subject_version"] == "mine-app 1.2.3"


def test_of_a_file_that_stands_alone_what_stands_beside_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factory = _made(
        tmp_path, f"{tmp_path / 'app.py'}:factory", {"app.py": FACTORY, "beside.py": "x = 1\n"}, monkeypatch
    )
    first = identity.subject(factory)
    assert first["subject_version"] is None and SHA256.fullmatch(first["subject_sha256"])
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "other.py").write_text("y = 1\n")
    assert identity.subject(factory) == first, "what lies in a folder below counts"
    (tmp_path / "beside.py").write_text("x = 2\n")
    assert identity.subject(factory)["subject_sha256"] != first["subject_sha256"], "what stands beside does not count"


@pytest.mark.parametrize("factory", [int, types.SimpleNamespace()], ids=["built in", "no source"])
def test_what_has_no_source_has_no_version(factory: Any) -> None:
    assert identity.subject(factory) == {"subject_version": None, "subject_sha256": None}


# The machine.


def test_a_machine_keeps_its_id_and_another_name_has_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(identity.MACHINE, raising=False)
    own = identity.machine()
    assert own == identity.machine() and re.fullmatch("[0-9a-f]{12}", own["id"]), f"{own}"
    assert own["processors"] and own["memory_bytes"] > 1 << 28 and own["system"] and own["python"]
    found = []
    for name in ("rack-1", "rack-2", "rack-1"):
        monkeypatch.setenv(identity.MACHINE, name)
        found.append(identity.machine())
    assert [each["name"] for each in found] == ["rack-1", "rack-2", "rack-1"]
    assert found[0] == found[2] and len({own["id"], found[0]["id"], found[1]["id"]}) == 3, f"{found}"
    monkeypatch.setenv(identity.MACHINE, "")
    assert identity.machine() == own, "an empty name is one"


def test_the_number_of_the_machine_itself_is_not_shown() -> None:
    path = Path("/etc/machine-id")
    own = path.read_text().strip() if path.is_file() else ""
    if not own:
        pytest.skip("not run: this machine has no /etc/machine-id")
    assert own not in json.dumps(identity.machine())


# What a machine needs for it on which nothing is installed.


def test_nothing_but_python_is_needed(tmp_path: Path) -> None:
    program = BARE + (
        "import json\n"
        "from pathlib import Path\n"
        "from qualification import history, identity, records\n"
        "folder = Path(sys.argv[2])\n"
        "about = {**identity.suite(), 'machine': identity.machine(),\n"
        "'backend': 'torch-cuda', 'environment': 'cuda13'}\n"
        "written = records.write_not_run(folder, about, 'no NVIDIA driver')\n"
        "assert records.read(written).complete\n"
        "history.store(folder / 'history.sqlite', 'k', {'finished': records.now(), 'verdict': 'not_run'})\n"
        "found = history.last(folder / 'history.sqlite', 'k')\n"
        "told = history.tell([sys.executable, '-c', ''], found)\n"
        "print(json.dumps([written.name, identity.suite(), identity.shipped_subject(), found['verdict'], told]))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-I", "-c", program, str(ROOT), str(tmp_path / "new")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    name, suite, shipped, verdict, told = json.loads(done.stdout)
    assert name.startswith("cuda13-torch-cuda-") and (tmp_path / "new" / name).is_file()
    assert (suite, shipped) == (identity.suite(), identity.shipped_subject()), "it is another suite or subject there"
    assert (verdict, told) == ("not_run", None)


def test_the_interpreter_of_that_test_really_refuses() -> None:
    program = BARE + "import numpy"
    done = subprocess.run([sys.executable, "-c", program, str(ROOT)], capture_output=True, text=True, check=False)
    assert "ImportError: numpy is not Python's own" in done.stderr, done.stderr
