"""What a subject said is shown, and is in no record, history or hook: words may be in it that were dictated."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends.faults import interposer
from qualification import records
from qualification.quoting import quoted, unquoted
from tests.meta.qualifying import RECOVERY, Outcome, qualify

BUFFER = f"{RECOVERY}::TestDataPreservation::test_audio_buffer_preservation"
KILL = f"{RECOVERY}::TestDataPreservation::test_kill_during_recording"
SAMPLE = "tests/test_fault_sweep.py::TestFaultSweep::test_fault_sweep_sample"
WORDS = "my dear Watson"
#: The deepest of ours that calls a subject, by the file.
PLACES = {
    f"RuntimeError at {file}"
    for file in ("tests/test_oom_recovery.py", "qualification/stream.py", "qualification/plugin.py")
}
#: What ships, but for one method: it says what was dictated, and fails.
SPEAKING = f'''
import itertools
import os
import sys

from protection import pipeline

FEEDS = itertools.count(1)


def fails(*_):
    print("{WORDS}", file=sys.stderr, flush=True)
    raise RuntimeError("not written down: {WORDS}")


def in_(name):
    def make(context):
        subject = pipeline.factory(context)
        setattr(subject, name, fails)
        return subject

    return make


in_feed, in_drain, in_results = in_("feed"), in_("drain"), in_("results")


def asserts(context):
    subject = pipeline.factory(context)

    def drain(timeout_s):
        assert not "{WORDS}", "{WORDS}"

    subject.drain = drain
    return subject


def skips(context):
    import unittest

    def drain(timeout_s):
        raise unittest.SkipTest("{WORDS}")

    subject = pipeline.factory(context)
    subject.drain = drain
    return subject


def after_17_feeds(context, then):
    subject = pipeline.factory(context)
    feed = subject.feed
    subject.feed = lambda *arguments: feed(*arguments) if next(FEEDS) <= 17 else then()
    return subject


def where_it_is_hosted(context):
    return (after_17_feeds if "PLIMSOLL_HOSTED" in os.environ else lambda it, _: pipeline.factory(it))(context, fails)


def ends():
    print("{WORDS}", file=sys.stderr, flush=True)
    os._exit(3)


def dies(context):
    """So often it is fed until it is known what is right."""
    return after_17_feeds(context, ends)
'''


@pytest.fixture
def speaking(tmp_path: Path) -> Path:
    path = tmp_path / "speaking.py"
    path.write_text(SPEAKING)
    return path


def _qualify(speaking: Path, factory: str, *arguments: str) -> tuple[Outcome, records.Record]:
    """Run, see that the words are on the terminal and in nothing that is kept; give what is."""
    results, told = speaking.parent / "results", speaking.parent / "told.json"
    options = ("--backend", "cpu", "--subject", f"{speaking}:{factory}", "--on-finish", f"tee {told}")
    run = qualify(results, *arguments, *options)
    assert run.status == 1 and WORDS in run.output, f"status {run.status}: {run.output[-3000:]}"
    kept = [told, *(path for path in results.iterdir() if path.suffix != ".log")]
    assert {path.suffix for path in kept} == {".json", ".jsonl", ".sqlite"}, f"{kept}"
    with_words = [path.name for path in kept if WORDS.encode() in path.read_bytes()]
    assert not with_words, f"what the subject said is in {with_words}"
    return run, records.read(next(results.glob("*.jsonl")))


def test_a_subject_that_skips_has_failed_and_what_it_said_is_not_recorded(speaking: Path) -> None:
    run, record = _qualify(speaking, "skips", BUFFER)
    assert {each["verdict"] for each in record.criteria} == {"fail"}, run.output[-2000:]
    assert [each["outcome"] for each in record.tests] == ["failed"]


@pytest.mark.parametrize("method", ["feed", "drain", "results"])
def test_the_message_of_an_exception_is_shown_and_what_failed_where_is_recorded(speaking: Path, method: str) -> None:
    run, record = _qualify(speaking, f"in_{method}", BUFFER)
    reasons = {
        each["reason"].partition("measured: ")[2].partition(":")[0] for each in record.criteria if each["reason"]
    }
    assert reasons and reasons <= PLACES, f"{reasons}"
    assert f"RuntimeError: not written down: {WORDS}" in run.output, run.output[-3000:]


def test_an_assertion_is_ours_only_where_we_made_it(speaking: Path) -> None:
    _, record = _qualify(speaking, "asserts", BUFFER)
    (reason,) = {each["reason"] for each in record.criteria}
    assert reason.startswith("the test ended before this was measured: AssertionError at tests/test_oom_recovery.py:")


def test_what_a_hosted_subject_said_is_evidence_that_is_not_recorded(speaking: Path, tmp_path: Path) -> None:
    (tmp_path / "short.toml").write_text("[test_kill_during_recording]\nkills = 1\n")
    _, record = _qualify(speaking, "where_it_is_hosted", KILL, "--criteria", str(tmp_path / "short.toml"))
    (line,) = record.tests
    # When it dies, and so in which words, is chance.
    assert any("RuntimeError: the host " in each and each.endswith("«…»") for each in line["evidence"]), f"{line}"


def test_the_last_words_of_a_process_of_the_sweep_are_not_recorded(speaking: Path) -> None:
    if (refused := interposer.refusal()) is not None:
        pytest.skip(refused)
    _, record = _qualify(speaking, "dies", SAMPLE, "--point", "feed/host/transient/1")
    (line,) = record.tests
    assert any(each.endswith("it ended with status 3: «…»") for each in line["evidence"]), f"{line['evidence']}"


# The marks.


SAID = [WORDS, f"» {WORDS}", f"«{WORDS}", f"{WORDS}»{WORDS}", f"»\n«{WORDS}\n»{WORDS}", quoted(WORDS)]


@pytest.mark.parametrize("text", SAID)
def test_whatever_is_said_does_not_end_its_quotation(text: str) -> None:
    assert unquoted(f"before {quoted(text)} after") == "before «…» after"


def test_a_quotation_that_was_cut_goes_on_to_the_end() -> None:
    assert unquoted(quoted(WORDS)[:5]) == "«…»"


def test_plain_data_is_searched_to_the_bottom() -> None:
    found = unquoted({"a": [{"b": quoted(WORDS), "c": 1}, (quoted(WORDS), None)]})
    assert found == {"a": [{"b": "«…»", "c": 1}, ["«…»", None]]}
