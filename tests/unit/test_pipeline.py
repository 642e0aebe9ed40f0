"""The pipeline answers everything it accepted exactly once, whatever memory does, and says what it does."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
import psutil
import pytest
from onnx import TensorProto, helper

import protection.pipeline
from backends.contract import FaultPlan, Site
from backends.cpu import Cpu
from backends.faults import ballast
from backends.model import DEFAULT_MODEL
from backends.threads import Thread
from protection.engine import InProcessEngine
from protection.events import Event, EventKind
from protection.pipeline import DictationPipeline, NotRecording, PipelineClosed
from protection.policy import RUNGS, Policy
from protection.pressure import Level
from protection.spool import AudioError, Result, Spool, SpoolBusy, SpoolFull
from protection.worker_engine import WorkerEngine
from qualification.subject import EVENT_KINDS, STRATEGIES
from tests.unit.waiting import until

MIB = 1 << 20
SECOND = 16_000
LIMIT_BYTES = 96 * MIB
Samples = npt.NDArray[np.float32]
Audio = Callable[[float], Samples]


class Open(Protocol):
    """Opens a pipeline in a folder below the test's own, closed when the test ends."""

    def __call__(self, folder: str = "a", *, model: Path = DEFAULT_MODEL, **policy: Any) -> DictationPipeline: ...


@pytest.fixture
def start(tmp_path: Path, bounded: Cpu) -> Iterator[Open]:
    with ExitStack() as opened:

        def make(folder: str = "a", *, model: Path = DEFAULT_MODEL, **policy: Any) -> DictationPipeline:
            engine = InProcessEngine(bounded, model)
            return opened.enter_context(DictationPipeline(tmp_path / folder, engine, Policy(**policy)))

        yield make


def _kinds(pipeline: DictationPipeline) -> list[str]:
    return [event.kind.value for event in pipeline.events()]


def _told(pipeline: DictationPipeline, kind: str) -> Callable[[], bool]:
    return lambda: kind in _kinds(pipeline)


def _feed(pipeline: DictationPipeline, samples: Samples, first: int = 0, block: int = 1600) -> int:
    accepted = first
    for at in range(first, len(samples), block):
        accepted = pipeline.feed(at, samples[at : at + block])
    return accepted


def _tile(results: Sequence[Result], stop: int) -> None:
    """Assert that the results tile [0, stop): no gap, no overlap."""
    edges = [0, *[result.stop for result in results]]
    starts = [result.start for result in results]
    assert starts == edges[:-1], f"results start at {starts}, the ones before stop at {edges[:-1]}"
    assert edges[-1] == stop, f"results reach to {edges[-1]}, accepted were {stop}"


def _same(a: Sequence[Result], b: Sequence[Result]) -> None:
    assert [(r.start, r.stop) for r in a] == [(r.start, r.stop) for r in b], "the results are about other ranges"
    for x, y in zip(a, b, strict=True):
        assert x.output is not None and y.output is not None, f"[{x.start}, {x.stop}) has no output"
        assert x.output.tobytes() == y.output.tobytes(), f"[{x.start}, {x.stop}) differs"


def _hold(device: Cpu, fraction: float) -> Any:
    """Hold real memory of the device until so much of it is in use."""
    device.release_cached()
    size = int(fraction * LIMIT_BYTES) - device.memory().used_bytes
    return device.allocate(size // 4 * 4)


# Bad input.


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (np.zeros(160, np.float64), r"has dtype float64: expected float32"),
        (np.zeros(160, np.int16), r"has dtype int16: expected float32 \(16-bit audio: samples / 32768\)"),
        (np.zeros(160, ">f4"), r"has dtype >f4: expected float32"),
        (np.zeros((2, 160), np.float32), r"has shape \[2, 160\]: expected one channel"),
        (np.float32(0.5), r"is a float32: expected a NumPy array"),
        (np.array(0.5, np.float32), r"has shape \[\]: expected one channel"),
        ([0.0] * 160, r"is a list: expected a NumPy array"),
        (b"\0" * 640, r"is a bytes: expected a NumPy array"),
        (None, r"is a NoneType: expected a NumPy array"),
        (np.array([0, np.nan], np.float32), r"has nan at index 1: expected finite samples"),
        (np.array([0, 0, -np.inf], np.float32), r"has -inf at index 2: expected finite samples"),
    ],
    ids=["float64", "int16", "endian", "stereo", "scalar", "rank-0", "list", "bytes", "none", "nan", "inf"],
)
def test_what_is_not_a_block_of_audio_is_refused(start: Open, block: Any, message: str) -> None:
    pipeline = start()
    with pytest.raises(AudioError, match=message):
        pipeline.feed(0, block)
    assert pipeline.feed(0, np.zeros(160, np.float32)) == 160, "a good block after it was not accepted from 0 on"


