"""What a page has, and what headless Chromium makes of it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

#: Elements that have no end.
VOID = ("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr")


class Seen(HTMLParser):
    """What a page has: its elements in order, and whether they are nested as they should be."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"an attribute of {tag} comes twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def having(self, name: str) -> list[str]:
        """Give the values of an attribute."""
        return [str(attributes[name]) for _, attributes in self.elements if name in attributes]

    def tags(self, *names: str) -> list[tuple[str, dict[str, str | None]]]:
        """Give the elements of some names."""
        return [each for each in self.elements if each[0] in names]


def check_links(seen: Seen, whole: Mapping[str, Any]) -> None:
    """Check that every cell is there, every link leads somewhere, and that of a failure to its evidence."""
    ids = seen.having("id")
    assert len(ids) == len(set(ids))
    declared = [cell["id"] for cell in whole["cells"]]
    assert seen.having("data-cell") == declared == seen.having("data-section")
    hrefs = seen.having("href")
    assert {href[1:] for href in hrefs} <= set(ids) and all(href.startswith("#") for href in hrefs)
    failing = [each["id"] for cell in whole["cells"] for each in cell["criteria"] if each["verdict"] == "fail"]
    assert seen.having("data-evidence") == failing
    for criterion in failing:
        assert f"#evidence-{criterion}" in hrefs and criterion in ids


def browse(html: str, folder: Path) -> tuple[str, list[str]]:
    """Open a page in headless Chromium: what it made of it, and what its console says."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("not run: there is no chromium here")
    folder.mkdir()
    path = folder / "report.html"
    path.write_text(html, encoding="utf-8")
    done = subprocess.run(
        [
            *(chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"),
            *("--disable-dev-shm-usage", "--no-first-run", "--disable-extensions", "--disable-background-networking"),
            *(f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000", "--dump-dom", path.as_uri()),
        ],
        env={"HOME": str(folder), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
