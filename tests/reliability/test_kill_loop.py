"""A command is killed, or asked to stop, before any of its calls to the system (R166, R168).

What stands at the output is absent, old or complete; the next run succeeds. What CI tries is a sample of the calls,
with all that give names; `-m slow` tries every one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_world import ROOT, environment
from fault_jobs import NAMES, Job, Jobs, Snapshot, is_leftover, jobs_fixture, quietly, sample, without_leftovers  # noqa: F401
from faults import At, Double
from tiny import within

every_job = pytest.mark.parametrize("name", NAMES)
sample_and_all = pytest.mark.parametrize("all_calls", [False, pytest.param(True, marks=pytest.mark.slow)])


def forked(double: Double, line: tuple[str, ...]) -> int:
    """Run the program in a forked process; returns its exit code, or minus the signal that ended it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a test runner's threads hold no lock of ours
        process = os.fork()
    if process == 0:
        code = 99
        try:
            signal.alarm(60)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            torch.set_num_threads(1)
            with double.installed():
                code = quietly(line).code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def send(number: int, times: int = 1) -> Callable[[], None]:
    """Something that has this process hit by a signal, the second time while the first unwinds it."""

    def do() -> None:
        try:
            signal.raise_signal(number)
        finally:
            if times == 2:
                signal.raise_signal(number)

    return do


def part(found: Snapshot, name: str) -> Snapshot:
    """An entry of a folder with all that is in it."""
    return {path: what for path, what in found.items() if path == name or path.startswith(f"{name}/")}


def check_killed(job: Job) -> None:
    """Nothing is mixed, nothing of before is lost, and the next run succeeds."""
    found = job.found()
    seen = without_leftovers(found)
    assert job.inputs_untouched()
    for name in {path.partition("/")[0] for path in seen}:
        assert part(seen, name) in (part(job.before, name), part(job.complete, name)), name
    assert seen == job.complete or job.nothing_lost()
    # The last entry that is put in its place says that all is there.
    last = part(job.complete, job.last)
    if part(seen, job.last) == last != part(job.before, job.last):
        assert seen == job.complete
    again = job.run_again() if seen else job.run()
    assert (again.code, without_leftovers(job.found())) == (0, job.complete), again
    assert not any(name.endswith("-lock") for name in job.found())


@every_job
@sample_and_all
def test_killed_at_a_call(jobs: Jobs, name: str, all_calls: bool) -> None:
    """R166. Nothing can be cleaned up then: it is left under a name that says whose it is."""
    job = jobs[name]
    for at in sample(job.log(), len(name), share=8, all_calls=all_calls):
        job.prepare()
        assert forked(Double(before=At(at, send(signal.SIGKILL))), job.line) == -signal.SIGKILL
        check_killed(job)
    job.prepare()
    assert forked(Double(), job.line) == 0


SIGNALLED = [(name, signal.SIGTERM) for name in NAMES] + [("merge", signal.SIGINT), ("merge", signal.SIGHUP)]


@pytest.mark.parametrize(("name", "number"), SIGNALLED, ids=[f"{name}-{number.name}" for name, number in SIGNALLED])
@sample_and_all
def test_a_signal_at_a_call(jobs: Jobs, name: str, number: int, all_calls: bool) -> None:
    """R168. The work is unwound, and nothing at all is left: the signal comes before the call, or just after it."""
    job = jobs[name]
    for at in sample(job.log(), len(name), share=8, all_calls=all_calls):
        for when in ("before", "after") if all_calls else (("before", "after")[at % 2],):
            job.prepare()
            double = Double(**{when: At(at, send(number))})
            assert forked(double, job.line) == 128 + number, (at, when)
            found = job.found()
            assert found in (job.before, job.complete), (at, when, [one for one in found if is_leftover(one)])
            assert job.inputs_untouched()


@pytest.mark.parametrize("name", [name for name in NAMES if "over" in name])
@sample_and_all
def test_two_signals_at_a_call(jobs: Jobs, name: str, all_calls: bool) -> None:
    """R168. Whoever asks twice is obeyed at once, and even then there is no half output."""
    job = jobs[name]
    for at in sample(job.log(), len(name), share=8, all_calls=all_calls):
        job.prepare()
        code = forked(Double(before=At(at, send(signal.SIGTERM, times=2))), job.line)
        assert code in (-signal.SIGTERM, 128 + signal.SIGTERM)  # a thread's two can be one to the interpreter
        check_killed(job)


KILLED = """
import os, signal
from faults import Double
from lora_cli.cli.app import main
from lora_cli.surgery import workers
workers.SHARE = 1
name, process = os.environ["AT"], os.getpid()
def act(operation):
    if operation.name == name:
        os.kill(process, signal.SIGKILL)
with Double(before=act).installed():
    main()
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("call", ["pwrite", "rename"], ids=["at-work", "publishing"])
def test_a_process_is_killed(jobs: Jobs, call: str, threads: int) -> None:
    """R166. As it is for users: a process of its own, and with workers, which end with it."""
    job = jobs["merge"]
    job.prepare()
    line = [sys.executable, "-c", KILLED, *job.line, "-q", "--threads", str(threads)]
    env = environment(AT=call) | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with within(60):
        ended = subprocess.run(line, env=env, capture_output=True, check=False, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (job.place / "out").exists()
    assert [path for path in job.place.iterdir() if is_leftover(path.name)]
    assert job.run().code == 0
    assert without_leftovers(job.found()) == job.complete


def test_leftovers_of_one_file_are_known_by_their_receipt(jobs: Jobs, tmp_path: Path) -> None:
    """An undo file without its tensors is taken for ours only as long as what the same run left lies beside it."""
    job = jobs["merge one file"]
    for at in range(len(job.log()), 0, -1):
        job.prepare()
        assert forked(Double(before=At(at, send(signal.SIGKILL))), job.line) == -signal.SIGKILL
        if set(without_leftovers(job.found())) == {"out.lora_merge.undo"}:
            break
    else:
        pytest.fail("there is no such moment")
    assert job.run().code == 30, "without --force"
    (left,) = [path for path in job.place.iterdir() if path.is_dir()]
    moved = left.rename(tmp_path / "away")
    assert job.run_again().code == 30, "it could be anybody's"
    moved.rename(left)
    assert job.run_again().code == 0
    assert without_leftovers(job.found()) == job.complete
