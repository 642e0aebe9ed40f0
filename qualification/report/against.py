"""What is worse than in an earlier report: slower recovery, a higher peak, a thinner margin, new failures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qualification.report.gate import Thresholds
from qualification.report.verdict import SCHEMA_VERSION
from qualification.sampling import MEMORY

MB = 1e6


class AgainstError(ValueError):
    """An earlier report cannot be used. The message names it, and says what was expected."""


def load(path: Path) -> dict[str, Any]:
    """Read an earlier report.json. Raises AgainstError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AgainstError(f"--against {path}: it cannot be read: {error}; expected a report.json") from error
    if not isinstance(found, dict) or not isinstance(found.get("cells"), list) or "verdict" not in found:
        raise AgainstError(f"--against {path}: it is no report; expected a report.json")
    if found.get("schema_version") != SCHEMA_VERSION:
        raise AgainstError(
            f"--against {path}: its schema_version is {found.get('schema_version')!r}, and this one is {SCHEMA_VERSION}"
        )
    return found


def compare(
    old: Mapping[str, Any], new: Mapping[str, Any], thresholds: Thresholds
) -> tuple[list[dict[str, Any]], list[str]]:
    """Give every regression, cell by cell, and the cells that could be compared with none.

    A cell is compared with itself on the same machine, or else, where either report has it once, with that.
    Raises AgainstError for an earlier report that lacks what is compared.
    """
    found: list[dict[str, Any]] = []
    without: list[str] = []
    compared: set[str] = set()
    try:
        for cell in new["cells"]:
            before = _before(old, new, cell)
            if before is not None:
                compared.add(before["id"])
                found += [{"cell": cell["id"], **each} for each in _compare(before, cell, thresholds)]
            elif cell["machine"] is not None:
                without.append(cell["id"])
        for cell in old["cells"]:
            if cell["id"] not in compared and cell["verdict"] == "pass":
                where = f"{cell['backend']} in {cell['environment']} on {cell['machine']}"
                text = f"{where} passed, and has no record or is not declared now"
                found.append({"cell": cell["id"], **_item("no longer proven", "", "", None, None, "", text)})
    except (KeyError, TypeError, AttributeError) as error:
        raise AgainstError(f"the earlier report lacks what is compared: {type(error).__name__}: {error}") from error
    return found, without


def _before(old: Mapping[str, Any], new: Mapping[str, Any], cell: Mapping[str, Any]) -> Mapping[str, Any] | None:
    def same(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        key = (cell["backend"], cell["environment"])
        return [each for each in report["cells"] if (each["backend"], each["environment"]) == key]

    def machine(each: Mapping[str, Any]) -> Any:
        return each["about"]["machine"]["id"] if each["about"] else None

    its, now = same(old), same(new)
    here = [each for each in its if machine(each) is not None and machine(each) == machine(cell)]
    if here:
        return here[0]
    return its[0] if len(its) == len(now) == 1 else None


def _compare(old: Mapping[str, Any], new: Mapping[str, Any], thresholds: Thresholds) -> Iterator[dict[str, Any]]:
    if old["verdict"] == "pass" and new["verdict"] != "pass":
        what = "new failure" if new["verdict"] == "fail" else "no longer proven"
        yield _item(what, "", "", None, None, "", f"it passed; now: {new['reason']}")
    before = {(each["test"], each["criterion"]): each for each in old["criteria"]}
    recovery = {(each["test"], each["criterion"]) for each in new["recovery"]}
    for now in new["criteria"]:
        key = (now["test"], now["criterion"])
        earlier = before.pop(key, None)
        if earlier is None:
            continue
        if earlier["verdict"] == "pass" and now["verdict"] != "pass":
            what = "new failure" if now["verdict"] == "fail" else "no longer proven"
            yield _item(what, *key, earlier["value"], now["value"], now["unit"], f"{now['promise']}: {now['verdict']}")
        elif key in recovery:
            yield from _slower(earlier, now, thresholds)
        else:
            yield from _thinner(earlier, now, thresholds)
    for (test, criterion), earlier in before.items():
        if earlier["verdict"] == "pass":
            text = f"{earlier['promise']}: it passed, and has no verdict now"
            yield _item("no longer proven", test, criterion, earlier["value"], None, earlier["unit"], text)
    yield from _higher(old, new, thresholds)


def _slower(old: Mapping[str, Any], new: Mapping[str, Any], thresholds: Thresholds) -> Iterator[dict[str, Any]]:
    before, now = old["value"], new["value"]
    if before is None or now is None:
        return
    if now - before > thresholds.slower_s and now > before * (1 + thresholds.slower_percent / 100):
        text = f"{new['promise']}: {before:.3g} s before, {now:.3g} s now"
        yield _item("slower recovery", new["test"], new["criterion"], before, now, "s", text)


def _thinner(old: Mapping[str, Any], new: Mapping[str, Any], thresholds: Thresholds) -> Iterator[dict[str, Any]]:
    before, now = old["margin_percent"], new["margin_percent"]
    # Of what there may be any number of, such as events, more room means nothing.
    counted = new["relation"] in (">", ">=") and new["unit"] != "%"
    if before is None or now is None or before <= 0 or counted:
        return
    lost = before - now
    if lost >= thresholds.thinner_points and lost > before * thresholds.thinner_percent / 100:
        text = f"{new['promise']}: {before:.1f} % of the limit were left, {now:.1f} % are"
        yield _item("thinner margin", new["test"], new["criterion"], old["value"], new["value"], new["unit"], text)


def _higher(old: Mapping[str, Any], new: Mapping[str, Any], thresholds: Thresholds) -> Iterator[dict[str, Any]]:
    before = {(each["test"], each["series"]): each["bytes"] for each in old["peaks"]}
    for peak in new["peaks"]:
        earlier, now = before.get((peak["test"], peak["series"])), peak["bytes"]
        if earlier is None:
            continue
        beyond_mb = (now - earlier) / MB
        if beyond_mb > thresholds.higher_mb and now > earlier * (1 + thresholds.higher_percent / 100):
            what = MEMORY.get(peak["series"], peak["series"])
            text = f"{what}: {earlier / MB:.1f} MB at most before, {now / MB:.1f} MB now"
            yield _item("higher peak", peak["test"], peak["series"], earlier / MB, now / MB, "MB", text)


def _item(
    what: str, test: str, criterion: str, before: float | None, now: float | None, unit: str, text: str
) -> dict[str, Any]:
    return {
        "what": what,
        "test": test,
        "criterion": criterion,
        "before": before,
        "now": now,
        "unit": unit,
        "text": text,
    }
