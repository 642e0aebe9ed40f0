"""The plugin's own rules, where no run is needed to see them."""

from __future__ import annotations

from pathlib import Path

from qualification.plugin import _from_root
from qualification.run import ROOT


def test_the_paths_of_a_repeat_command_are_those_of_the_root(tmp_path: Path) -> None:
    assert _from_root(ROOT, "tests/meta/broken.py") == "tests/meta/broken.py"
    assert _from_root(ROOT / "tests", "meta/broken.py") == "tests/meta/broken.py"
    assert _from_root(ROOT / "tests", Path("../README.md")) == "README.md"
    assert _from_root(tmp_path, "mine.py") == str(tmp_path.resolve() / "mine.py")
