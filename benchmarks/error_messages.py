"""Which out-of-memory errors are recognised, and what is taken for one: ours against Hugging Face accelerate's.

    python -m benchmarks.error_messages [--write]

Both are asked about the same exceptions, made from the messages in ``tests/data/error_messages.toml``. The result is a
Markdown table; ``--write`` puts it into ``docs/out-of-memory-errors.md``. Exit status 1 without accelerate.

An exception is of the real type where its runtime is installed. Elsewhere only the module, the name and the base of
its type are reproduced.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import pkgutil
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from backends.errors import Diagnosis, ErrorKind, Shortage, classify

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "tests" / "data" / "error_messages.toml"
DOCUMENT = ROOT / "docs" / "out-of-memory-errors.md"
_BEGIN, _END = "<!-- error-messages: begin -->\n", "<!-- error-messages: end -->\n"

Recognise = Callable[[Exception], bool]


@dataclass(frozen=True)
class Message:
    """One entry of the corpus. The file says what each field means."""

    id: str
    type: str
    runtime: str
    version: str
    message: str
    source: str
    expected: Diagnosis
    base: str = ""
    hidden: bool = False
    note: str = ""

    @property
    def live(self) -> bool:
        """Whether a test raises it again."""
        return self.source == "raised live"

    @property
    def was_out_of_memory(self) -> bool:
        """Whether it was out of memory, told or not."""
        return self.expected.kind.is_oom or self.hidden


def load(path: Path = CORPUS) -> list[Message]:
    """Read the corpus. Raises TypeError for a field that is missing or unknown, ValueError for a kind that is."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["message"]
    messages = []
    for entry in entries:
        shortage = entry.pop("shortage", None)
        expected = Diagnosis(ErrorKind(entry.pop("kind")), Shortage(shortage) if shortage else None)
        messages.append(Message(**entry, expected=expected))
    return messages


def build(message: Message) -> Exception:
    """Make the exception that said so. Raises ValueError for a type that is no exception."""
    try:
        found = pkgutil.resolve_name(message.type)
    except (ImportError, AttributeError):
        module, _, name = message.type.rpartition(".")
        found = type(name, (pkgutil.resolve_name(message.base),), {"__module__": module})
    if not (isinstance(found, type) and issubclass(found, Exception)):
        raise ValueError(f"{message.id}: {message.type} is {found!r}, expected a type of exception")
    return _made(found, message.message)


def _made(kind: type[Exception], text: str) -> Exception:
    number = re.match(r"\[Errno (\d+)\] (.*)", text)
    if number and issubclass(kind, OSError):
        return kind(int(number[1]), number[2])
    if issubclass(kind, KeyError):
        return kind(text.strip("'"))
    try:
        return kind(text) if text else kind()
    except TypeError:
        # A type that makes the text itself, from arguments of its own: it is derived from, and told the text.
        python = next(base for base in kind.__mro__ if base.__module__ == "builtins")
        own = {"__module__": kind.__module__, "__new__": python.__new__, "__init__": lambda *_: None}
        made: Exception = type(kind.__name__, (kind,), own | {"__str__": lambda _: text})(text)
        return made


def _accelerate() -> tuple[str, Recognise]:
    """Give accelerate's version and its test. Raises ImportError where it is not installed."""
    recognise: Recognise = importlib.import_module("accelerate.utils.memory").should_reduce_batch_size
    return importlib.metadata.version("accelerate"), recognise


def table(messages: Sequence[Message], sides: Sequence[tuple[str, Recognise]]) -> str:
    """Give the Markdown: what each side recognises of the out-of-memory errors, and what else it takes for one."""
    groups: dict[str, list[Message]] = {"torch": [], "ONNX Runtime": [], "others": [], "false alarms": []}
    for message in messages:
        runtime = next((name for name in ("torch", "ONNX Runtime") if message.runtime.startswith(name)), "others")
        groups[runtime if message.was_out_of_memory else "false alarms"].append(message)
    lines = [
        f"| | {' | '.join(f'{name} (of {len(group)})' for name, group in groups.items())} |",
        f"|---|{'---:|' * len(groups)}",
    ]
    alarms = []
    for name, recognise in sides:
        taken = {message.id for message in messages if recognise(build(message))}
        counts = [sum(message.id in taken for message in group) for group in groups.values()]
        lines.append(f"| {name} | {' | '.join(map(str, counts))} |")
        alarms += [f"- {name} on `{message.id}`" for message in groups["false alarms"] if message.id in taken]
    return "\n".join([*lines, "", "False alarms:", "", *(alarms or ["- none"]), ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.error_messages", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/out-of-memory-errors.md")
    options = parser.parse_args(arguments)
    try:
        version, recognise = _accelerate()
    except ImportError as error:
        print(
            f"accelerate cannot be imported ({error}); nothing was measured. "
            "Install it beside torch, for example: pip install accelerate",
            file=sys.stderr,
        )
        return 1
    sides = (
        ("`backends.errors.classify`", lambda error: classify(error).is_oom),
        (f"`should_reduce_batch_size`, accelerate {version}", recognise),
    )
    result = table(load(), sides)
    print(result)
    if options.write:
        document = DOCUMENT.read_text(encoding="utf-8")
        before, begin, rest = document.partition(_BEGIN)
        _, end, after = rest.partition(_END)
        if not (begin and end):
            print(f"{DOCUMENT} has no lines {_BEGIN.strip()} and {_END.strip()} to write between", file=sys.stderr)
            return 1
        DOCUMENT.write_text(f"{before}{begin}\n{result.rstrip()}\n\n{end}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
