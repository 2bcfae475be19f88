"""Timing: order of calls, medians, and what happens when the machine drifts. No test here depends on how fast anything is."""

from __future__ import annotations

import itertools

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
    return clock


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
