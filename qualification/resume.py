"""A run that is cut off goes on where it ended, test by test: what a test has measured is not measured again.

Only whole tests are kept, good or bad. One that was cut off, was not run, or failed in another way than by a criterion
runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any

import pytest

from qualification.judge import Judge
from qualification.quoting import unquoted
from qualification.records import now
from qualification.survival import Unfinished

#: On a test that was not run again: the record of the run that measured it.
TAKEN = pytest.StashKey[str]()


class TestByTest:
    """A pytest plugin that keeps the verdicts of each test, and takes them from the run that was cut off.

    ``judge_of`` gives the judge of a test that has one, ``criterion_failed`` is how a test says that it measured.
    """

    #: Not a test, whatever its name.
    __test__ = False

    def __init__(
        self,
        unfinished: Unfinished,
        selected: Iterable[str],
        record: str,
        judge_of: Callable[[pytest.Item], Judge | None],
        criterion_failed: type[BaseException],
    ) -> None:
        """Take up what there is of the tests that are ``selected``; this run writes to ``record``, a file's name."""
        self._record = record
        self._unfinished, self._judge_of, self._criterion_failed = unfinished, judge_of, criterion_failed
        self._left = set(selected)
        self._selected = frozenset(self._left)
        #: What the tests that were called measured, until they are torn down.
        self._measured: dict[str, dict[str, Any]] = {}
        self.taken: list[str] = []
        #: Why something could not be kept.
        self.complaint = ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool | None:
        """Give a test the verdicts that it had, instead of calling it."""
        judge, kept = self._judge_of(pyfuncitem), self._unfinished.rounds.get(pyfuncitem.nodeid)
        if judge is None or kept is None:
            return None
        judge.take(kept["verdicts"], f"measured by the run that was cut off, until {kept['ended']}")
        judge.evidence, judge.complaint = list(kept["evidence"]), str(kept["complaint"])
        pyfuncitem.stash[TAKEN] = str(kept["record"])
        self.taken.append(pyfuncitem.nodeid)
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Keep the verdicts of a test that measured everything, once it was torn down in order."""
        judge = self._judge_of(item)
        if call.when == "call" and judge is not None and item.nodeid not in self.taken:
            failed = call.excinfo is not None and not call.excinfo.errisinstance(self._criterion_failed)
            if not failed and not judge.unjudged and all(each.verdict != "not_run" for each in judge.verdicts):
                self._measured[item.nodeid] = {
                    "ended": now(),
                    "record": self._record,
                    "verdicts": judge.written,
                    "evidence": judge.recorded,
                    "complaint": unquoted(judge.complaint),
                }
        report = yield
        if call.when == "teardown":
            self._left.discard(item.nodeid)
            measured = self._measured.pop(item.nodeid, None)
            if measured is not None and report.passed:
                try:
                    self._unfinished.keep(item.nodeid, measured)
                except OSError as error:
                    self.complaint = f"what was measured could not be kept for --resume: {error}"
        return report

    def pytest_sessionfinish(self) -> None:
        """Forget the tests of this run once each of them came to its end; others may be waiting."""
        if not self._left:
            try:
                self._unfinished.forget(self._selected)
            except OSError as error:
                self.complaint = f"what was measured could not be forgotten: {error}"
