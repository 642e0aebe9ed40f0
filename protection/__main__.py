"""Record audio so that nothing accepted is ever lost, and have it answered: the dictation pipeline as a program.

examples:
  python -m protection record --spool DIR --input FILE.wav
  arecord -t raw -f S16_LE -r 16000 -c 1 | python -m protection record --spool DIR --input -
  python -m protection resume --spool DIR
  python -m protection status --spool DIR
  python -m protection export --spool DIR OUT.wav

Standard output has JSON lines only. record: {"accepted": N} at the beginning and with each block, N the samples that
are on the disk by now. record and resume, at the end: {"done": true, "accepted": N, "answered": N, "set_aside": N};
done is true exactly when the exit status is 0. Parts that no engine could answer are set aside, their audio is kept.
The lines have to be read: where they wait, the recording waits. Standard error has text for people.

SIGTERM, SIGINT (Ctrl-C) and SIGHUP end a recording in order: what a pipe holds by then is accepted, and what is
accepted is answered until the deadline. A second signal ends it at once. What has no answer by then stays in the
spool, and resume answers it; so it is after kill -9.

exit statuses:
  0      everything accepted is answered, also after a signal; the export is written
  1      what was accepted is safe, but something failed: the disk, the input was cut short, the export
  2      refused, and nothing was accepted: bad usage, input, model or backend; the spool is in use, or there is none
  74     standard output could not be written: stopped in order
  75     stopped with work left: resume answers what an emergency or the deadline left; a FILE.wav that was not
         taken to its end goes on with the same record command
  128+N  signal N ended it at once: a second one, or one before the recording began
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from backends.model import DEFAULT_MODEL, SAMPLE_RATE_HZ
from protection.program import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_NO_OUTPUT,
    EXIT_REFUSED,
    NoOutput,
    Options,
    Refused,
    run,
    tell,
    write_line,
)
from protection.spool import SpoolError, SpoolView, holder

_BLOCK_MOST_SAMPLES = 960_000

_RECORD = """\
Take audio into the spool, answer it with the model, and end when all of it is answered.

A FILE.wav (16 kHz, mono, 16 bit) is the recording from its first sample on. Started again with the same file on the
same spool, record goes on where it ended: what is there is compared, and only new samples are added. After kill -9 the
spool ends as an undisturbed run leaves it; a run that was ended in order has answered up to where it stopped, so one
answer may be cut in two there. Another file is refused: give it a folder of its own.

With - it takes raw PCM (signed 16-bit little-endian, mono, 16 kHz) from standard input as it comes. A pipe has no
positions: what comes is appended to what the spool has, and the first line says how much that is.
"""
_RECORD_EXAMPLES = """\
examples:
  python -m protection record --spool notes --input speech.wav
  python -m protection record --spool notes --input speech.wav --realtime --policy engine=in_process
  arecord -t raw -f S16_LE -r 16000 -c 1 | python -m protection record --spool notes --input -
  sox speech.mp3 -t raw -r 16000 -c 1 -b 16 -e signed - | python -m protection record --spool notes --input -
"""
_RESUME = """\
Answer what is in the spool and has no answer yet: after kill -9, a crash, an emergency or a deadline. No audio is
taken. Where everything is answered already, no model is loaded.
"""
_RESUME_EXAMPLES = """\
example:
  python -m protection resume --spool notes
"""
_EXPORT = """\
Write what was accepted as a WAV: 16 kHz, mono, 16 bit, the same 16 bits that came in. Needs no model and no runtime,
and works while a recording goes on. OUT.wav is there whole or not at all, and for you alone to read.
"""
_EXPORT_EXAMPLES = """\
example:
  python -m protection export --spool notes notes.wav

prints {"exported": SAMPLES, "kept_from": POSITION, "path": "notes.wav"}; kept_from is above 0 where the policy's
retention_s has deleted the beginning.
"""
_STATUS = """\
Say how far a recording is, as one JSON object: path, accepted, answered and unanswered samples, set_aside parts
without an answer, kept_from (what was before is deleted), seconds accepted, and in_use_by (a process id, or null).
Changes nothing, and works while a recording goes on.
"""
_STATUS_EXAMPLES = """\
example:
  python -m protection status --spool notes