@pytest.mark.parametrize(
    ("position", "message"),
    [
        (-1, "starts at sample -1: expected 0 or more"),
        (1.0, "first sample is 1.0: expected a whole number"),
        (True, "first sample is True: expected a whole number"),
        ("0", "first sample is '0': expected a whole number"),
        (None, "first sample is None: expected a whole number"),
    ],
    ids=repr,
)
def test_what_is_not_a_position_is_refused(start: Open, position: Any, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        start().feed(position, np.zeros(160, np.float32))


def test_a_gap_is_refused_with_the_position_to_go_on_from(start: Open) -> None:
    pipeline = start()
    pipeline.feed(0, np.zeros(160, np.float32))
    with pytest.raises(AudioError, match="starts at sample 320, but only 160 were accepted"):
        pipeline.feed(320, np.zeros(160, np.float32))


@pytest.mark.parametrize("rate", [8000, 44_100, 0])
def test_another_sample_rate_is_refused_and_the_model_unloaded(bounded: Cpu, tmp_path: Path, rate: int) -> None:
    engine = InProcessEngine(bounded, DEFAULT_MODEL)
    with pytest.raises(AudioError, match=f"the sample rate is {rate} Hz, the model needs 16000: resample"):
        DictationPipeline(tmp_path, engine, sample_rate_hz=rate)
    assert bounded.memory().used_bytes == 0, f"{bounded.memory().used_bytes} bytes are still in use on the device"


def test_two_pipelines_on_one_folder_are_refused_and_the_first_goes_on(start: Open, audio: Audio) -> None:
    first = start()
    with pytest.raises(SpoolBusy, match="another pipeline"):
        start()
    _feed(first, audio(1.0))
    first.drain(60.0)
    _tile(first.results(), SECOND)


# Recording.


def test_a_stopped_recording_takes_nothing_and_answers_what_it_has(start: Open, audio: Audio) -> None:
    pipeline = start()
    samples = audio(1.3)
    _feed(pipeline, samples)
    assert not pipeline.toggle(), "toggling did not stop the recording"
    with pytest.raises(NotRecording, match="call toggle"):
        pipeline.feed(len(samples), samples)
    until(lambda: bool(pipeline.results()) and pipeline.results()[-1].stop == len(samples), "everything is answered")
    assert pipeline.toggle(), "toggling did not start the recording"
    assert pipeline.feed(len(samples), samples[:160]) == len(samples) + 160, "the recording does not go on"


def test_a_closed_pipeline_says_where_the_audio_is(start: Open, audio: Audio, tmp_path: Path) -> None:
    pipeline = start()
    _feed(pipeline, audio(0.5))
    pipeline.close()
    pipeline.close()
    for call in (lambda: pipeline.feed(8000, audio(0.1)), lambda: pipeline.drain(1.0), pipeline.toggle):
        with pytest.raises(PipelineClosed, match=rf"the 8000 samples accepted are in {tmp_path}/a/spool\.db"):
            call()


def test_results_tile_what_was_accepted_and_a_short_chunk_is_answered_short(start: Open, audio: Audio) -> None:
    pipeline = start()
    samples = audio(3.27)
    _feed(pipeline, samples, block=777)
    pipeline.drain(60.0)
    results = pipeline.results()
    _tile(results, len(samples))
    rows = [0 if r.output is None else len(r.output) for r in results]
    assert rows == [50, 50, 50, 14], f"rows of scores are {rows}; the last chunk is {len(samples) - 3 * SECOND} samples"
    assert {(r.device, r.degraded) for r in results} == {("cpu:arena", False)}, "results were made elsewhere"
    assert _kinds(pipeline) == [], f"without trouble the user was told {_kinds(pipeline)}"


def test_an_idle_pipeline_is_quiet(start: Open, audio: Audio) -> None:
    pipeline = start(pressure_interval_s=0.01)
    pipeline.drain(1.0)
    _feed(pipeline, audio(1.0))
    pipeline.drain(60.0)
    pipeline.drain(1.0)
    # Some twenty rounds of both threads, in which nothing may be said.
    threading.Event().wait(0.2)
    assert _kinds(pipeline) == [], f"with nothing to do the user was told {_kinds(pipeline)}"
    assert len(pipeline.results()) == 1, f"{len(pipeline.results())} results about one second of audio"


def test_blocks_of_any_size_give_the_same_answers(start: Open, audio: Audio) -> None:
    samples = audio(4.0)
    answers = []
    for name, block in (("one", 64_000), ("some", 5000), ("many", 320)):
        with start(name) as pipeline:
            _feed(pipeline, samples, block=block)
            pipeline.drain(60.0)
            answers.append(pipeline.results())
    _same(answers[0], answers[1])
    _same(answers[0], answers[2])


def test_feeding_again_changes_nothing(start: Open, audio: Audio) -> None:
    pipeline = start()
    samples = audio(2.0)
    _feed(pipeline, samples)
    pipeline.drain(60.0)
    before = pipeline.results()
    assert _feed(pipeline, samples) == len(samples), "feeding again changed what is accepted"
    pipeline.drain(60.0)
    _same(before, pipeline.results())


def test_the_left_context_is_fixed_and_used(start: Open, audio: Audio) -> None:
    samples = audio(3.0)
    context = 8240
    before, within = samples.copy(), samples.copy()
    before[: SECOND - context] = 0.0
    within[SECOND - 400 : SECOND] = 0.0
    answers = []
    for name, stream in (("plain", samples), ("before", before), ("within", within)):
        with start(name, max_batch=1) as pipeline:
            _feed(pipeline, stream, block=SECOND)
            pipeline.drain(60.0)
            answers.append(pipeline.results())
    plain, changed_before, changed_within = answers
    _same(plain[1:], changed_before[1:])
    a, b = plain[1].output, changed_within[1].output
    assert a is not None and b is not None and not np.array_equal(a, b), "the context does not reach the scores"


def test_drain_says_how_much_is_unanswered_when_time_is_up(start: Open, bounded: Cpu, audio: Audio) -> None:
    pipeline = start(rungs=("cache_clear",))
    with bounded.arm(FaultPlan(Site.DEVICE_MEMORY, times=None)):
        _feed(pipeline, audio(1.0))
        with pytest.raises(TimeoutError, match=r"16000 of 16000 samples are unanswered after 0\.3 s"):
            pipeline.drain(0.3)


# Resuming.


def test_what_was_unanswered_at_closing_is_answered_by_the_next(start: Open, audio: Audio) -> None:
    samples = audio(5.5)
    with start("whole") as pipeline:
        _feed(pipeline, samples)
        pipeline.drain(60.0)
        expected = pipeline.results()
    with start("parts") as pipeline:
        _feed(pipeline, samples[: 3 * SECOND + 4000])
    for upto in (4 * SECOND, len(samples)):
        with start("parts") as pipeline:
            accepted = pipeline.feed(3 * SECOND, samples[3 * SECOND : upto])
            assert accepted == upto, f"{accepted} samples are accepted after resuming, fed up to {upto}"
    with start("parts") as pipeline:
        pipeline.drain(60.0)
        _tile(pipeline.results(), len(samples))
        _same(pipeline.results(), expected)


def test_a_replay_is_bit_for_bit_the_same(start: Open, audio: Audio) -> None:
    samples = audio(6.0)
    answers = []
    for name in ("first", "second"):
        with start(name) as pipeline:
            _feed(pipeline, samples, block=len(samples))
            pipeline.drain(60.0)
            answers.append(pipeline.results())
    _same(*answers)


def test_what_is_accepted_can_be_got_back_by_hand(start: Open, audio: Audio, tmp_path: Path) -> None:
    pipeline = start()
    samples = audio(1.0)
    _feed(pipeline, samples)
    assert np.array_equal(pipeline.recovered(), samples), "the audio that was recovered is another"
    assert pipeline.export_wav(tmp_path / "out.wav") == len(samples), "the file is shorter"


# Memory.


def test_out_of_memory_is_recovered_from_and_told(start: Open, bounded: Cpu, audio: Audio) -> None:
    samples = audio(16.0)
    with start("plain") as pipeline:
        _feed(pipeline, samples, block=len(samples))
        pipeline.drain(60.0)
        expected = pipeline.results()
    pipeline = start("hit")
    with bounded.arm(FaultPlan(Site.DEVICE_CACHE)) as fault:
        _feed(pipeline, samples, block=len(samples))
        pipeline.drain(60.0)
        record = fault.record()
    assert record.faults_fired == 1, f"the fault did not fire: {record}"
    assert _kinds(pipeline) == ["oom_detected", "cache_clear", "recovered"], f"told: {_kinds(pipeline)}"
    _same(pipeline.results(), expected)
    metrics = pipeline.metrics()
    assert (metrics["oom_total"], metrics["recoveries_succeeded"]) == (1, 1), f"the counts are {dict(metrics)}"


def test_each_further_rung_is_reached_when_it_is_needed(start: Open, bounded: Cpu, audio: Audio) -> None:
    samples = audio(16.0)
    pipeline = start(pressure_interval_s=60.0)
    with bounded.arm(FaultPlan(Site.DEVICE_MEMORY, times=None)) as fault:
        _feed(pipeline, samples, block=len(samples))
        pipeline.drain(60.0)
        record = fault.record()
    kinds = _kinds(pipeline)
    rungs = [kind for kind in kinds if kind in RUNGS]
    expected = ["cache_clear", "garbage_collect", "reduce_buffer", "reduce_buffer", "reduce_buffer", "reduce_buffer"]
    assert rungs == [*expected, "cpu_fallback"], f"the rungs were {rungs}"
    assert record.faults_fired >= 7, f"the record is {record}"
    _tile(pipeline.results(), len(samples))
    assert {(r.device, r.degraded) for r in pipeline.results()} == {("cpu", True)}, "results were made elsewhere"


def test_a_batch_that_fits_is_kept_and_grows_again(start: Open, bounded: Cpu, audio: Audio) -> None:
    samples = audio(16.0)
    pipeline = start(pressure_interval_s=60.0, batches_before_growth=2)
    fits = bounded.load(DEFAULT_MODEL).working_set_bytes(4) * 5 // 4
    with bounded.arm(FaultPlan(Site.DEVICE_MEMORY, times=None, min_bytes=fits)):
        _feed(pipeline, samples, block=len(samples))
        pipeline.drain(60.0)
    rungs = [kind for kind in _kinds(pipeline) if kind in RUNGS]
    assert rungs.count("reduce_buffer") == 2 and "cpu_fallback" not in rungs, f"from 16 to 4 chunks: {rungs}"
    assert not any(r.degraded for r in pipeline.results()), "results are degraded"
    reduced = pipeline._batch
    more = audio(24.0)
    for at in range(len(samples), len(more), SECOND):
        pipeline.feed(at, more[at : at + SECOND])
        pipeline.drain(60.0)
    assert reduced == 4 and pipeline._batch == 16, f"the batch was {reduced} and is {pipeline._batch} after 8 good ones"


def test_garbage_is_collected_before_anything_is_reduced(start: Open, bounded: Cpu, audio: Audio) -> None:
    samples = audio(16.0)
    pipeline = start(pressure_interval_s=60.0)
    gc.disable()
    try:
        with bounded.arm(FaultPlan(Site.DEVICE_GARBAGE)):
            _feed(pipeline, samples, block=len(samples))
            pipeline.drain(60.0)
    finally:
        gc.enable()
    expected = ["oom_detected", "cache_clear", "garbage_collect", "recovered"]
    assert _kinds(pipeline) == expected, f"told: {_kinds(pipeline)}"


def test_pressure_is_told_and_acted_on_level_by_level_and_over_it_returns(
    start: Open, bounded: Cpu, audio: Audio
) -> None:
    pipeline = start(pressure_interval_s=0.02, return_after_s=0.1)
    held = []
    for fraction, kind in ((0.82, "pressure_warning"), (0.92, "pressure_critical"), (0.96, "pressure_emergency")):
        held.append(_hold(bounded, fraction))
        until(_told(pipeline, kind), f"{kind} at {fraction:.0%}")
    until(lambda: pipeline.device() == "cpu", "it left the device")
    _feed(pipeline, audio(2.0))
    pipeline.drain(60.0)
    held.append(_hold(bounded, 0.995))
    until(lambda: pipeline._device_pressure.fraction > 0.98, "98 % are seen")
    ballast.free(held)
    until(lambda: pipeline.device() == "cpu:arena", "it returned to the device")
    until(lambda: "pressure_normal" in _kinds(pipeline), "the end of the pressure is told")
    pipeline.feed(2 * SECOND, audio(3.0)[2 * SECOND :])
    pipeline.drain(60.0)
    kinds = [k for k in _kinds(pipeline) if k != "pressure_normal"]
    assert kinds == [
        "pressure_warning",
        "cache_clear",
        "pressure_critical",
        "reduce_buffer",
        "pressure_emergency",
        "cpu_fallback",
        "returned_to_device",
    ], f"told: {kinds}"
    made = [(r.device, r.degraded) for r in pipeline.results()]
    assert made == [("cpu", True)] * 2 + [("cpu:arena", False)], f"the results were made on {made}"


def test_pressure_on_a_device_that_was_left_already_is_not_acted_on(start: Open, bounded: Cpu, audio: Audio) -> None:
    pipeline = start(pressure_interval_s=0.02, return_after_s=60.0)
    with bounded.arm(FaultPlan(Site.DEVICE_MEMORY, times=None)):
        pipeline.feed(0, audio(1.0))
        pipeline.drain(60.0)
    until(lambda: pipeline._relieved["device"] is Level.NORMAL, "the pressure of the fault is over")
    before = _kinds(pipeline)
    held = _hold(bounded, 0.995)
    until(lambda: pipeline._relieved["device"] is Level.SHUTDOWN, "99.5 % are seen")
    pipeline.feed(SECOND, audio(2.0)[SECOND:])
    pipeline.drain(60.0)
    held.free()
    told = [kind for kind in _kinds(pipeline)[len(before) :] if kind != "pressure_normal"]
    assert before.count("cpu_fallback") == 1, f"told before: {before}"
    assert told == [], f"a device that others fill and that it does not use made it tell {told}"


def test_it_stays_on_the_fallback_while_the_device_is_more_than_60_percent_full(start: Open, bounded: Cpu) -> None:
    pipeline = start(pressure_interval_s=0.01, return_after_s=0.05)
    held = [_hold(bounded, 0.65), _hold(bounded, 0.96)]
    until(lambda: pipeline.device() == "cpu", "it left the device")
    held.pop().free()
    until(lambda: 0.6 < pipeline._device_pressure.fraction < 0.7, "65 % are seen")
    # Time for many readings: it has to stay where it is.
    threading.Event().wait(0.3)
    stayed = pipeline.device()
    ballast.free(held)
    until(lambda: pipeline.device() == "cpu:arena", "it returned below 60 %")
    assert stayed == "cpu", f"at 65 % it is on {stayed}"


def test_above_98_percent_without_a_fallback_it_ends_in_order_and_keeps_the_audio(
    start: Open, bounded: Cpu, audio: Audio
) -> None:
    # Less than a chunk: nothing is being computed, and it is the pressure that is noticed.
    samples = audio(0.8)
    pipeline = start(pressure_interval_s=0.02, rungs=tuple(r for r in RUNGS if r != "cpu_fallback"))
    _feed(pipeline, samples)
    held = _hold(bounded, 0.99)
    until(lambda: "emergency_shutdown" in _kinds(pipeline), "the emergency shutdown")
    with pytest.raises(PipelineClosed, match=r"emergency shutdown: .*of the device's memory is in use"):
        pipeline.feed(len(samples), samples)
    kept = pipeline.recovered()
    pipeline.close()
    held.free()
    assert np.array_equal(kept, samples), f"{len(kept)} samples were kept, {len(samples)} accepted"
    assert "cpu_fallback" not in _kinds(pipeline), f"told: {_kinds(pipeline)}"
    with start() as after:
        after.drain(60.0)
        _tile(after.results(), len(samples))


def test_a_policy_without_the_fallback_ends_when_no_rung_helps(start: Open, bounded: Cpu, audio: Audio) -> None:
    samples = audio(2.5)
    rungs = tuple(rung for rung in RUNGS if rung != "cpu_fallback")
    pipeline = start(pressure_interval_s=60.0, rungs=rungs)
    with bounded.arm(FaultPlan(Site.DEVICE_MEMORY, times=None)) as fault:
        pipeline.feed(0, samples)
        until(lambda: "emergency_shutdown" in _kinds(pipeline), "the emergency shutdown")
        record = fault.record()
    with pytest.raises(PipelineClosed, match="no rung of the ladder helped"):
        pipeline.drain(1.0)
    kinds = _kinds(pipeline)
    assert record.faults_fired > 0 and "cpu_fallback" not in kinds, f"{record}; told: {kinds}"
    assert [kind for kind in kinds if kind in RUNGS][-1] == "emergency_shutdown", f"told: {kinds}"
    assert np.array_equal(pipeline.recovered(), samples), "accepted audio is missing"
    pipeline.close()
    with start() as after:
        after.drain(60.0)
        _tile(after.results(), len(samples))


def test_a_policy_without_the_emergency_shutdown_waits_for_memory(start: Open, bounded: Cpu, audio: Audio) -> None:
    samples = audio(3.0)
    pipeline = start(pressure_interval_s=60.0, rungs=("cache_clear", "garbage_collect", "reduce_buffer"))
    with bounded.arm(FaultPlan(Site.DEVICE_MEMORY, times=None)):
        pipeline.feed(0, samples[: 2 * SECOND])
        until(lambda: "pressure_emergency" in _kinds(pipeline), "that it waits is told")
        accepted = pipeline.feed(2 * SECOND, samples[2 * SECOND :])
        waiting = len(pipeline.results())
    pipeline.drain(60.0)
    assert waiting == 0 and accepted == len(samples), f"{waiting} results and {accepted} samples while waiting"
    assert "emergency_shutdown" not in _kinds(pipeline), f"told: {_kinds(pipeline)}"
    _tile(pipeline.results(), len(samples))


# A chunk that cannot be computed.


def _no_silence(path: Path) -> Path:
    """Write a model of the expected shape whose scores are not numbers where the audio is silent."""
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["features", "twenty"], ["raised"]),
            helper.make_node("Sqrt", ["raised"], ["root"]),
            helper.make_node("Slice", ["root", "first", "last", "axes", "steps"], ["scores"]),
        ],
        "no-silence",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 150, 80])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 75, 32])],
        [
            helper.make_tensor("twenty", TensorProto.FLOAT, [1], [20.0]),
            helper.make_tensor("first", TensorProto.INT64, [2], [0, 0]),
            helper.make_tensor("last", TensorProto.INT64, [2], [150, 32]),
            helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2]),
            helper.make_tensor("steps", TensorProto.INT64, [2], [2, 1]),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_a_chunk_that_fails_again_and_again_is_set_aside_and_its_neighbours_are_answered(
    start: Open, audio: Audio, tmp_path: Path
) -> None:
    samples = audio(5.0)
    samples[2 * SECOND : 3 * SECOND] = 0.0
    pipeline = start(model=_no_silence(tmp_path / "no-silence.onnx"))
    pipeline.feed(0, samples)
    pipeline.drain(60.0)
    results = pipeline.results()
    _tile(results, len(samples))
    failed = [(r.start, r.stop) for r in results if r.output is None]
    assert failed == [(2 * SECOND, 3 * SECOND)], f"declared failures are {failed}"
    told = [event for event in pipeline.events() if event.kind is EventKind.CHUNK_SET_ASIDE]
    assert _kinds(pipeline) == ["chunk_set_aside"], f"told: {_kinds(pipeline)}"
    assert "samples [32000, 48000) failed 3 times" in told[0].message, f"the message is {told[0].message!r}"
    assert pipeline.metrics()["chunks_set_aside"] == 1, f"the counts are {dict(pipeline.metrics())}"
    assert np.array_equal(pipeline.recovered(), samples), "the audio of the chunk is not kept"


