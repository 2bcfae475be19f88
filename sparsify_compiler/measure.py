"""Timing that can be trusted on a shared machine: rivals interleaved in one process, without what they waited for processors, medians with spread."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

Key = TypeVar("Key")
Result = TypeVar("Result")
LEAST = 0.01  # of a call's time: what it takes at least, whatever it is said to have waited
OTHERS, TICKS = 0.02, 0.04  # processors that other programs use, above which what was waited was for them; seconds that the system's ticks are off


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median over the rounds and the quartiles around it."""

    median: float
    low: float
    high: float


def interleave(forms: Mapping[str, Callable[[], object]], *, rounds: int = 15, warmup: int = 2, at_most: float = 3.0,
               steady: float = 0.1, repeats: int = 3, before: Callable[[Callable[[], object]], object] | None = None) -> dict[str, Timing]:
    """Time every form once a round, in turn, so that drift of the machine meets all of them alike.

    The first form is the yardstick: when its median over the first half of the rounds and over the second half differ by more than `steady`,
    the rounds are run again, `repeats` times at the most, and the last run counts. `at_most` bounds the seconds of one run (three rounds at least).
    `before`, given the form, runs in front of each call and is not timed.
    """
    if not forms:
        return {}
    for _ in range(warmup):
        for form in forms.values():
            form()
    times: dict[str, list[float]] = {}
    for _ in range(repeats):
        times = _rounds(forms, rounds, at_most, before)
        yardstick = next(iter(times.values()))
        half = len(yardstick) // 2
        if not half:
            break
        first, second = statistics.median(yardstick[:half]), statistics.median(yardstick[half:])
        if abs(first - second) <= steady * min(first, second):
            break
    return {name: _timing(values) for name, values in times.items()}


def round_robin(groups: Mapping[str, Mapping[str, Callable[[], object]]], *, rounds: int = 15, warmup: int = 2,
                at_most: float = 20.0) -> dict[str, dict[str, Timing]]:
    """Time the forms of many groups (the layers of a model), each form once a round: the first of every group, then the second of every group.

    A layer then meets the caches as it does in the model, after all the others; a tight loop over one layer would flatter whichever form
    is just small enough to stay in a cache, and one form after the other that which reads the weight that the form before it has just read.
    """
    most = max(map(len, groups.values()), default=0)
    flat = {(group, name): form for place in range(most) for group, forms in groups.items() for name, form in list(forms.items())[place : place + 1]}
    for _ in range(warmup):
        for form in flat.values():
            form()
    times = _rounds(flat, rounds, at_most)
    result: dict[str, dict[str, Timing]] = {group: {} for group in groups}
    for (group, name), values in times.items():
        result[group][name] = _timing(values)
    return result


class Waits:
    """How long threads of this process, those that there are now, have been ready to run while others had the processors."""

    def __init__(self) -> None:
        self._files: list[BinaryIO] = []
        for entry in Path("/proc/self/task").glob("*/schedstat"):
            with suppress(OSError):  # the thread has ended
                self._files.append(entry.open("rb", buffering=0))

    def __enter__(self) -> Waits:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.close()

    def seconds(self) -> list[float]:
        """So far, by thread; nothing where the system does not tell."""
        return [self._of(file) for file in self._files]

    def since(self, before: Sequence[float]) -> float:
        """Of the thread that has waited longest since then, as `seconds` were: threads that wait at one time hold the work up once."""
        return max((now - then for now, then in zip(self.seconds(), before, strict=True)), default=0.0)

    @staticmethod
    def _of(file: BinaryIO) -> float:
        try:
            file.seek(0)
            return int(file.read(128).split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            return 0.0


def waited() -> float:
    """Seconds that threads of this process were ready to run so far while other programs had the processors; 0 where the system does not tell."""
    with Waits() as waits:
        return math.fsum(waits.seconds())


def elsewhere() -> float:
    """Seconds of processors that other programs on this machine have used so far, by the system's ticks; 0 where it does not tell."""
    with suppress(OSError, ValueError, IndexError):
        user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:8])
        return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK") - time.process_time()
    return 0.0


def undisturbed(run: Callable[[], Result], attempts: int = 4, share: float = 0.03) -> tuple[Result, bool]:
    """What `run` measures, and whether other programs let it: it runs up to `attempts` times, again when it waited for more than this share."""
    while True:
        begin, before, attempts = time.monotonic(), waited(), attempts - 1
        result = run()
        quiet = waited() - before <= share * (time.monotonic() - begin)
        if quiet or attempts <= 0:
            return result, quiet


def _rounds(forms: Mapping[Key, Callable[[], object]], rounds: int, at_most: float,
            before: Callable[[Callable[[], object]], object] | None = None) -> dict[Key, list[float]]:
    """Milliseconds of each call, less what other programs kept the process waiting: a call that is longer than their turns would meet several of
    them, a shorter one of the same layer none. What its own threads wait for each other is its time."""
    times: dict[Key, list[float]] = {name: [] for name in forms}
    kept: dict[Key, list[float]] = {name: [] for name in forms}
    clock, begun, settle, others = time.perf_counter, time.perf_counter(), _settling(), elsewhere()
    with Waits() as waits:
        for done in range(rounds):
            if done >= 3 and clock() - begun > at_most:
                break
            for name, form in forms.items():
                if before is not None:
                    before(form)
                known, start = waits.seconds(), clock()
                form()
                if settle is not None:
                    settle()
                times[name].append((clock() - start) * 1e3)
                kept[name].append(waits.since(known) * 1e3)
    if elsewhere() - others <= OTHERS * (clock() - begun) + TICKS:
        return times
    return {name: [max(took - wait, LEAST * took) for took, wait in zip(times[name], kept[name], strict=True)] for name in forms}


def _settling() -> Callable[[], object] | None:
    """What waits for the work that was given to GPUs, where this process uses any."""
    import torch

    return torch.cuda.synchronize if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]


def _timing(values: list[float]) -> Timing:
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return Timing(statistics.median(ordered), ordered[quarter], ordered[-1 - quarter])