"""


def _parser() -> argparse.ArgumentParser:
    summary, _, rest = (__doc__ or "").rstrip().partition("\n\n")
    statuses = rest[rest.find("exit statuses:") :]

    def add(commands: Any, name: str, summary: str, text: str, examples: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = commands.add_parser(
            name,
            help=summary,
            description=text,
            epilog=f"{examples}\n{statuses}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        made.add_argument("--spool", type=Path, required=True, metavar="DIR", help="folder of the recording")
        return made

    parser = argparse.ArgumentParser(
        prog="python -m protection",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    record = add(commands, "record", "take audio, and answer it", _RECORD, _RECORD_EXAMPLES)
    record.add_argument("--input", required=True, metavar="FILE.wav|-", help="a WAV, or - for raw PCM from a pipe")
    record.add_argument("--realtime", action="store_true", help="take it no faster than it was spoken")
    record.add_argument(
        "--block-samples",
        type=_block_samples,
        default=1600,
        metavar="N",
        help="samples in a block (default: %(default)s)",
    )
    resume = add(commands, "resume", "answer what a recording has left unanswered", _RESUME, _RESUME_EXAMPLES)
    for command in (record, resume):
        command.add_argument("--backend", metavar="NAME", help="where inference happens (default: the first available)")
        command.add_argument("--model", type=Path, default=DEFAULT_MODEL, metavar="FILE", help="the acoustic model")
        command.add_argument(
            "--policy",
            type=_policy_option,
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="an option of protection/policy.py, its value as JSON; may be repeated",
        )
        command.add_argument(
            "--deadline",
            type=_seconds,
            default=10.0,
            metavar="SECONDS",
            dest="deadline_s",
            help="go on for so long after a signal, or without room on the disk or in memory (default: %(default)g)",
        )
    export = add(commands, "export", "write a recording as a WAV", _EXPORT, _EXPORT_EXAMPLES)
    export.add_argument("out", type=Path, metavar="OUT.wav", help="the file to write")
    export.add_argument("--force", action="store_true", help="replace the file where there is one; never a spool's")
    add(commands, "status", "say how far a recording is", _STATUS, _STATUS_EXAMPLES)
    return parser


def _block_samples(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _BLOCK_MOST_SAMPLES:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 to {_BLOCK_MOST_SAMPLES}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r}: expected seconds, from 0 on")
    return seconds


def _policy_option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=VALUE, such as max_batch=4")
    try:
        return name, json.loads(value)
    except ValueError:
        # A word needs no quotes.
        return name, value


def _export(folder: Path, out: Path, force: bool) -> int:
    # A signal leaves no half file either.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise)
    with _open(folder) as view:
        try:
            view.require_no_spool_file(out)
        except SpoolError as error:
            raise Refused(str(error)) from error
        if out.exists() and not force:
            raise Refused(f"{out} is there already: name another file, or replace it with --force")
        kept_from, written = view.kept_from, view.export_wav(out)
    if kept_from:
        seconds = kept_from / SAMPLE_RATE_HZ
        tell(f"the first {seconds:.1f} s ({kept_from} samples) are not in {out}: retention_s has deleted them")
    write_line(exported=written, kept_from=kept_from, path=str(out))
    return EXIT_DONE


def _status(folder: Path) -> int:
    with _open(folder) as view:
        answered, accepted = view.answered, view.accepted
        write_line(
            path=str(view.path),
            accepted=accepted,
            answered=answered,
            unanswered=accepted - answered,
            set_aside=view.set_aside,
            kept_from=view.kept_from,
            seconds=accepted / SAMPLE_RATE_HZ,
            in_use_by=holder(folder),
        )
    return EXIT_DONE


def _open(folder: Path) -> SpoolView:
    try:
        return SpoolView(folder)
    except SpoolError as error:
        raise Refused(str(error)) from error


def _raise(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Do one command; give the exit status."""
    if sys.stderr is None:
        # Closed: something has to be there, or the next file that is opened gets its number, and our text.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
    options = vars(_parser().parse_args(argv))
    command, folder = options.pop("command"), options.pop("spool")
    try:
        if sys.stdout is None:
            raise Refused("standard output is closed: expected somewhere to write to, such as > /dev/null")
        if command == "export":
            return _export(folder, options["out"], options["force"])
        if command == "status":
            return _status(folder)
        options["policy"] = dict(options["policy"])
        return run(Options(folder, **options))
    except (Refused, OSError) as error:
        tell(str(error))
        return EXIT_REFUSED
    except SpoolError as error:
        tell(str(error))
        return EXIT_FAILED
    except NoOutput as error:
        tell(str(error))
        return EXIT_NO_OUTPUT
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
