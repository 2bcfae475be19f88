"""Timing: order of calls, medians, and what happens when the machine drifts. No test here depends on how fast anything is."""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sparsify_compiler import measure


class Clock:
    """A clock that forms advance themselves, so that a test decides what everything costs."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measure.time, "perf_counter", clock.perf_counter)
    monkeypatch.setattr(measure.Waits, "_of", lambda self, file: 0.0)  # of the real clock
    return clock


@pytest.mark.parametrize("waits", [[0.0], [1.0, 0.4], [9.9, 9.9]])
def test_what_a_call_waited_for_a_processor_is_not_its_time(clock: Clock, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    """Of threads that wait at one time the longest counts, and no call takes nothing."""
    so_far = [0.0 for _ in waits]

    def form() -> None:
        clock.now += 3.0
        so_far[:] = [before + wait for before, wait in zip(so_far, waits, strict=True)]

    monkeypatch.setattr(measure.Waits, "seconds", lambda self: list(so_far))
    monkeypatch.setattr(measure, "elsewhere", itertools.count(0.0, 1e6).__next__)
    found = measure.interleave({"form": form}, rounds=4, warmup=1)["form"]
    assert found.median == pytest.approx(max(3.0 - max(waits), 0.03) * 1e3)
    monkeypatch.setattr(measure, "elsewhere", lambda: 0.0)  # alone: its threads waited for each other
    assert measure.interleave({"form": form}, rounds=4, warmup=1)["form"].median == pytest.approx(3e3)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system does not tell what its processors do")
def test_what_other_programs_use_is_not_what_this_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    before = measure.elsewhere()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.6: pass"], check=True)
    after = measure.elsewhere()
    assert after - before > 0.4
    own = time.process_time()
    monkeypatch.setattr(measure.time, "process_time", lambda: own + 1e4)
    assert measure.elsewhere() < after - 5e3


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the system does not tell how long threads wait")
def test_a_program_on_the_same_processor_changes_no_time() -> None:
    """Of a call that is longer than a turn of the processor: as long as the thread computes, be the processor shared or not."""
    allowed = os.sched_getaffinity(0)
    busy = f"import os; os.sched_setaffinity(0, {{{min(allowed)}}}); print(1, flush=True)\nwhile True: pass"
    other = subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        os.sched_setaffinity(0, {min(allowed)})
        own: list[float] = []

        def form() -> None:
            begin = time.thread_time()
            while time.thread_time() - begin < 0.03:
                pass
            own.append((time.thread_time() - begin) * 1e3)

        before = measure.waited()
        found = measure.interleave({"form": form}, rounds=7, warmup=0, repeats=1)["form"]
        assert measure.waited() - before > 0.02
        assert found.median == pytest.approx(statistics.median(own), rel=0.3)
    finally:
        os.sched_setaffinity(0, allowed)
        other.kill()
        other.wait()


def test_rivals_take_turns(clock: Clock) -> None:
    calls: list[str] = []
    measure.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=4, warmup=1)
    assert calls[:6] == ["a", "b"] * 3
    assert calls.count("a") == calls.count("b")


def test_work_given_to_a_gpu_is_waited_for(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a form costs there passes when it is waited for, not when it is called."""
    def wait() -> None:
        clock.now += 2e-3

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    assert measure.interleave({"form": lambda: None}, rounds=4, warmup=1)["form"].median == pytest.approx(2.0)


def test_median_and_quartiles(clock: Clock) -> None:
    costs = itertools.cycle([1e-3, 1e-3, 1e-3, 1e-3, 9e-3])

    def form() -> None:
        clock.now += next(costs)

    timing = measure.interleave({"form": form}, rounds=20, warmup=5)["form"]
    assert timing.median == pytest.approx(1.0)
    assert timing.low == pytest.approx(1.0)
    assert timing.high <= 9.0 + 1e-9


def test_repeats_when_the_yardstick_moves(clock: Clock) -> None:
    calls = 0

    def drifting() -> None:
        nonlocal calls
        calls += 1
        clock.now += 1e-3 if calls <= 10 else 3e-3  # settles after the first ten calls

    timing = measure.interleave({"yardstick": drifting}, rounds=20, warmup=0)["yardstick"]
    assert calls == 40, "one run that moved, one that did not"
    assert timing.median == pytest.approx(3.0)


def test_time_is_bounded(clock: Clock) -> None:
    calls = 0

    def slow() -> None:
        nonlocal calls
        calls += 1
        clock.now += 10.0

    measure.interleave({"slow": slow}, rounds=100, warmup=0, at_most=1.0, repeats=1)
    assert calls == 3


def test_layers_take_turns(clock: Clock) -> None:
    calls: list[str] = []
    groups = {layer: {form: (lambda name=f"{layer}{form}": calls.append(name)) for form in forms} for layer, forms in (("a", "xy"), ("b", "xyz"))}
    result = measure.round_robin(groups, rounds=2, warmup=0)
    assert calls == ["ax", "bx", "ay", "by", "bz"] * 2  # no form behind another one of its group, which may read the same weight
    assert set(result) == {"a", "b"}
    assert list(result["a"]) == ["x", "y"]
    assert list(result["b"]) == ["x", "y", "z"]
    assert measure.round_robin({}) == {}


def test_nothing_to_measure() -> None:
    assert measure.interleave({}) == {}
