"""The loader: headers are read without importing anything, and names are checked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import backends

ROOT = Path(__file__).resolve().parents[2]
HEADER = """\
# /// script
# requires-python = ">=3.11"
# dependencies = ["some-runtime>=2"]
#
# [tool.plimsoll]
# backend = "made-up"
# tags = ["made"]
#
# [tool.plimsoll.environments.cpu]
# download-mb = 7
# disk-mb = 20
#
# [tool.plimsoll.environments.cuda12]
# cuda = 12
# dependencies = ["some-driver<13"]
# reason = "the last for CUDA 12"
# download-mb = 8
# disk-mb = 30
# ///
raise RuntimeError("a header is read, not imported")
"""


def write(folder: Path, text: str, name: str = "made_up.py") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_a_header_is_read_and_the_file_is_not_imported(tmp_path: Path) -> None:
    shared = ("some-runtime>=2",)
    assert backends.declared(write(tmp_path, HEADER)) == (
        backends.Declared(
            name="made-up",
            module="backends.made_up",
            tags=("made",),
            requires_python=">=3.11",
            needs={
                "cpu": backends.Environment("cpu", dependencies=shared, own=(), download_mb=7, disk_mb=20),
                "cuda12": backends.Environment(
                    "cuda12",
                    dependencies=(*shared, "some-driver<13"),
                    own=("some-driver<13",),
                    download_mb=8,
                    disk_mb=30,
                    cuda=12,
                    reason="the last for CUDA 12",
                ),
            },
        ),
    )
    assert backends.declared(tmp_path)[0].minimum_python == (3, 11)
    assert backends.declared(tmp_path)[0].environments == ("cpu", "cuda12")


def test_a_package_index_is_read_with_the_build_that_is_there(tmp_path: Path) -> None:
    index = '# package-index = "https://example.org/simple"\n# build = "made"\n# cuda = 12'
    needs = backends.declared(write(tmp_path, HEADER.replace("# cuda = 12", index)))[0].needs["cuda12"]
    assert (needs.package_index, needs.build) == ("https://example.org/simple", "made")


def test_private_files_and_files_without_a_header_are_no_backends(tmp_path: Path) -> None:
    write(tmp_path, HEADER, "_made_up.py")
    write(tmp_path, '"""A module."""\n', "contract.py")
    write(tmp_path, "# /// script\n# dependencies = []\n# ///\n", "a_script.py")
    assert backends.declared(tmp_path) == ()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"made-up"', '"other"', "made_up.py: it declares backend 'other': expected 'made-up'"),
        ("tags =", "tgas =", r"unknown key 'tgas' in \[tool.plimsoll\]: expected tags"),
        ("download-mb = 7", "download-bm = 7", r"'download-bm' in .*environments\.cpu\]: expected download-mb"),
        ("disk-mb = 30", "", "disk-mb is None: expected int"),
        ("cuda = 12", 'cuda = "12.8"', "cuda is '12.8': expected int"),
        ("cuda = 12", 'build = "cpu"', "package-index, build and dependencies belong together"),
        ("cuda = 12", 'package-index = "https://x"', "package-index, build and dependencies belong together"),
        ("environments.cuda12", "environments.dev", "'dev' cannot name an environment"),
        ("environments.cuda12", "environments.cuda-12", "'cuda-12' cannot name an environment"),
        (
            "[tool.plimsoll.environments.cpu]\n# download-mb = 7\n# disk-mb = 20",
            "environments.cpu = 7",
            "expected a table",
        ),
        ('["some-driver<13"]', '"some-driver<13"', "dependencies is 'some-driver<13': expected list"),
        ("download-mb = 7", 'download-mb = "7"', "download-mb is '7': expected int"),
        ('["made"]', "[]", r"tags is \[\]: expected a list of strings"),
        ('["made"]', "[1]", r"tags is \[1\]: expected a list of strings"),
        ('requires-python = ">=3.11"', 'requires-python = "~=3.11"', "requires-python is '~=3.11'"),
        ('# dependencies = ["some-runtime>=2"]', "#", "dependencies is None: expected list"),
        ("download-mb = 7", "download-mb =", "the header is not TOML"),
    ],
)
def test_a_bad_header_is_refused_by_file_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in HEADER
    with pytest.raises(backends.BadHeader, match=message):
        backends.declared(write(tmp_path, HEADER.replace(old, new)))


def test_a_list_of_environments_is_refused_with_what_is_expected(tmp_path: Path) -> None:
    header = HEADER.split("#\n# [tool.plimsoll.environments.cpu]")[0] + '# environments = ["cpu"]\n# ///\n'
    with pytest.raises(backends.BadHeader, match=r"expected tables such as \[tool\.plimsoll\.environments\.cpu\]"):
        backends.declared(write(tmp_path, header))
    with pytest.raises(backends.BadHeader, match="no environment is declared"):
        backends.declared(write(tmp_path, header.replace('["cpu"]', "{}")))


def test_every_declared_backend_is_the_class_that_its_header_names() -> None:
    for declared, availability in backends.available():
        if availability.available:
            assert backends.create(declared.name).name == declared.name


def test_the_cpu_backend_is_declared_and_available() -> None:
    found = {declared.name: availability for declared, availability in backends.available()}
    assert found["cpu"].available, found["cpu"].reason


def test_an_unknown_name_is_refused_with_the_nearest_and_all_names() -> None:
    with pytest.raises(
        backends.UnknownBackend, match=r"unknown backend 'cpuu': did you mean .*cpu.*\? Backends: .*cpu"
    ):
        backends.create("cpuu")
    with pytest.raises(ValueError, match=r"unknown backend 'zzz'\. Backends: .*cpu"):
        backends.create("zzz")


def test_the_loader_needs_nothing_installed() -> None:
    # -S: no site-packages.
    code = "import sys; sys.path.insert(0, sys.argv[1]); import backends; print(len(backends.declared()))"
    done = subprocess.run([sys.executable, "-S", "-E", "-c", code, ROOT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1