# The disk.


def test_a_full_spool_refuses_what_is_new_and_loses_nothing(start: Open, audio: Audio) -> None:
    samples = audio(12.0)
    pipeline = start(spool_limit_bytes=256 << 10)
    with pytest.raises(SpoolFull, match="raise spool_limit_bytes"):
        _feed(pipeline, samples)
    kept = pipeline.recovered()
    accepted = len(kept)
    assert accepted >= SECOND and np.array_equal(kept, samples[:accepted]), f"of {accepted} samples some are others"
    before = pipeline.results()
    pipeline.close()
    with start(spool_limit_bytes=4 << 20) as larger:
        _feed(larger, samples, first=accepted)
        larger.drain(60.0)
        after = larger.results()
    _tile(after, len(samples))
    _same(before, after[: len(before)])


def test_the_user_is_told_once_that_audio_is_refused(start: Open, audio: Audio) -> None:
    samples = audio(12.0)
    pipeline = start(spool_limit_bytes=256 << 10)
    for _ in range(3):
        with pytest.raises(SpoolFull):
            _feed(pipeline, samples, first=len(pipeline.recovered()))
    told = [event for event in pipeline.events() if event.kind is EventKind.STORAGE_FAILED]
    assert len(told) == 1, f"the user was told {len(told)} times"
    assert "raise spool_limit_bytes" in told[0].message and told[0].action == "audio is not accepted", f"{told[0]}"


