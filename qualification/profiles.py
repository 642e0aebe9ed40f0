"""What pytest is told for each profile, by nox and without it."""

from __future__ import annotations

from dataclasses import dataclass

SWEEP = "tests/test_fault_sweep.py"
#: The tests of the qualification.
TESTS = ("tests/test_memory_protection.py", "tests/test_oom_recovery.py", SWEEP)


@dataclass(frozen=True)
class Selection:
    """The files of a profile, what its marks have to be, and what else pytest is told."""

    files: tuple[str, ...]
    marks: str
    options: tuple[str, ...] = ()

    def narrowed(self, marks: str) -> str:
        """Give the marks for pytest, which takes the last of two: what is asked for, within the profile."""
        return f"({marks}) and {self.marks}" if marks else self.marks


#: What takes hours goes on where it was cut off. The soak is all but the whole sweep.
SELECTIONS = {
    "quick": Selection(TESTS, "not slow"),
    "soak": Selection(TESTS, "not (sweep and slow)", ("--resume",)),
    "sweep": Selection((SWEEP,), "sweep and slow", ("--resume",)),
}
