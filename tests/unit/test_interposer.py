"""The interposer under real processes: what it refuses, what it counts, whom it leaves alone, how it is compiled."""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from backends.contract import BackendError, FaultPlan, FaultRecord, Provenance, Site
from backends.cpu import Cpu
from backends.faults import interposer
from backends.faults.interposer import Control, Durability, InterposerUnavailable

ROOT = Path(__file__).resolve().parents[2]

try:
    LIBRARY = interposer.library()
except InterposerUnavailable as error:
    pytest.skip(f"not run: {error}", allow_module_level=True)

#: From here on only what a test asks for counts: the C library's own requests are smaller.
LEAST = 1 << 16
#: Bytes that no memory has.
TOO_MUCH = 1 << 62

# Does what its arguments say, one by one, and prints for each: name, result, errno (77 where it was left alone).
PROBE = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static int file;
static char **all, **rest_of_it;
static char *volatile held;

static void perform(char *words);

static void *named(void *words) {
    char *name = strsep((char **)&words, "/");
    pthread_setname_np(pthread_self(), name);
    perform(words);
    return NULL;
}

static void say(const char *name, void *made, void *failed) {
    dprintf(1, "%s %s %d\n", name, made == failed ? "refused" : "made", errno);
}

static void perform(char *words) {
    char *rest = words, *name = strsep(&rest, ":"), *first = rest ? rest : "";
    char *end;
    size_t a = strtoull(first, &end, 0), b = *end ? strtoull(end + 1, NULL, 0) : 0;
    void *old;
    errno = 77;
    if (!strcmp(name, "malloc"))
        say(name, malloc(a), NULL);
    else if (!strcmp(name, "calloc"))
        say(name, calloc(a, b), NULL);
    else if (!strcmp(name, "realloc")) {
        /* The old one is still there where the new one was refused. */
        memset(held = malloc(a), 'x', a);
        errno = 77;
        char *made = realloc(held, b);
        say(name, made, NULL);
        char *there = made ? made : b ? held : NULL;
        if (there && there[a < b || !b ? a - 1 : b - 1] != 'x')
            abort();
    } else if (!strcmp(name, "realloc_null"))
        say(name, realloc(NULL, a), NULL);
    else if (!strcmp(name, "memalign"))
        say(name, memalign(a, b), NULL);
    else if (!strcmp(name, "aligned_alloc"))
        say(name, aligned_alloc(a, b), NULL);
    else if (!strcmp(name, "posix_memalign")) {
        void *made = &file;
        int given = posix_memalign(&made, a, b);
        if (given ? made != &file : (size_t)made % a != 0)
            abort();
        dprintf(1, "%s returned-%d %d\n", name, given, errno);
    } else if (!strcmp(name, "mmap"))
        say(name, mmap(NULL, a, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, b), MAP_FAILED);
    else if (!strcmp(name, "mmap64"))
        say(name, mmap64(NULL, a, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, b), MAP_FAILED);
    else if (!strcmp(name, "mremap")) {
        old = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        old = mremap(old, 4096, a, MREMAP_MAYMOVE);
        errno = 77;
        say(name, mremap(old, a, b, MREMAP_MAYMOVE), MAP_FAILED);
    } else if (!strcmp(name, "mremap_to")) {
        char *place = mmap(NULL, 8192, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        old = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        say(name, mremap(old, 4096, 8192, MREMAP_MAYMOVE | MREMAP_FIXED, place), MAP_FAILED);
        memset(place, 'x', 8192);
    } else if (!strcmp(name, "strdup")) {
        char text[100001] = {0};
        memset(text, 'x', 100000);
        say(name, strdup(text), NULL);
    } else if (!strcmp(name, "hold"))
        for (size_t i = 0; i < a; i++)
            held = malloc(b);
    else if (!strcmp(name, "write"))
        dprintf(1, "%s %zd %d\n", name, write(file, "data", 4), errno);
    else if (!strcmp(name, "pwrite"))
        dprintf(1, "%s %zd %d\n", name, pwrite(file, "data", 4, 3), errno);
    else if (!strcmp(name, "pwrite64"))
        dprintf(1, "%s %zd %d\n", name, pwrite64(file, "data", 4, 3), errno);
    else if (!strcmp(name, "write_badly"))
        dprintf(1, "%s %zd %d\n", name, write(-1, "data", 4), errno);
    else if (!strcmp(name, "write_to_pipe")) {
        int ends[2];
        dprintf(1, "%s %d %d\n", name, pipe(ends) || write(ends[1], "data", 4) != 4, errno);
    } else if (!strcmp(name, "fsync"))
        dprintf(1, "%s %d %d\n", name, fsync(file), errno);
    else if (!strcmp(name, "fdatasync"))
        dprintf(1, "%s %d %d\n", name, fdatasync(file), errno);
    else if (!strcmp(name, "fsync_badly"))
        dprintf(1, "%s %d %d\n", name, fsync(-1), errno);
    else if (!strcmp(name, "wait")) {
        char byte;
        dprintf(1, "waits\n");
        if (read(0, &byte, 1) != 1)
            _exit(3);
    } else if (!strcmp(name, "thread")) {
        pthread_t thread;
        pthread_create(&thread, NULL, named, first);
        pthread_join(thread, NULL);
    } else if (!strcmp(name, "fork")) {
        int child = fork();
        if (!child) {
            perform(first);
            _exit(0);
        }
        waitpid(child, NULL, 0);
    } else if (!strcmp(name, "crowd")) {
        /* So many children that live until this process ends, each with one request. */
        int ends[2];
        if (pipe(ends))
            _exit(3);
        for (size_t i = 0; i < a; i++) {
            int done[2];
            char byte;
            if (pipe(done))
                _exit(3);
            if (!fork()) {
                close(ends[1]);
                held = malloc(100000);
                close(done[0]);
                close(done[1]);
                _exit(read(ends[0], &byte, 1) != 0);
            }
            close(done[1]);
            if (read(done[0], &byte, 1))
                _exit(3);
            close(done[0]);
        }
    } else if (!strcmp(name, "exec")) {
        /* With what is left to do. */
        rest_of_it[-2] = all[0], rest_of_it[-1] = all[1];
        execv("/proc/self/exe", rest_of_it - 2);
    } else if (!strcmp(name, "kill"))
        kill(getpid(), SIGKILL);
    else
        _exit(4);
}

int main(int count, char **given) {
    all = given;
    file = open(given[1], O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    for (int i = 2; i < count; i++) {
        rest_of_it = given + i + 1;
        perform(strdup(given[i]));
    }
    return 0;
}
"""


def compiled(folder: Path, name: str, source: str, *options: str) -> Path:
    """Compile C."""
    (folder / f"{name}.c").write_text(source)
    command = [interposer._compiler(), "-O0", "-fno-builtin", str(folder / f"{name}.c"), "-o", str(folder / name)]
    done = subprocess.run([*command, "-pthread", *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / name


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("probe"), "probe", PROBE)


@pytest.fixture
def control(tmp_path: Path, probe: Path) -> Control:
    return Control.create(tmp_path / "control", probe)


def plan(nth: int = 1, times: int | None = 1, **others: object) -> FaultPlan:
    given = {"site": Site.HOST_ALLOCATION, "min_bytes": LEAST, **others}
    return FaultPlan(nth=nth, times=times, **given)  # type: ignore[arg-type]


class Running:
    """A probe that waits now and then."""

    def __init__(self, probe: Path, environment: Mapping[str, str], *words: str) -> None:
        self._of = subprocess.Popen(
            [probe, probe.with_name("written"), *words],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.id = self._of.pid

    def until_it_waits(self) -> list[str]:
        """Give what it did before."""
        assert self._of.stdout
        lines = list(iter(lambda: self._of.stdout.readline().strip(), "waits"))  # type: ignore[union-attr]
        assert "" not in lines, f"ended: {lines}"
        return lines

    def go_on(self) -> None:
        assert self._of.stdin
        self._of.stdin.write("\n")
        self._of.stdin.flush()

    def rest(self, ends_with: int = 0) -> list[str]:
        """Let it end; give what it did."""
        said, complaint = self._of.communicate(timeout=100)
        assert (self._of.returncode, complaint) == (ends_with, ""), said
        return said.split("\n")[:-1]


Start = Callable[..., Running]


@pytest.fixture
def start(probe: Path, control: Control) -> Iterator[Start]:
    """Start the probe under the interposer."""
    started: list[Running] = []

    def begin(*words: str) -> Running:
        started.append(Running(probe, control.environment({}), *words))
        return started[-1]

    yield begin
    for each in started:
        if each._of.poll() is None:
            each._of.kill()
        each._of.communicate()


def did(start: Start, *words: str) -> list[str]:
    """Give what became of each request: made or refused."""
    return [line.split()[1] for line in start(*words).rest()]


def armed(control: Control, what: FaultPlan, host: int | None = None) -> None:
    control.prepare(what, host)
    control.begin()


REQUESTS = ["malloc:100000", "malloc:100", "malloc:200000", "malloc:65535", "malloc:65536", "malloc:300000"]


# Which request is refused.


def test_the_nth_request_of_enough_bytes_is_refused_once(start: Start, control: Control) -> None:
    armed(control, plan(3))
    assert did(start, *REQUESTS) == ["made"] * 4 + ["refused", "made"]
    found = control.record()
    assert (found.points_seen, found.faults_fired, found.provenance) == (4, 1, Provenance.INTERPOSED)


def test_so_many_in_a_row_are_refused(start: Start, control: Control) -> None:
    armed(control, plan(2, times=2))
    assert did(start, *REQUESTS) == ["made", "made", "refused", "made", "refused", "made"]
    assert control.record().faults_fired == 2


def test_from_the_nth_on_every_request_of_the_process_is_refused(start: Start, control: Control) -> None:
    armed(control, plan(2, times=None))
    assert did(start, *REQUESTS) == ["made", "made", "refused", "made", "refused", "refused"]
    found = control.record()
    assert (found.points_seen, found.faults_fired) == (4, 3)


def test_only_the_first_process_in_which_it_fires_is_refused_from_there_on(start: Start, control: Control) -> None:
    armed(control, plan(2, times=None))
    words = ["malloc:100000", "fork:malloc:100000", "malloc:100000", "fork:malloc:100000", "malloc:100000"]
    assert did(start, *words) == ["made", "refused", "made", "made", "made"]
    found = control.record()
    assert (found.points_seen, found.faults_fired) == (2, 1), "another process's requests count no more"


def test_a_point_that_is_never_reached_is_not_fired(start: Start, control: Control) -> None:
    armed(control, plan(5))
    assert did(start, *REQUESTS) == ["made"] * 6
    assert control.record() == FaultRecord(4, 0, 0, None)
    assert control.call_site() == []


def test_counts_repeat_and_are_those_since_prepare(start: Start, control: Control) -> None:
    counts = []
    for _ in range(10):
        armed(control, plan(1 << 40))
        did(start, *REQUESTS)
        counts.append(control.record().points_seen)
    assert counts == [4] * 10


def test_counts_survive_a_sigkill(start: Start, control: Control) -> None:
    armed(control, plan(2))
    assert control.fired_process() == 0
    running = start(*REQUESTS[:3], "kill")
    assert [line.split()[1] for line in running.rest(-signal.SIGKILL)] == ["made", "made", "refused"]
    assert control.fired_process() == running.id
    found = control.record()
    assert (found.points_seen, found.faults_fired) == (2, 1) and " < " in found.detail


def test_nothing_is_counted_or_refused_unless_armed(start: Start, control: Control) -> None:
    assert did(start, *REQUESTS) == ["made"] * 6
    control.prepare(plan(1, times=None))
    assert did(start, *REQUESTS) == ["made"] * 6, "prepared is not armed"
    control.begin()
    control.end()
    assert did(start, *REQUESTS) == ["made"] * 6
    assert control.record() == FaultRecord(0, 0, 0, None)


def test_a_plan_disarms_itself_at_its_deadline(start: Start, control: Control) -> None:
    running = start("malloc:100000", "wait", "malloc:100000", "malloc:100000")
    running.until_it_waits()
    armed(control, plan(1, times=None, disarm_after_s=0.05))
    time.sleep(0.06)
    running.go_on()
    assert running.rest() == ["malloc made 77"] * 2
    assert control.record() == FaultRecord(0, 0, 0, None)


def test_it_can_be_armed_while_the_process_runs_and_again(start: Start, control: Control) -> None:
    running = start("malloc:100000", *["wait", "malloc:100000"] * 3)
    running.until_it_waits()
    for _ in range(2):
        armed(control, plan())
        running.go_on()
        assert running.until_it_waits() == [f"malloc refused {errno.ENOMEM}"]
        control.end()
    running.go_on()
    assert running.rest() == ["malloc made 77"]


# Whose requests.


def requests_of(running: Running, name: str = "malloc") -> list[str]:
    running.until_it_waits()
    running.go_on()
    return [line.split()[1] for line in running.rest() if line.startswith(name)]


@pytest.mark.parametrize(
    ("process", "expected"),
    [
        ("host", ["refused", "made"]),
        ("runtime", ["made", "refused"]),
        ("its id", ["refused", "made"]),
        ("4000000", ["made", "made"]),
        (None, ["refused", "refused"]),
    ],
)
def test_a_plan_is_for_a_process(start: Start, control: Control, process: str | None, expected: list[str]) -> None:
    running = start("wait", "malloc:100000", "fork:malloc:100000")
    named = str(running.id) if process == "its id" else process
    armed(control, plan(1, times=2, process=named), running.id)
    assert requests_of(running) == expected


@pytest.mark.parametrize(
    ("thread", "expected"),
    [
        # The main thread, one named worker, another.
        ("main", ["refused", "made", "made"]),
        ("!main", ["made", "refused", "refused"]),
        ("worker", ["made", "refused", "made"]),
        ("!worker", ["refused", "made", "refused"]),
        ("a-name-that-is-cut", ["made", "made", "refused"]),
        (None, ["refused", "refused", "refused"]),
    ],
)
def test_a_plan_is_for_a_thread(start: Start, control: Control, thread: str | None, expected: list[str]) -> None:
    armed(control, plan(1, times=3, thread=thread))
    threads = [f"thread:{name}/malloc:100000" for name in ("worker", "a-name-that-is")]
    if thread == "a-name-that-is-cut":
        # As the kernel has it: fifteen bytes.
        threads[1] = "thread:a-name-that-is-/malloc:100000"
    assert did(start, "malloc:100000", *threads) == expected
    assert control.record().points_seen == expected.count("refused"), "only what is meant is a point"


def test_the_only_thread_of_a_fork_is_its_main_thread(start: Start, control: Control) -> None:
    armed(control, plan(1, times=4, thread="main"))
    assert did(start, "fork:malloc:100000", "thread:it/fork:malloc:100000") == ["refused"] * 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"site": Site.HOST_MEMORY},
            "does not reach host_memory: expected one of device_allocation, device_launch, host",
        ),
        ({"process": "worker"}, "process is 'worker': expected"),
        ({"process": "0"}, "process is '0': expected"),
        ({"process": str(1 << 40)}, f"process is '{1 << 40}': expected"),
        ({"process": "host"}, r"process is 'host': expected .*\(with a host\)"),
        ({"thread": "!"}, "thread is '!': expected"),
        ({"input_above": 0.5}, "input_above is 0.5: expected None"),
    ],
)
def test_what_it_cannot_carry_out_is_refused(control: Control, given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        control.prepare(plan(**given))  # type: ignore[arg-type]


# As the C library does it.

CALLS = [
    *("malloc:0", "malloc:100000", f"malloc:{TOO_MUCH}"),
    *("calloc:10:10000", "calloc:0:8", f"calloc:{TOO_MUCH}:16", f"calloc:{TOO_MUCH}:1"),
    *("realloc:100000:200000", "realloc:200000:100000", "realloc:100000:0", f"realloc:100000:{TOO_MUCH}"),
    *("realloc_null:0", "realloc_null:100000"),
    *("memalign:64:100000", "memalign:4096:100000", "memalign:48:100000", f"memalign:64:{TOO_MUCH}"),
    *("memalign:0:100000", f"memalign:{(1 << 63) + 1}:100000"),
    *("aligned_alloc:64:100000", "aligned_alloc:48:100000", f"aligned_alloc:64:{TOO_MUCH}", "aligned_alloc:64:1"),
    *("aligned_alloc:0:100000", "posix_memalign:64:0", "posix_memalign:64:100000", f"posix_memalign:64:{TOO_MUCH}"),
    *("posix_memalign:48:100000", "posix_memalign:4:100000", "posix_memalign:0:100000"),
    *("mmap:100000:0", "mmap:0:0", f"mmap:{TOO_MUCH}:0", "mmap:100000:1"),
    *("mmap64:100000:0", "mmap64:0:0", "mmap64:100000:1"),
    *("mremap:8192:16384", "mremap:16384:8192", "mremap:8192:0", f"mremap:8192:{TOO_MUCH}", "mremap_to"),
    *("strdup", "write", "pwrite", "pwrite64", "write_badly", "fsync", "fdatasync", "fsync_badly"),
]


@pytest.mark.parametrize("state", ["not armed", "armed, and not reached"])
def test_what_is_not_refused_is_the_c_librarys_to_the_errno(
    probe: Path, start: Start, control: Control, state: str
) -> None:
    if state != "not armed":
        armed(control, plan(1 << 40, min_bytes=1))
    plain = Running(probe, {}, *CALLS).rest()
    assert len(plain) == len(CALLS)
    assert start(*CALLS).rest() == plain


@pytest.mark.parametrize(
    ("words", "like"),
    [
        ("malloc:100000", f"malloc:{TOO_MUCH}"),
        ("calloc:10:10000", f"calloc:{TOO_MUCH}:1"),
        ("realloc:9000:100000", f"realloc:9000:{TOO_MUCH}"),
        ("realloc_null:100000", f"realloc_null:{TOO_MUCH}"),
        ("memalign:64:100000", f"memalign:64:{TOO_MUCH}"),
        ("aligned_alloc:64:100000", f"aligned_alloc:64:{TOO_MUCH}"),
        ("posix_memalign:64:100000", f"posix_memalign:64:{TOO_MUCH}"),
        ("mmap:100000:0", f"mmap:{TOO_MUCH}:0"),
        ("mmap64:100000:0", f"mmap64:{TOO_MUCH}:0"),
        # More than any address is an error of another kind.
        ("mremap:8192:100000", f"mremap:8192:{1 << 46}"),
    ],
)
def test_what_is_refused_looks_like_what_was_too_much(
    probe: Path, start: Start, control: Control, words: str, like: str
) -> None:
    armed(control, plan())
    assert start(words).rest() == Running(probe, {}, like).rest()
    assert control.record().faults_fired == 1


@pytest.mark.parametrize(
    "words", [f"calloc:{TOO_MUCH}:16", "realloc:9000:0", "posix_memalign:48:100000", "mremap:100000:70000"]
)
def test_what_asks_for_nothing_or_for_nonsense_is_no_point(start: Start, control: Control, words: str) -> None:
    # Making the larger mapping, or the block, that is then made less is one.
    armed(control, plan(2 if words.startswith("mremap:") else 1, times=None))
    start(words).rest()
    assert control.record().faults_fired == 0


def test_what_the_c_library_asks_for_itself_is_refused_too(start: Start, control: Control) -> None:
    armed(control, plan())
    assert did(start, "strdup") == ["refused"]


def test_memory_of_a_program_with_an_allocator_of_its_own_goes_back_to_where_it_came_from(
    control: Control, tmp_path: Path
) -> None:
    # As jemalloc and others are linked: the first malloc in the search order is now ours, and so has free to be.
    own = r"""
    #include <stdlib.h>
    #include <unistd.h>
    static char memory[1 << 20];
    static size_t used;
    void *malloc(size_t bytes) { used += (bytes + 31) & ~15ul; return memory + used - ((bytes + 15) & ~15ul); }
    void *calloc(size_t count, size_t bytes) { return malloc(count * bytes); }
    void *realloc(void *old, size_t bytes) { (void)old; return malloc(bytes); }
    void free(void *old) { if (old && ((char *)old < memory || (char *)old > memory + sizeof memory)) _exit(9); }
    int linked;
    """
    uses = "#include <stdlib.h>\nextern int linked;\nint main(void) { free(malloc(100)); return linked; }"
    compiled(tmp_path, "libown.so", own, "-shared", "-fPIC")
    program = compiled(tmp_path, "uses", uses, f"-L{tmp_path}", "-l:libown.so", f"-Wl,-rpath,{tmp_path}")
    assert subprocess.run([program], env={}, check=False).returncode == 0
    anyone = Control.create(tmp_path / "anyone", None)
    assert subprocess.run([program], env=anyone.environment({}), check=False).returncode == 0


# Which processes.


def test_a_fork_is_a_process_of_its_own(start: Start, control: Control) -> None:
    running = start("write", "fork:wait")
    running.until_it_waits()
    child = max(control.processes())
    assert len(control.processes()) == 2 and running.id in control.processes()
    assert control.durability(running.id).main_wrote == 1
    assert control.durability(child) == Durability(0, 0, 0), "a fork begins at nothing"
    running.go_on()
    running.rest()


def test_a_process_that_becomes_another_program_begins_at_nothing(start: Start, control: Control) -> None:
    running = start("write", "fsync", "exec", "wait")
    running.until_it_waits()
    assert control.processes() == [running.id]
    assert control.durability(running.id) == Durability(0, 0, 0)
    running.go_on()
    running.rest()


def test_places_of_processes_that_are_gone_are_taken_again(start: Start, control: Control) -> None:
    for _ in range(interposer._PROCESSES // 32 + 1):
        start(*["fork:malloc:1"] * 33).rest()
    running = start("write", "wait")
    running.until_it_waits()
    assert running.id in control.processes() and len(control.processes()) <= 34
    assert control.durability(running.id).main_wrote == 1
    running.go_on()
    running.rest()


def test_the_table_of_processes_can_be_full(start: Start, control: Control) -> None:
    armed(control, plan(1 << 40))
    running = start(f"crowd:{interposer._PROCESSES + 5}", "wait")
    running.until_it_waits()
    assert len(control.processes()) == interposer._PROCESSES
    assert control.record().points_seen == interposer._PROCESSES + 5, "the plan is for those without a place too"
    running.go_on()
    running.rest()
    # Their places are free again.
    later = start("write", "wait")
    later.until_it_waits()
    assert control.durability(later.id).main_wrote == 1
    later.go_on()
    later.rest()


def test_a_process_without_a_place_has_no_counts(control: Control) -> None:
    with pytest.raises(BackendError, match=f"process {os.getpid()} is not under the interposer"):
        control.durability(os.getpid())


def in_python(program: str, environment: Mapping[str, str], timeout_s: float = 100) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        env={**environment, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stdout[-500:]} {done.stderr[-2000:]}"
    return done.stdout.strip()


SAY_PRELOAD = 'echo "${LD_PRELOAD-unset} ${PLIMSOLL_INTERPOSER-unset}"'


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_a_child_of_another_program_is_left_alone_and_knows_nothing_of_it(tmp_path: Path, shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"not run: there is no {shell} here")
    control = Control.create(tmp_path / "control")
    program = f"""
    import subprocess
    print(subprocess.run({[shell, "-c", SAY_PRELOAD]}, stdout=subprocess.PIPE, text=True).stdout)
    """
    armed(control, plan(1 << 40))
    assert in_python(program, {**os.environ, **control.environment({})}) == "unset unset"
    # One process, and that was Python.
    assert len(control.processes()) == 1


def test_what_else_is_preloaded_is_kept(tmp_path: Path) -> None:
    control = Control.create(tmp_path / "control")
    others = [str(compiled(tmp_path, f"{name}.so", f"int {name};", "-shared", "-fPIC")) for name in ("one", "two")]
    given = control.environment({})
    for separator in (":", " "):
        preload = separator.join([others[0], given["LD_PRELOAD"], others[1]])
        done = subprocess.run(
            ["sh", "-c", SAY_PRELOAD],
            env={**given, "LD_PRELOAD": preload, "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == f"{':'.join(others)} unset"


def test_a_child_of_the_same_program_is_under_it(tmp_path: Path) -> None:
    control = Control.create(tmp_path / "control")
    inner = "from backends.faults.interposer import Control; print(Control.attached() is not None)"
    program = f"""
    import subprocess, sys
    from backends.faults.interposer import Control
    print(Control.attached() is not None)
    print(subprocess.run([sys.executable, "-c", {inner!r}], stdout=subprocess.PIPE, text=True).stdout)
    """
    assert in_python(program, {**os.environ, **control.environment({})}).split() == ["True", "True"]


@pytest.mark.parametrize("content", [b"", b"no control file", bytes(1 << 16), b"PLIM" + bytes(1 << 16)])
def test_a_file_that_is_none_is_refused_and_a_process_under_it_runs_as_ever(
    tmp_path: Path, probe: Path, content: bytes
) -> None:
    path = tmp_path / "control"
    path.write_bytes(content)
    with pytest.raises(BackendError, match=r"control is no control file"):
        Control(path)
    environment = {"LD_PRELOAD": str(LIBRARY), interposer.CONTROL: str(path)}
    assert Running(probe, environment, *CALLS).rest() == Running(probe, {}, *CALLS).rest()
    assert path.read_bytes() == content


def test_a_file_that_is_not_there_changes_nothing_either(tmp_path: Path, probe: Path) -> None:
    path = tmp_path / "control"
    with pytest.raises(BackendError, match=r"control is no control file .*No such file"):
        Control(path)
    environment = {"LD_PRELOAD": str(LIBRARY), interposer.CONTROL: str(path)}
    assert Running(probe, environment, *CALLS).rest() == Running(probe, {}, *CALLS).rest()


def test_a_control_file_is_private_and_not_made_over_another(tmp_path: Path) -> None:
    path = tmp_path / "control"
    Control.create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        Control.create(path)


def test_both_sides_have_the_same_layout(tmp_path: Path) -> None:
    names = [
        *("control.magic", "control.version", "control.wake", "control.deadline_ns", "control.sites"),
        *("control.min_bytes", "control.nth", "control.times", "control.process", "control.thread"),
        *("control.thread_name", "control.executable_device", "control.executable_inode", "control.seen"),
        *("control.fired", "control.bound", "control.report", "control.fired_process", "control.fired_thread"),
        *("control.fired_site", "control.fired_bytes", "control.frames", "control.frame", "control.processes"),
        *("process.id", "process.reported", "process.heap_bytes", "process.sequence", "process.syncs"),
        *("process.main_wrote", "process.main_synced"),
    ]
    prints = (
        "".join(f'printf("{name} %zu\\n", offsetof(struct {name.replace(".", ", ")}));' for name in names)
        + 'printf("control %zu\\nprocess %zu\\n", sizeof(struct control), sizeof(struct process));'
        + 'printf("frame %d\\n", FRAME_BYTES);'
    )
    source = f'#include "{interposer.SOURCE}"\n#include <stdio.h>\nint main(void) {{ {prints} return 0; }}'
    program = compiled(tmp_path, "layout", source, "-ldl")
    found = dict(line.split() for line in subprocess.check_output([program], text=True).splitlines())
    at = {name: int(where) for name, where in found.items()}

    def offsets(layout: struct.Struct, start: int) -> list[int]:
        codes = re.findall(r"\d*[a-zA-Z]", layout.format.lstrip("<"))
        fields = [code for each in codes for code in ([each] if each[-1] in "sx" else each[-1] * int(each[:-1] or 1))]
        return [start + struct.calcsize("<" + "".join(fields[:i])) for i, code in enumerate(fields) if code[-1] != "x"]

    def of(kind: str, *fields: str) -> list[int]:
        return [at[f"{kind}.{field}"] for field in fields]

    plan_fields = ("deadline_ns", "sites", "min_bytes", "nth", "times", "process", "thread", "thread_name")
    fired_fields = ("fired_process", "fired_thread", "fired_site", "fired_bytes", "frames")
    process_fields = ("id", "reported", "heap_bytes", "sequence", "syncs", "main_wrote", "main_synced")
    assert offsets(interposer._HEAD, 0) == of("control", "magic", "version")
    assert offsets(interposer._PLAN, interposer._PLAN_AT) == of("control", *plan_fields)
    executable = of("control", "executable_device", "executable_inode")
    assert offsets(interposer._EXECUTABLE, interposer._EXECUTABLE_AT) == executable
    assert offsets(interposer._COUNTS, interposer._COUNTS_AT) == of("control", "seen", "fired")
    assert offsets(interposer._FIRED, interposer._FIRED_AT) == of("control", *fired_fields)
    assert offsets(interposer._PROCESS, 0) == of("process", *process_fields)
    single = [interposer._WAKE_AT, interposer._BOUND_AT, interposer._REPORT_AT, interposer._FRAMES_AT]
    assert single == of("control", "wake", "bound", "report", "frame")
    assert at["control.processes"] == interposer._PROCESSES_AT
    sizes = (at["control"], at["process"], at["frame"])
    assert sizes == (interposer._SIZE, interposer._PROCESS.size, interposer._FRAME_BYTES)


# What is told.


def test_the_call_site_names_the_library_and_the_function(tmp_path: Path) -> None:
    asks = "#include <stdlib.h>\nvoid *asks_for_it(size_t bytes) { return malloc(bytes); }"
    uses = "#include <stdlib.h>\nvoid *asks_for_it(size_t);\nint main(void) { return asks_for_it(123456) != NULL; }"
    compiled(tmp_path, "libasks.so", asks, "-shared", "-fPIC")
    program = compiled(tmp_path, "uses", uses, f"-L{tmp_path}", "-l:libasks.so", f"-Wl,-rpath,{tmp_path}")
    control = Control.create(tmp_path / "control", program)
    armed(control, plan())
    running = subprocess.Popen([program], env=control.environment({}))
    assert running.wait(100) == 0
    innermost, caller, *_ = control.call_site()
    assert re.fullmatch(r"libasks\.so\+0x[0-9a-f]+ asks_for_it", innermost)
    assert re.fullmatch(r"uses\+0x[0-9a-f]+.*", caller)
    detail = control.record().detail
    assert detail.startswith(f"123456 bytes for process {running.pid}, main thread: {innermost} < {caller}")


def test_the_heap_is_reported_when_it_is_asked_for(start: Start, control: Control) -> None:
    running = start(
        "malloc:1", "wait", "malloc:1", "wait", "hold:100:1000", "hold:1:1000000", "wait", "malloc:1", "wait"
    )
    assert control.heaps_bytes() == {}
    heaps = []
    for _ in range(2):
        running.until_it_waits()
        control.ask_for_heaps()
        assert control.heaps_bytes() == {}, "it did not ask for memory yet"
        running.go_on()
        running.until_it_waits()
        heaps.append(control.heaps_bytes()[running.id])
        control.end()
        running.go_on()
    running.rest()
    assert abs(heaps[1] - heaps[0] - 1_100_000) < 8192, heaps


def test_asking_for_heaps_leaves_what_is_armed_armed(start: Start, control: Control) -> None:
    running = start("wait", "malloc:100", "malloc:100000", "wait")
    running.until_it_waits()
    armed(control, plan())
    control.ask_for_heaps()
    running.go_on()
    assert [line.split()[1] for line in running.until_it_waits()] == ["made", "refused"]
    assert set(control.heaps_bytes()) == {running.id}
    running.go_on()
    running.rest()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("write", "fdatasync"), Durability(1, 1, 2)),
        (("pwrite", "fsync"), Durability(1, 1, 2)),
        (("write", "fdatasync", "pwrite64"), Durability(1, 3, 2)),
        (("write", "thread:it/write", "fsync", "thread:it/fsync"), Durability(2, 1, 3)),
        (("thread:it/write", "thread:it/fsync"), Durability(1, 0, 0)),
        (("write_badly", "fsync_badly"), Durability(0, 0, 0)),
        # Nothing makes it durable.
        (("write", "fsync", "write_to_pipe"), Durability(1, 1, 2)),
    ],
)
def test_writes_and_syncs_are_told_in_order(
    start: Start, control: Control, words: tuple[str, ...], expected: Durability
) -> None:
    running = start(*words, "wait")
    running.until_it_waits()
    assert control.durability(running.id) == expected
    running.go_on()
    running.rest()


@pytest.mark.parametrize(("synchronous", "durable"), [("full", True), ("off", False)])
def test_it_tells_whether_sqlite_made_a_transaction_durable(tmp_path: Path, synchronous: str, durable: bool) -> None:
    control = Control.create(tmp_path / "control")
    program = f"""
    import os, sqlite3
    from backends.faults.interposer import Control
    database = sqlite3.connect({str(tmp_path / "database")!r})
    database.execute("pragma journal_mode = wal")
    database.execute("pragma synchronous = {synchronous}")
    database.execute("create table blocks (samples blob)")
    for _ in range(10):
        with database:
            database.execute("insert into blocks values (zeroblob(1000))")
        found = Control.attached().durability(os.getpid())
        print(found.main_wrote > 0, found.main_synced > found.main_wrote)
    """
    told = in_python(program, {**os.environ, **control.environment({})})
    assert told.split("\n") == [f"True {durable}"] * 10


# Compiling it, and whom it is put under.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "plimsoll"


def test_it_is_compiled_once_into_a_folder_of_the_users_alone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(parents=True, mode=0o755)
    made = interposer.library()
    assert made.parent == cache and list(cache.iterdir()) == [made]
    assert (stat.S_IMODE(cache.stat().st_mode), stat.S_IMODE(made.stat().st_mode)) == (0o700, 0o500)
    monkeypatch.setattr(interposer, "_compile", lambda *_: pytest.fail("compiled anew"))
    assert interposer.library() == made


def test_another_c_library_has_one_of_its_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = interposer.library()
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.28"))
    assert interposer.library() != made
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with pytest.raises(InterposerUnavailable, match="on Linux x86-64 with glibc only, and this is "):
        interposer.library()


def test_one_that_others_could_have_written_is_refused(cache: Path) -> None:
    interposer.library().chmod(0o722)
    with pytest.raises(InterposerUnavailable, match="can be written by others: remove it"):
        interposer.library()


@pytest.mark.parametrize("kind", ["file", "link", "other user's"])
def test_a_cache_folder_that_is_not_ours_is_refused(cache: Path, tmp_path: Path, kind: str) -> None:
    cache.parent.mkdir()
    if kind == "file":
        cache.write_text("")
    elif kind == "link":
        cache.symlink_to(tmp_path)
    elif os.geteuid() != 0:
        pytest.skip("not run: only root can make a folder another user's")
    else:
        cache.mkdir()
        os.chown(cache, 12345, 12345)
    with pytest.raises(InterposerUnavailable, match=r"cannot be kept in .*XDG_CACHE_HOME"):
        interposer.library()


def test_a_cache_that_cannot_be_written_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/self")
    with pytest.raises(InterposerUnavailable, match=r"cannot be kept in /proc/self/plimsoll .*XDG_CACHE_HOME"):
        interposer.library()


def test_a_folder_that_cannot_be_named_in_the_variable_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # LD_PRELOAD is split at spaces and colons; nothing would be loaded, and the process would run as if nothing were.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a cache"))
    with pytest.raises(InterposerUnavailable, match=r"space or a colon.*XDG_CACHE_HOME"):
        interposer.library()


def test_the_path_holds_in_another_folder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert interposer.library().is_absolute()


def test_without_a_compiler_it_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/nonexistent")
    with pytest.raises(InterposerUnavailable, match=r"no C compiler \(/nonexistent\).*install one, or name it in CC"):
        interposer.library()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(InterposerUnavailable, match=r"no C compiler \(cc, gcc, clang\)"):
        interposer.library()


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = tmp_path / "fails"
    fails.write_text("#!/bin/sh\necho no such target >&2\nexit 1\n")
    fails.chmod(0o755)
    monkeypatch.setenv("CC", str(fails))
    with pytest.raises(InterposerUnavailable, match=r"fails does not compile interposer\.c: no such target"):
        interposer.library()
    assert not list(cache.iterdir())


def test_several_may_compile_at_once(cache: Path) -> None:
    program = "from backends.faults import interposer; print(interposer.library())"
    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(lambda _: in_python(program, os.environ), range(4)))
    assert made == {str(each) for each in cache.iterdir()} and len(made) == 1
    ctypes.CDLL(made.pop())


def test_it_compiles_without_a_warning(tmp_path: Path) -> None:
    options = ("-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-std=gnu11", "-O2", "-ldl")
    compiled(tmp_path, "strict.so", interposer.SOURCE.read_text(), *options)


def test_another_preloaded_library_is_refused(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InterposerUnavailable, match=r"LD_PRELOAD is /lib/libfast\.so already.*unset it"):
        control.environment({"LD_PRELOAD": "/lib/libfast.so"})
    monkeypatch.setenv("LD_PRELOAD", "/lib/libfast.so")
    assert "already" in str(interposer.refusal())
    monkeypatch.delenv("LD_PRELOAD")
    assert interposer.refusal() is None
    assert control.environment({"LD_PRELOAD": "", "HOME": "/home"}) == {
        "HOME": "/home",
        "LD_PRELOAD": str(LIBRARY),
        interposer.CONTROL: str(control.path),
    }


def test_a_process_that_is_not_under_it_cannot_be_armed(bounded: Cpu) -> None:
    assert Control.attached() is None
    with pytest.raises(BackendError, match=r"host_allocation needs a process that was started under the interposer"):
        bounded.arm(FaultPlan(Site.HOST_ALLOCATION))


def test_a_fault_is_armed_and_disarmed_from_inside(tmp_path: Path) -> None:
    control = Control.create(tmp_path / "control")
    program = """
    import ctypes
    from backends.contract import FaultPlan, Site
    from backends.faults import interposer

    malloc = ctypes.CDLL(None).malloc
    malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    fault = interposer.arm(FaultPlan(Site.HOST_ALLOCATION, nth=2, min_bytes=1 << 30))
    given = [malloc(1 << 30) is not None for _ in range(3)]
    fault.disarm()
    after = fault.record()
    again = interposer.arm(FaultPlan(Site.HOST_ALLOCATION, min_bytes=1 << 30))
    given.append(malloc(1 << 30) is not None)
    again.disarm()
    print(given, after.points_seen, after.faults_fired, fault.record() == after, again.record().points_seen)
    """
    told = in_python(program, {**os.environ, **control.environment({})})
    assert told == "[True, False, True, False] 3 1 True 1"


def test_what_a_thread_asks_for_uncounted_is_no_point_and_that_of_others_is(tmp_path: Path) -> None:
    control = Control.create(tmp_path / "control")
    program = """
    import ctypes, threading
    from backends.contract import FaultPlan, Site
    from backends.faults import interposer

    malloc = ctypes.CDLL(None).malloc
    malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    ask = lambda: given.append(malloc(1 << 30) is not None)
    given = []
    fault = interposer.arm(FaultPlan(Site.HOST_ALLOCATION, min_bytes=1 << 30))
    with interposer.uncounted():
        ask()
        with interposer.uncounted():
            ask()
        ask()
        other = threading.Thread(target=ask)
        other.start()
        other.join()
    ask()
    fault.disarm()
    print(given, fault.record().points_seen)
    """
    told = in_python(program, {**os.environ, **control.environment({})})
    assert told == "[True, True, True, False, True] 2"


def test_outside_of_it_uncounted_does_nothing() -> None:
    with interposer.uncounted():
        assert Control.attached() is None


# A real runtime.


def test_onnx_runtime_survives_a_refused_allocation(tmp_path: Path) -> None:
    control = Control.create(tmp_path / "control")
    program = """
    import json
    import numpy as np
    from backends.contract import FaultPlan, Site
    from backends.cpu import Cpu
    from backends.errors import classify
    from backends.faults import limits
    from backends.model import DEFAULT_MODEL, ModelSpec

    limits.declare_expendable()
    device = Cpu()
    model = device.load(DEFAULT_MODEL)
    features = np.random.default_rng(1).standard_normal((4, ModelSpec().window_frames, 80)).astype(np.float32)
    expected = model.run(features)
    seen = []
    for _ in range(10):
        fault = device.arm(FaultPlan(Site.HOST_ALLOCATION, nth=1 << 40, min_bytes=64))
        model.run(features)
        fault.disarm()
        seen.append(fault.record().points_seen)
    raised, absorbed, wrong = [], 0, []
    for nth in range(1, 400):
        fault = device.arm(FaultPlan(Site.HOST_ALLOCATION, nth=nth, min_bytes=4096))
        try:
            given = model.run(features)
        except Exception as error:
            raised.append((classify(error).is_oom, f"{type(error).__name__}: {error}"[:200]))
        else:
            absorbed += 1
            if fault.record().faults_fired and not np.array_equal(given, expected):
                wrong.append(f"{nth}: another result")
        finally:
            fault.disarm()
        if not fault.record().faults_fired:
            break
        if not np.array_equal(model.run(features), expected):
            wrong.append(f"{nth}: another result afterwards")
    print(json.dumps([seen, raised, absorbed - 1, wrong, nth]))
    """
    seen, raised, absorbed, wrong, nth = json.loads(in_python(program, {**os.environ, **control.environment({})}, 120))
    assert not wrong
    assert len(set(seen)) == 1 and seen[0] > nth, f"a run's points do not repeat: {seen}"
    assert len(raised) + absorbed == nth - 1 > 0
    assert raised, "nothing that was refused was noticed"
    assert not [error for is_oom, error in raised if not is_oom]


# NVIDIA's own CUDA runtime: it loads without a driver, and says so when it is asked for anything.

#: The library's calls as its header has them, each with what a program without a kernel of its own can give it.
EXTENSION = r"""
#include <stddef.h>
#include <stdio.h>
#include <string.h>
struct dim3 { unsigned x, y, z; };
extern int cudaMalloc(void **, size_t);
extern int cudaMallocAsync(void **, size_t, void *);
extern int cudaMallocFromPoolAsync(void **, size_t, void *, void *);
extern int cudaMallocHost(void **, size_t);
extern int cudaHostAlloc(void **, size_t, unsigned);
extern int cudaLaunchKernel(const void *, struct dim3, struct dim3, void **, size_t, void *);
extern int cudaLaunchKernelExC(const void *, const void *, void **);
extern int cudaPeekAtLastError(void);
extern int cudaGetLastError(void);
extern const char *cudaGetErrorName(int);

/* What the compiler makes of kernel<<<...>>>: the launch's own answer is lost. */
static void launches(void) {
    struct dim3 one = {1, 1, 1};
    cudaLaunchKernel((const void *)launches, one, one, NULL, 0, NULL);
}

int call(const char *name) {
    void *made;
    char configuration[256] = {0};
    struct dim3 one = {1, 1, 1};
    if (!strcmp(name, "cudaMalloc"))
        return cudaMalloc(&made, 1 << 20);
    if (!strcmp(name, "cudaMallocAsync"))
        return cudaMallocAsync(&made, 1 << 20, NULL);
    if (!strcmp(name, "cudaMallocFromPoolAsync"))
        return cudaMallocFromPoolAsync(&made, 1 << 20, NULL, NULL);
    if (!strcmp(name, "cudaMallocHost"))
        return cudaMallocHost(&made, 1 << 20);
    if (!strcmp(name, "cudaHostAlloc"))
        return cudaHostAlloc(&made, 1 << 20, 0);
    if (!strcmp(name, "cudaLaunchKernel"))
        return cudaLaunchKernel((const void *)call, one, one, NULL, 0, NULL);
    if (!strcmp(name, "cudaLaunchKernelExC"))
        return cudaLaunchKernelExC(configuration, (const void *)call, NULL);
    if (!strcmp(name, "cudaPeekAtLastError"))
        return cudaPeekAtLastError();
    if (!strcmp(name, "cudaGetLastError"))
        return cudaGetLastError();
    if (!strcmp(name, "<<<>>>"))
        launches();
    return 0;
}
"""
CALLS_IT = r"""
#include <stdio.h>
extern int call(const char *);
int main(int count, char **given) {
    for (int i = 1; i < count; i++)
        printf("%d ", call(given[i]));
    return 0;
}
"""
OPENS_IT = r"""
#include <dlfcn.h>
#include <stdio.h>
int main(int count, char **given) {
    void *extension = dlopen(EXTENSION, RTLD_NOW | RTLD_LOCAL);
    int (*call)(const char *) = (int (*)(const char *))dlsym(extension, "call");
    for (int i = 1; i < count; i++)
        printf("%d ", call(given[i]));
    return 0;
}
"""
PYTHON_OPENS_IT = """
import ctypes, sys
call = ctypes.CDLL(sys.argv[1]).call
print(*(call(name.encode()) for name in sys.argv[2:]))
"""
MEMORY = ["cudaMalloc", "cudaMallocAsync", "cudaMallocFromPoolAsync", "cudaMallocHost", "cudaHostAlloc"]
LAUNCHES = ["cudaLaunchKernel", "cudaLaunchKernelExC"]
PEEK, GET = "cudaPeekAtLastError", "cudaGetLastError"
NO_MEMORY, LAUNCH_FAILED = 2, 719


def cuda_runtimes() -> list[Path]:
    """Find NVIDIA's packages."""
    found = importlib.util.find_spec("nvidia")
    folders = [Path(each) for each in (found.submodule_search_locations or [])] if found else []
    return sorted(path for folder in folders for path in folder.glob("*/lib/libcudart.so.*"))


RUNTIMES: list[Any] = cuda_runtimes()
NO_RUNTIME = pytest.mark.skip(reason="not run: none of NVIDIA's packages with the CUDA runtime is installed")


@pytest.fixture(
    scope="module",
    params=RUNTIMES or [pytest.param(None, marks=NO_RUNTIME)],
    ids=lambda path: path.name if path else "libcudart",
)
def runtime(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


@pytest.fixture(scope="module", params=["linked", "opened", "Python"])
def caller(request: pytest.FixtureRequest, runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    """Give the start of a command: a program that is linked to the runtime, or one that opens a library that is."""
    folder = tmp_path_factory.mktemp("cuda")
    links = (str(runtime), f"-Wl,-rpath,{runtime.parent}")
    if request.param == "linked":
        (folder / "extension.c").write_text(EXTENSION)
        return [compiled(folder, "linked", CALLS_IT, str(folder / "extension.c"), *links)]
    extension = compiled(folder, "extension.so", EXTENSION, "-shared", "-fPIC", *links)
    if request.param == "opened":
        return [compiled(folder, "opens", OPENS_IT, f'-DEXTENSION="{extension}"', "-ldl")]
    return [sys.executable, "-c", PYTHON_OPENS_IT, extension]


def codes(caller: list[str | Path], names: list[str], environment: Mapping[str, str]) -> list[int]:
    done = subprocess.run([*caller, *names], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return [int(code) for code in done.stdout.split()]


@pytest.fixture
def anyone(tmp_path: Path) -> Control:
    return Control.create(tmp_path / "anyone", None)


@pytest.mark.parametrize("state", ["not armed", "armed, and not reached"])
def test_calls_go_through_to_the_runtime(caller: list[str | Path], anyone: Control, state: str) -> None:
    if state != "not armed":
        armed(anyone, plan(1 << 40, site=Site.DEVICE_ALLOCATION, min_bytes=1))
    names = [each for name in [*MEMORY, *LAUNCHES, "<<<>>>"] for each in (name, PEEK, GET, GET)]
    theirs = codes(caller, names, {})
    assert codes(caller, names, anyone.environment({})) == theirs
    # Without a driver no call of the runtime's succeeds, and none of its errors is the interposer's.
    assert not {NO_MEMORY, LAUNCH_FAILED} & set(theirs)
    if state != "not armed":
        assert anyone.record().points_seen == len(MEMORY)


@pytest.mark.parametrize("name", MEMORY)
def test_a_request_for_device_memory_is_refused_once(caller: list[str | Path], anyone: Control, name: str) -> None:
    theirs = codes(caller, [name, name, *LAUNCHES], {})
    armed(anyone, plan(1, site=Site.DEVICE_ALLOCATION, min_bytes=1 << 20))
    assert codes(caller, [name, name, *LAUNCHES], anyone.environment({})) == [NO_MEMORY, *theirs[1:]]
    found = anyone.record()
    assert (found.points_seen, found.faults_fired) == (2, 1) and f"{1 << 20} bytes" in found.detail
    armed(anyone, plan(1, site=Site.DEVICE_ALLOCATION, min_bytes=(1 << 20) + 1))
    assert codes(caller, [name], anyone.environment({})) == theirs[:1]


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_is_refused_once(caller: list[str | Path], anyone: Control, name: str) -> None:
    theirs = codes(caller, [name, name, *MEMORY], {})
    armed(anyone, plan(1, site=Site.DEVICE_LAUNCH, min_bytes=1 << 40))
    assert codes(caller, [name, name, *MEMORY], anyone.environment({})) == [LAUNCH_FAILED, *theirs[1:]]
    found = anyone.record()
    assert (found.points_seen, found.faults_fired) == (2, 1)
    assert found.detail.startswith("a launch of process ")


@pytest.mark.parametrize(
    ("name", "site", "code"),
    [
        # Without this a refused kernel<<<...>>> would be one that silently did not run.
        ("<<<>>>", Site.DEVICE_LAUNCH, LAUNCH_FAILED),
        ("cudaMalloc", Site.DEVICE_ALLOCATION, NO_MEMORY),
    ],
)
def test_what_was_refused_is_the_last_error_until_it_is_asked_for(
    caller: list[str | Path], anyone: Control, name: str, site: Site, code: int
) -> None:
    armed(anyone, plan(1, site=site, min_bytes=1))
    found = codes(caller, [PEEK, name, PEEK, PEEK, GET, PEEK, GET], anyone.environment({}))
    assert [*found[2:]] == [code, code, code, found[0], found[0]]


def test_a_runtime_whose_name_has_a_digest_is_found_too(runtime: Path, anyone: Control, tmp_path: Path) -> None:
    # As wheels have it that bring their own. The extension is content with it: its soname is the same.
    own = tmp_path / runtime.name.replace("libcudart", "libcudart-0123abcd", 1)
    shutil.copy(runtime, own)
    extension = compiled(tmp_path, "extension.so", EXTENSION, "-shared", "-fPIC", str(runtime))
    opens = f"import ctypes; ctypes.CDLL({str(own)!r})\n{PYTHON_OPENS_IT}"
    command: list[str | Path] = [sys.executable, "-c", opens, extension]
    assert codes(command, MEMORY, anyone.environment({})) == codes(command, MEMORY, {})
