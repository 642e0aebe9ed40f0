"""The process that has the subject: it tries one point after another, as it is told.

    python -m qualification.sweep.driver '{"subject": ..., "folder": ..., ...}' PARENT_PROCESS_ID

It is under the interposer, and so are the processes below it. Requests come in on standard input, a JSON line each, and
each is answered by one on standard output. It arms, acts and disarms itself: what fails while it is armed is the
subject, or this process, which is to be survived too.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

from backends.contract import FaultRecord
from backends.faults.limits import declare_expendable
from backends.process import begin_as_child
from qualification.observe import recovered, told_since
from qualification.quoting import error_text, quoted
from qualification.subject import EVENT_KINDS
from qualification.sweep.points import BEYOND, HOST, Point, parse
from qualification.sweep.scenarios import AT_ONCE_S, SCENARIOS, SOON_S, Scenario
from qualification.sweep.stage import (
    CLOSED,
    DRAIN_S,
    STOPPED,
    WITHOUT_MEMORY_S,
    Before,
    Problem,
    Setting,
    Stage,
    is_running,
)


def main(argv: list[str]) -> int:
    """Do what is asked until the parent is gone."""
    setting, parent = Setting(**json.loads(argv[0])), int(argv[1])
    begin_as_child(parent)
    declare_expendable()
    # Where it dies of a fault, its last words say where.
    faulthandler.enable()
    # Whatever a library prints: the parent reads answers here, and nothing else.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    stage = Stage(setting)
    scenarios: dict[str, Scenario] = {}

    def answer(**what: Any) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    stage.fresh({})
    answer(ready=True, recovers=recovered(stage.require()) is not None)
    for line in sys.stdin:
        request = json.loads(line)
        if "recover" in request:
            answer(problems=_recover(stage, **request["recover"]))
            continue
        point = parse(request["point"])
        name = point.sweep.scenario
        if name not in scenarios:
            scenarios[name] = SCENARIOS[name](stage)
        if request["anew"]:
            stage.close()
        answer(**_try(stage, scenarios[name], point, request["fires"], request["closely"]))
    return 0


def _try(stage: Stage, scenario: Scenario, point: Point, fires: bool, closely: bool) -> dict[str, Any]:
    """Try one point, or with ``fires`` False only count; give what was seen, and what was not as it has to be."""
    control = stage.control
    for_good = fires and point.persistent and point.sweep.target == HOST
    plan = (point if fires else Point(point.sweep, point.mode, BEYOND)).plan()
    stage.patience_s = WITHOUT_MEMORY_S if for_good else DRAIN_S
    stage.persistent = fires and point.persistent
    # In order, and told: where no rung helps, as none does against a fault that stays in the process of the fallback.
    may_stop = scenario.stops or stage.persistent
    stage.may_stop = CLOSED if scenario.closes else STOPPED if may_stop else ""
    stage.reopened = stage.stopped = 0
    error, problems = "", list[Problem]()
    try:
        scenario.ready()
        before = stage.before()
    except Exception as failure:
        # Nothing is armed: what fails was left so by the point before.
        text = f"the point cannot even begin: {error_text(failure)}"
        return _answer(stage, FaultRecord(0, 0, 0, None), problems=[("hosts_lost", text)])
    control.prepare(plan, os.getpid())
    stage.board.arm(1)
    control.begin()
    try:
        scenario.act()
    except Exception as failure:
        control.end()
        error = error_text(failure)
    finally:
        control.end()
        stage.board.arm(0)
    record, site, fired_process = control.record(), control.call_site(), control.fired_process()
    told: list[str] = []
    held: dict[str, dict[str, int]] = {}
    try:
        problems = _judge(stage, scenario, before, told, point, fires, error)
        if closely:
            # What waits for the collector is not kept.
            gc.collect()
        held = {} if problems else stage.held()
    except Exception as failure:
        # Nothing fails any more, and yet something does.
        problems = [("hosts_lost", f"after the fault was over: {error_text(failure)}")]
    gone = bool(fired_process) and fired_process != os.getpid() and not is_running(fired_process)
    return _answer(
        stage,
        record,
        problems=problems,
        call_site=site,
        error=error,
        told=told,
        # Another that was put in its place by the subject, unasked, is not one that died.
        died=gone and not scenario.closes and ("worker_lost" in told or "restart_worker" not in told),
        absorbed=bool(record.faults_fired) and not error and not (set(told) - scenario.tells) and not gone,
        held=held,
        stopped=stage.stopped > 0 and not scenario.stops,
    )


def _answer(stage: Stage, record: FaultRecord, **rest: Any) -> dict[str, Any]:
    nothing = {"call_site": [], "error": "", "told": [], "died": False, "absorbed": False, "held": {}}
    return {
        "seen": record.points_seen,
        "fired": record.faults_fired,
        "detail": record.detail,
        "host": str(os.getpid()),
        "stopped": stage.stopped > 0,
        "recording": stage.recordings,
        **nothing,
        **rest,
    }


def _judge(
    stage: Stage, scenario: Scenario, before: Before, told: list[str], point: Point, fires: bool, error: str
) -> list[Problem]:
    """Have all that was begun come to its end, and look at it; add to ``told`` what the user was told meanwhile."""
    subject = stage.subject
    if subject is not None:
        told += told_since(subject, before.events)
    try:
        scenario.lift()
        not_lifted = ""
    except Exception as failure:
        not_lifted = f"what the scenario began cannot be ended: {error_text(failure)}"
    if problems := stage.finish():
        return problems
    if not_lifted and not stage.reopened:
        return [("clean_runs_wrong", not_lifted)]
    if stage.subject is subject:
        told[:] = told_since(stage.require(), before.events)
    if not fires and ((error and not scenario.stops) or not scenario.came_about(told)):
        kinds = [each if each in EVENT_KINDS else quoted(each) for each in told]
        return [("clean_runs_wrong", f"undisturbed it tells {kinds}, expected {sorted(scenario.tells)}: {error}")]
    if problems := stage.look(before, scenario.single):
        return problems
    in_host = point.sweep.target == HOST
    patience_s = AT_ONCE_S if stage.persistent else SOON_S
    if problems := scenario.after(patience_s) or stage.clean_run():
        return problems
    return scenario.check() if fires and in_host else []


def _recover(stage: Stage, folder: str, acknowledged: int, in_flight: int) -> list[Problem]:
    """Go on with the recording of a process that is gone; say what is not as it has to be."""
    stage.begin({}, Path(folder))
    stage.open()
    stage.accepted = stage.wanted = acknowledged
    before = stage.before()
    samples = recovered(stage.require())
    if samples is not None:
        if not acknowledged <= len(samples) <= max(acknowledged, in_flight):
            known = f"{acknowledged} samples were acknowledged, {in_flight} with the call in flight"
            return [("samples_lost", f"{known}: {len(samples)} are kept")]
        stage.accepted = len(samples)
    # Up to the next whole block: the answers are cut where they are in the undisturbed run.
    stage.wanted = -(-stage.accepted // stage.block_samples) * stage.block_samples
    return [*stage.finish(), *stage.look(before, single=False), *stage.clean_run()]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
