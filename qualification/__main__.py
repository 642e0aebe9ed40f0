"""Qualify one cell in the application's own environment, without nox.

python -m qualification list
python -m qualification run --backend cpu --profile quick
python -m qualification report results
python -m qualification status
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import backends
from qualification import __version__, history
from qualification.criteria import CRITERIA, QUICK, group_of, profile_of
from qualification.identity import ROOT
from qualification.platform_check import python_refusal, refusal
from qualification.profiles import SELECTIONS

EXIT_REFUSED = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Do what is asked; give the exit status."""
    parser = argparse.ArgumentParser(prog="python -m qualification", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser(
        "run",
        help="run the tests of a profile on one backend",
        description="Run the tests of a profile on one backend. Any further option of pytest or of the qualification "
        "is passed on: see `python -m pytest --help`.",
        epilog="exit status: that of pytest",
        allow_abbrev=False,
    )
    run.add_argument("--backend", metavar="NAME", required=True, help="see `python -m qualification list`")
    run.add_argument("--profile", choices=SELECTIONS, default=QUICK, help="which tests (default: %(default)s)")
    run.add_argument("-m", metavar="MARKS", dest="marks", default="", help="of these, only the tests with these marks")
    run.add_argument(
        "--on-finish",
        metavar="ARGV",
        nargs=argparse.REMAINDER,
        default=[],
        help="comes last: a command and its arguments, which gets the run's summary as JSON on standard input",
    )

    made = commands.add_parser(
        "report",
        help="make the report from records, and judge by a gate",
        epilog="exit status: 0 every required cell is proven; 1 it is not; 2 no report can be made",
        allow_abbrev=False,
    )
    from qualification.report import command

    command.add_options(made)

    shown = commands.add_parser("list", help="backends with availability and reasons, and criteria with limits")
    shown.add_argument("--json", action="store_true", help="as JSON")

    status = commands.add_parser(
        "status",
        help="the summary of the run or report that finished last, as JSON",
        epilog="exit status: 0 it passed; 1 it did not; 2 there is none",
    )
    status.add_argument("--history", metavar="FILE", type=Path, default=command.RESULTS / history.FILE)
    status.add_argument("--kind", choices=("run", "report"), help="of which (default: whichever finished last)")
    status.add_argument("--key", metavar="KEY", default=history.KEY, help="(default: %(default)s)")

    words = list(sys.argv[1:] if argv is None else argv)
    options, rest = parser.parse_known_args(words)
    if rest and options.command != "run":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        match options.command:
            case "run":
                return _run(options, rest)
            case "report":
                return command.run(options)
            case "list":
                return _list(as_json=options.json)
            case _:
                return _status(options)
    except (command.Refused, history.HistoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except BrokenPipeError:
        # Whoever read it has seen enough: `… list | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_REFUSED


def _run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    reason = refusal() or python_refusal()
    if not reason:
        its = SELECTIONS[options.profile]
        hook = ("--on-finish", shlex.join(options.on_finish)) if options.on_finish else ()
        words = ["-c", str(ROOT / "pytest_memory.ini"), *(str(ROOT / file) for file in its.files), "-v"]
        words += ["-m", its.narrowed(options.marks), *its.options]
        words += ["--backend", options.backend, *rest, *hook]
        # In this one's place: Ctrl-C and other signals are pytest's, which ends in order and closes the records.
        os.execv(sys.executable, [sys.executable, "-m", "pytest", *words])
    print(f"error: {reason}", file=sys.stderr)
    return EXIT_REFUSED


def _list(*, as_json: bool) -> int:
    """Show what there is, and give 0."""
    found: list[dict[str, Any]] = [
        {
            "backend": declared.name,
            "environments": list(declared.environments),
            "available": availability.available,
            "runtime": availability.runtime if availability.available else None,
            "reason": None if availability.available else availability.reason,
        }
        for declared, availability in backends.available()
    ]
    criteria = [
        {
            "test": each.test,
            "criterion": each.name,
            "profile": profile_of(each.test),
            "group": group_of(each.test),
            "relation": each.relation,
            "limit": each.limit,
            "unit": each.unit,
            "promise": each.promise,
        }
        for each in CRITERIA
    ]
    if as_json:
        print(json.dumps({"version": __version__, "backends": found, "criteria": criteria}, indent=1))
        return 0
    print(f"Plimsoll {__version__}\n\nbackends:")
    for each in found:
        state = f"available, {each['runtime']}" if each["available"] else f"not available: {each['reason']}"
        print(f"  {each['backend']:<18} {state}")
    print("\ncriteria:")
    last = ""
    for criterion in CRITERIA:
        if criterion.test != last:
            last = criterion.test
            print(f"  {last} ({profile_of(last)})")
        print(f"    {criterion.name:<26} {criterion.limit_text:<34} {criterion.promise}")
    return 0


def _status(options: argparse.Namespace) -> int:
    found = history.last(options.history, options.key, options.kind)
    if found is None:
        what = options.kind or "run"
        raise history.HistoryError(f"{options.history}: no {what} has finished under the key {options.key!r}")
    print(json.dumps(found, indent=1, sort_keys=True))
    return 0 if found["verdict"] == "pass" else 1


if __name__ == "__main__":
    sys.exit(main())