def test_a_full_spool_has_room_for_the_answers_to_what_it_accepted(start: Open, bounded: Cpu, audio: Audio) -> None:
    samples = audio(30.0)
    pipeline = start(spool_limit_bytes=1 << 20, pressure_interval_s=60.0, rungs=("cache_clear",))
    # Nothing is answered before it is full.
    with bounded.arm(FaultPlan(Site.DEVICE_MEMORY, times=None)), pytest.raises(SpoolFull):
        _feed(pipeline, samples, block=1600)
    accepted = len(pipeline.recovered())
    pipeline.drain(60.0)
    _tile(pipeline.results(), accepted)


def test_a_model_file_that_is_gone_does_not_stop_a_recording(tmp_path: Path, bounded: Cpu, audio: Audio) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(DEFAULT_MODEL.read_bytes())
    samples = audio(6.0)
    with DictationPipeline(tmp_path / "s", InProcessEngine(bounded, path)) as pipeline:
        path.unlink()
        pipeline.feed(0, samples)
        pipeline.drain(60.0)
        failed = [result.start for result in pipeline.results() if result.output is None]
    assert not failed, f"the chunks at {failed} were set aside"


def test_a_device_that_is_full_at_the_start_means_the_fallback(tmp_path: Path, bounded: Cpu, audio: Audio) -> None:
    held = ballast.fill(bounded.allocate)
    with DictationPipeline(tmp_path / "s", InProcessEngine(bounded, DEFAULT_MODEL)) as pipeline:
        pipeline.feed(0, audio(2.0))
        pipeline.drain(60.0)
        devices = {result.device for result in pipeline.results()}
        told = _kinds(pipeline)
        ballast.free(held)
        until(lambda: pipeline.device() == "cpu:arena", "it goes to the device once there is memory")
    assert devices == {"cpu"} and told[:2] == ["oom_detected", "cpu_fallback"], f"on {devices}, told {told}"


