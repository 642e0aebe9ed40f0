"""What a runtime can do: one public file with a PEP 723 header is one backend.

The headers are read, not imported: what is declared is known before anything is installed.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from backends.contract import Availability, Backend

FOLDER = Path(__file__).resolve().parent
#: The pattern of PEP 723, narrowed to the one kind of block that is read here.
_SCRIPT_BLOCK = re.compile(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$")
_KEYS = ("backend", "tags", "environments")
_ENVIRONMENT_KEYS = ("dependencies", "download-mb", "disk-mb", "cuda", "package-index", "build", "reason")


class BadHeader(ValueError):
    """A backend's header cannot be used. The message says which file, and what was expected."""


class UnknownBackend(ValueError):
    """No backend has this name. The message gives the nearest names, and all of them."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        near = " or ".join(difflib.get_close_matches(name, known, cutoff=0.4))
        hint = f": did you mean {near}?" if near else "."
        super().__init__(f"unknown backend {name!r}{hint} Backends: {', '.join(known) or 'none'}")
        self.name = name


@dataclass(frozen=True)
class Environment:
    """What a backend installs in one environment, and what it needs of the machine there.

    ``dependencies`` is everything: what the backend needs everywhere, and ``own``, what it needs here. ``download_mb``
    and ``disk_mb`` are what that takes, tests included, once downloaded and once installed. ``cuda`` is the major
    version of CUDA that the driver must support; None: no accelerator is needed. ``package_index`` is where the builds
    of ``own`` are whose local version is ``build``, such as 2.13.0+cpu; None: any build, from the default index.
    ``reason`` says why these versions.
    """

    name: str
    dependencies: tuple[str, ...]
    own: tuple[str, ...]
    download_mb: int
    disk_mb: int
    cuda: int | None = None
    package_index: str | None = None
    build: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Declared:
    """One backend, as its header declares it: what it needs, in each environment."""

    name: str
    module: str
    tags: tuple[str, ...]
    requires_python: str
    needs: Mapping[str, Environment]

    @property
    def environments(self) -> tuple[str, ...]:
        """The names of the environments that it is qualified in."""
        return tuple(self.needs)

    @property
    def minimum_python(self) -> tuple[int, ...]:
        """The oldest Python that it runs on, such as (3, 11)."""
        return tuple(int(part) for part in self.requires_python.removeprefix(">=").split("."))


def declared(folder: Path = FOLDER) -> tuple[Declared, ...]:
    """Read what every backend declares, in the order of their file names. Raises BadHeader."""
    paths = (path for path in sorted(folder.glob("*.py")) if not path.name.startswith("_"))
    return tuple(found for path in paths if (found := _read(path)) is not None)


def create(name: str) -> type[Backend]:
    """Import the backend of this name and give its class. Raises UnknownBackend, or ImportError for its runtime."""
    known = {found.name: found for found in declared()}
    if name not in known:
        raise UnknownBackend(name, tuple(known))
    return cast("type[Backend]", importlib.import_module(known[name].module).BACKEND)


def rebuild(data: Mapping[str, Any]) -> Backend:
    """Make a backend that another process shared (``Backend.share``). Raises as ``create`` and ``limit_memory`` do."""
    return create(data["backend"]).rebuild(data)


def available() -> list[tuple[Declared, Availability]]:
    """Probe every declared backend: whether it can run here now, or why not."""
    from backends.contract import Availability

    def probe(name: str) -> Availability:
        try:
            return create(name).probe()
        except ImportError as error:
            return Availability(False, f"it cannot be imported here: {error}")

    return [(found, probe(found.name)) for found in declared()]


def _read(path: Path) -> Declared | None:
    """Read one header; None where the file is not a backend."""
    import tomllib  # not at the top: on a Python too old to have it, the doctor still has to load and say so

    block = _SCRIPT_BLOCK.search(path.read_text(encoding="utf-8"))
    if block is None:
        return None
    lines = block["content"].splitlines()
    try:
        header = tomllib.loads("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines))
    except tomllib.TOMLDecodeError as error:
        raise BadHeader(f"{path.name}: the header is not TOML: {error}") from error
    table = header.get("tool", {}).get("plimsoll")
    return None if table is None else _declared(path, header, table)


def _declared(path: Path, header: dict[str, Any], table: dict[str, Any]) -> Declared:
    """Check a header and give it a type."""
    _known(path, table, "[tool.plimsoll]", _KEYS)
    everywhere = _strings(path, header, "dependencies")
    tables = _value(path, table, "environments", dict, "tables such as [tool.plimsoll.environments.cpu]")
    if not tables:
        raise BadHeader(
            f"{path.name}: no environment is declared: expected [tool.plimsoll.environments.cpu] or another"
        )
    found = Declared(
        name=_value(path, table, "backend", str),
        module=f"backends.{path.stem}",
        tags=_strings(path, table, "tags"),
        requires_python=_value(path, header, "requires-python", str),
        needs={name: _environment(path, name, needs, everywhere) for name, needs in tables.items()},
    )
    if found.name.replace("-", "_") != path.stem:
        raise BadHeader(f"{path.name}: it declares backend {found.name!r}: expected {path.stem.replace('_', '-')!r}")
    if not re.fullmatch(r">=\d+\.\d+", found.requires_python):
        raise BadHeader(f"{path.name}: requires-python is {found.requires_python!r}: expected such as '>=3.11'")
    return found


def _environment(path: Path, name: str, table: Any, everywhere: tuple[str, ...]) -> Environment:
    """Check what a backend needs in one environment, and give it a type."""
    where = f"[tool.plimsoll.environments.{name}]"
    if not isinstance(table, dict):
        raise BadHeader(f"{path.name}: {where} is {table!r}: expected a table")
    # It becomes the name of sessions, folders and a file of pins.
    if not re.fullmatch(r"[a-z][a-z0-9]*", name) or name == "dev":
        raise BadHeader(f"{path.name}: {name!r} cannot name an environment: expected such as 'cuda12', and not 'dev'")
    _known(path, table, where, _ENVIRONMENT_KEYS)

    def optional(key: str, kind: type) -> Any:
        return _value(path, table, key, kind) if key in table else None

    own = _strings(path, table, "dependencies") if "dependencies" in table else ()
    found = Environment(
        name=name,
        dependencies=everywhere + own,
        own=own,
        download_mb=_value(path, table, "download-mb", int),
        disk_mb=_value(path, table, "disk-mb", int),
        cuda=optional("cuda", int),
        package_index=optional("package-index", str),
        build=optional("build", str),
        reason=optional("reason", str),
    )
    if (found.package_index is None) != (found.build is None) or (found.build and not own):
        raise BadHeader(f"{path.name}: {where}: package-index, build and dependencies belong together: one is missing")
    return found


def _known(path: Path, table: dict[str, Any], where: str, keys: tuple[str, ...]) -> None:
    """Refuse a key that means nothing here."""
    for key in table:
        if key not in keys:
            near = " or ".join(difflib.get_close_matches(key, keys, n=1)) or ", ".join(keys)
            raise BadHeader(f"{path.name}: unknown key {key!r} in {where}: expected {near}")


def _value(path: Path, table: dict[str, Any], key: str, kind: type, expected: str | None = None) -> Any:
    """Take a required value of this type."""
    if not isinstance(value := table.get(key), kind):
        raise BadHeader(f"{path.name}: {key} is {value!r}: expected {expected or kind.__name__}")
    return value


def _strings(path: Path, table: dict[str, Any], key: str) -> tuple[str, ...]:
    """Take a required, non-empty list of strings."""
    value = _value(path, table, key, list)
    if not value or not all(isinstance(item, str) for item in value):
        raise BadHeader(f"{path.name}: {key} is {value!r}: expected a list of strings")
    return tuple(value)
