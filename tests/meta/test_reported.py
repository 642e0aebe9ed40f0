"""One report from real runs on two machines: every declared cell is there, and what was spoilt turns it red."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import backends
from tests.meta.qualifying import RECOVERY, ROOT, qualify
from tests.unit.browsing import Seen, browse, check_links

DETECTION = f"{RECOVERY}::TestOOMDetection"
#: One of its criteria is not kept, and each of the others is.
SUBJECT = "tests/meta/broken.py:counts_no_ooms"
GATE = 'cells = ["cpu/cpu"]\nprofiles = ["quick"]\n'


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qualify the same cell on what two machines call themselves: a folder of results for each."""
    folder = tmp_path_factory.mktemp("measured")
    for machine in ("north", "south"):
        found = qualify(folder / machine, DETECTION, "--backend", "cpu", "--subject", SUBJECT, machine=machine)
        assert found.failed() == {"ooms_uncounted"}, found.output[-2000:]
    return folder


@pytest.fixture
def folders(measured: Path, tmp_path: Path) -> list[Path]:
    """Give the two folders, copied, to be spoilt."""
    shutil.copytree(measured, tmp_path, dirs_exist_ok=True)
    return [tmp_path / "north", tmp_path / "south"]


def make(out: Path, *folders: Path) -> tuple[int, dict[str, Any], str]:
    """Make the report; give the exit status, the data and what was said."""
    (out.parent / "gate.toml").write_text(GATE)
    words = [*map(str, folders), "--out", str(out), "--gate", str(out.parent / "gate.toml")]
    done = subprocess.run(
        [sys.executable, "-m", "qualification", "report", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads((out / "report.json").read_text(encoding="utf-8")), done.stdout + done.stderr


def test_one_report_of_two_machines_is_a_page_without_an_error(folders: list[Path], tmp_path: Path) -> None:
    status, made, said = make(tmp_path / "out", *folders)
    assert status == 1 and "ooms_uncounted failed" in said
    html = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    dom, console = browse(html, tmp_path / "browser")
    assert console == []
    seen = Seen(dom)
    declared = {(each.name, environment) for each in backends.declared() for environment in each.environments}
    assert {(each["backend"], each["environment"]) for each in made["cells"]} == declared
    assert {each["machine"] for each in made["cells"] if each["backend"] == "cpu"} == {"north", "south"}
    check_links(seen, made)
    failed = [each for cell in made["cells"] for each in cell["criteria"] if each["verdict"] == "fail"]
    assert [each["criterion"] for each in failed] == ["ooms_uncounted"] * 2


def of(made: dict[str, Any], machine: str) -> dict[str, Any]:
    """Give the one cell that a machine has run."""
    (found,) = (each for each in made["cells"] if each["machine"] == machine)
    return dict(found)


def truncate(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:-300])
    return f"{path.name}: truncated"


def copy_to_another_cell(path: Path) -> str:
    copy = path.with_name(path.name.replace("cpu-cpu", "cpu-torch-cpu"))
    shutil.copy(path, copy)
    return (
        f"{copy.name}: it is the same run as {path.name}, with the same content: it was copied; "
        "its name is of torch-cpu in cpu, and its first line of cpu in cpu"
    )


def edit_a_verdict(path: Path) -> str:
    lines = path.read_text().splitlines(keepends=True)
    (at,) = (at for at, line in enumerate(lines) if '"verdict":"fail"' in line)
    lines[at] = lines[at].replace('"verdict":"fail"', '"verdict":"pass"')
    path.write_text("".join(lines))
    return f"{path.name}: line {at + 1}: altered"


@pytest.mark.parametrize("spoil", [truncate, copy_to_another_cell, edit_a_verdict])
def test_a_record_that_is_spoilt_is_named_and_the_other_machine_is_as_before(
    folders: list[Path], tmp_path: Path, spoil: Callable[[Path], str]
) -> None:
    _, before, _ = make(tmp_path / "before", *folders)
    (path,) = (tmp_path / "south").glob("*.jsonl")
    why = f"cpu in cpu on south: {spoil(path)}"
    status, made, said = make(tmp_path / "out", *folders)
    assert (status, made["verdict"]) == (1, "fail")
    assert not any(why in reason for reason in before["reasons"])
    assert any(why in reason for reason in made["reasons"]), made["reasons"]
    assert why in said
    assert of(made, "north") == of(before, "north") and of(made, "south") != of(before, "south")


def test_a_record_that_is_deleted_leaves_a_declared_cell_without_one(folders: list[Path], tmp_path: Path) -> None:
    why, north, south = "no record of cpu in cpu", *folders
    _, both, _ = make(tmp_path / "both", north, south)
    _, before, _ = make(tmp_path / "before", south)
    (path,) = south.glob("*.jsonl")
    path.unlink()
    status, made, _ = make(tmp_path / "out", south)
    assert status == 1 and any(why in reason for reason in made["reasons"]), made["reasons"]
    assert not any(why in reason for reason in before["reasons"])
    _, left, _ = make(tmp_path / "left", north, south)
    assert of(left, "north") == of(both, "north") and not [each for each in left["cells"] if each["machine"] == "south"]