def test_a_device_without_room_for_one_chunk_is_not_returned_to(tmp_path: Path, audio: Audio) -> None:
    small = Cpu()
    small.limit_memory(4 << 20)
    with DictationPipeline(tmp_path / "s", InProcessEngine(small, DEFAULT_MODEL)) as pipeline:
        for second in range(4):
            pipeline.feed(second * SECOND, audio(1.0))
            pipeline.drain(60.0)
        until(lambda: pipeline.metrics().get("returns_failed", 0) >= 2, "a return is tried and fails")
        told = _kinds(pipeline)
    small.close()
    assert told.count("cpu_fallback") == 1 and "returned_to_device" not in told, f"told {told}"


def _short(pipeline: DictationPipeline) -> Callable[[], bool]:
    return lambda: len(pipeline.recovered()) <= 2 * SECOND


def test_retention_deletes_answered_audio_and_the_answers_stay_the_same(
    start: Open, audio: Audio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protection.pipeline, "_RETENTION_EVERY_S", 0.01)
    samples = audio(30.0)
    answers = {}
    for name, retention_s in (("all", None), ("none", 0.0)):
        with start(name, retention_s=retention_s) as pipeline:
            for at in range(0, len(samples), SECOND):
                pipeline.feed(at, samples[at : at + SECOND])
                pipeline.drain(60.0)
            if retention_s is not None:
                until(_short(pipeline), "all but the last seconds are deleted")
                kept = pipeline.recovered()
                assert np.array_equal(kept, samples[-len(kept) :]), "what is kept is not the end of the recording"
            answers[name] = pipeline.results()
    _same(answers["all"], answers["none"])


