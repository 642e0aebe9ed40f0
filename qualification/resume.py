"""A run that is cut off goes on where it ended, test by test: what a test has measured is not measured again.

Only whole tests are kept, good or bad. One that was cut off, was not run, or broke before all was measured runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from datetime import UTC, datetime

import pytest

from qualification.judge import Judge
from qualification.survival import Unfinished


class TestByTest:
    """A pytest plugin that keeps the verdicts of each test, and takes them from the run that was cut off."""

    #: Not a test, whatever its name.
    __test__ = False

    def __init__(self, unfinished: Unfinished, judge_of: Callable[[pytest.Item], Judge | None]) -> None:
        """Take up what there is; ``judge_of`` gives the judge of a test that has one."""
        self._unfinished, self._judge_of = unfinished, judge_of
        self.taken: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool | None:
        """Give a test the verdicts that it had, instead of calling it."""
        judge, kept = self._judge_of(pyfuncitem), self._unfinished.rounds.get(pyfuncitem.nodeid)
        if judge is None or kept is None:
            return None
        judge.take(kept["verdicts"], f"measured by the run that was cut off, until {kept['ended']}")
        self.taken.append(pyfuncitem.nodeid)
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Keep the verdicts of a test that was called and measured everything."""
        judge = self._judge_of(item)
        measured = (
            judge is not None and not judge.unjudged and all(each.verdict != "not_run" for each in judge.verdicts)
        )
        report = yield
        if call.when == "call" and judge is not None and measured and item.nodeid not in self.taken:
            ended = datetime.now(UTC).isoformat(timespec="seconds")
            self._unfinished.keep(item.nodeid, {"ended": ended, "verdicts": judge.written})
        return report

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Forget everything once all was run."""
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            self._unfinished.done()