# What the user is told.


def test_every_event_says_what_happened_what_was_done_and_what_it_means(
    start: Open, bounded: Cpu, audio: Audio
) -> None:
    pipeline = start(rungs=tuple(rung for rung in RUNGS if rung != "cpu_fallback"))
    with bounded.arm(FaultPlan(Site.DEVICE_MEMORY, times=None)):
        pipeline.feed(0, audio(16.0))
        until(lambda: "emergency_shutdown" in _kinds(pipeline), "the emergency shutdown")
    events: Sequence[Event] = pipeline.events()
    empty = [e for e in events if not (e.message.strip() and e.action.strip() and e.meaning.strip())]
    assert len(events) >= 5 and not empty, f"of {len(events)} events these leave something out: {empty}"
    assert [e.time_s for e in events] == sorted(e.time_s for e in events), "events are not in order"


def test_kinds_of_events_and_rungs_are_those_of_the_qualification() -> None:
    assert {kind.value for kind in EventKind} == EVENT_KINDS, "the closed sets of events differ"
    assert RUNGS == STRATEGIES, f"rungs {RUNGS}, strategies {STRATEGIES}"


def test_a_pipeline_leaves_no_thread_behind(start: Open, audio: Audio) -> None:
    before = set(threading.enumerate())
    for k in range(5):
        with start(str(k)) as pipeline:
            pipeline.feed(0, audio(0.5))
    left = [thread.name for thread in set(threading.enumerate()) - before]
    assert not left, f"threads left behind: {left}"


# What begins or ends without memory.


@pytest.mark.parametrize(
    ("name", "numbered"),
    [("plimsoll-work", False), ("plimsoll-work", True), ("plimsoll-pressure", False)],
    ids=["work", "work that had its number", "pressure"],
)
def test_a_pipeline_that_cannot_begin_leaves_the_folder_free_and_no_worker(
    tmp_path: Path, bounded: Cpu, audio: Audio, monkeypatch: pytest.MonkeyPatch, name: str, numbered: bool
) -> None:
    class CannotBegin(Thread):
        def start(self) -> None:
            if self.name == name:
                # Python numbers a thread before it has all that it needs.
                self._ident = 1 if numbered else None
                raise MemoryError("a thread had no memory to begin")
            super().start()

    before, threads = set(psutil.Process().children(recursive=True)), set(threading.enumerate())
    monkeypatch.setattr(protection.pipeline, "Thread", CannotBegin)
    began_s = time.monotonic()
    with pytest.raises(MemoryError, match="a thread had no memory to begin"):
        # Whoever waited for a thread that never began would wait for long.
        DictationPipeline(tmp_path / "a", WorkerEngine(bounded, DEFAULT_MODEL), Policy(shutdown_deadline_s=100.0))
    took_s = time.monotonic() - began_s
    left = set(psutil.Process().children(recursive=True)) - before
    assert not left, f"processes left behind: {left}"
    until(lambda: set(threading.enumerate()) <= threads, "its threads end")
    assert took_s < 20.0, f"it took {took_s:.1f} s to say so"
    monkeypatch.undo()
    with DictationPipeline(tmp_path / "a", InProcessEngine(bounded, DEFAULT_MODEL)) as pipeline:
        _feed(pipeline, audio(1.0))
        pipeline.drain(60.0)
        _tile(pipeline.results(), SECOND)


def test_a_pipeline_whose_spool_cannot_even_be_closed_ends_its_worker(
    tmp_path: Path, bounded: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError("there was none")

    before = set(psutil.Process().children(recursive=True))
    monkeypatch.setattr(Thread, "start", no_memory)
    monkeypatch.setattr(Spool, "close", no_memory)
    with pytest.raises(MemoryError, match="there was none"):
        DictationPipeline(tmp_path / "a", WorkerEngine(bounded, DEFAULT_MODEL))
    monkeypatch.undo()
    left = set(psutil.Process().children(recursive=True)) - before
    assert not left, f"processes left behind: {left}"


def test_a_close_that_was_cut_short_can_be_repeated(
    tmp_path: Path, bounded: Cpu, audio: Audio, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = set(threading.enumerate())
    engine = InProcessEngine(bounded, DEFAULT_MODEL)
    pipeline = DictationPipeline(tmp_path / "a", engine)
    _feed(pipeline, audio(1.0))
    pipeline.drain(60.0)
    shutdown, asked = DictationPipeline.shutdown, []

    def fail_once(self: DictationPipeline, reason: str) -> None:
        asked.append(reason)
        if len(asked) == 1:
            raise MemoryError("there was none")
        shutdown(self, reason)

    monkeypatch.setattr(DictationPipeline, "shutdown", fail_once)
    with pytest.raises(MemoryError, match="there was none"):
        pipeline.close()
    with Spool(tmp_path / "a", SECOND) as spool:
        assert spool.accepted == SECOND, f"{spool.accepted} samples are there"
    pipeline.close()
    pipeline.close()
    assert asked == ["closed"] * 2, f"it was shut down {len(asked)} times: expected once for each close that had work"
    until(lambda: set(threading.enumerate()) <= threads, "its threads end")
    assert engine._closed, "the engine is open"


def test_an_engine_that_cannot_be_closed_at_once_is_closed_a_moment_later(
    tmp_path: Path, bounded: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    close, asked = InProcessEngine.close, []

    def fail_twice(self: InProcessEngine) -> None:
        asked.append(self)
        if len(asked) <= 2:
            raise MemoryError("there was none")
        close(self)

    monkeypatch.setattr(InProcessEngine, "close", fail_twice)
    engine = InProcessEngine(bounded, DEFAULT_MODEL)
    DictationPipeline(tmp_path / "a", engine).close()
    assert len(asked) == 3 and engine._closed, f"asked {len(asked)} times, closed: {engine._closed}"


@pytest.mark.parametrize("what", ["waits", "weighs"])
def test_memory_is_watched_after_the_watcher_had_none_itself(
    start: Open, bounded: Cpu, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    pipeline = start(pressure_interval_s=0.02)
    place, name = (pipeline._wake, "wait_for") if what == "waits" else (pipeline._device_pressure, "update")
    act, failed = getattr(place, name), list[str]()

    def fail_at_first(*arguments: Any) -> Any:
        if threading.current_thread().name == "plimsoll-pressure" and len(failed) < 5:
            failed.append(name)
            raise MemoryError("there was none")
        return act(*arguments)

    monkeypatch.setattr(place, name, fail_at_first)
    until(lambda: len(failed) == 5, "the watcher fails five times")
    held = _hold(bounded, 0.92)
    until(_told(pipeline, "pressure_critical"), "the user is told that memory is short")
    held.free()


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (np.zeros((2, 3)), np.zeros((2, 3)), True),
        (np.eye(3), np.eye(3) + 5e-4, True),
        (np.eye(3), np.eye(3) + 2e-3, False),
        (np.zeros((2, 3)), np.zeros((3, 2)), False),
        (np.array([[0.0, 1e-4]]), np.array([[1e-4, 0.0]]), False),
        (None, None, True),
        (None, np.zeros((2, 3)), False),
        (np.full((1, 2), np.nan), np.full((1, 2), np.nan), False),
    ],
    ids=["equal", "near", "far", "shape", "argmax", "none", "one-none", "nan"],
)
def test_two_outputs_are_the_same_answer_within_the_tolerance(a: Any, b: Any, same: bool) -> None:
    found = DictationPipeline.equivalent(a, b)
    assert found is same, f"equivalent says {found}, expected {same}"
