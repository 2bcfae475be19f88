"""The loop of a recovery: steps within a budget of time or number, a learning rate that warms up and falls, and what is kept when it ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import quality
from .errors import InputError
from .progress import Show
from .recover_state import RunFile, parameters_of, weights_of
from .recovery import Point, Recovery
from .training import Hook
from .weight_average import averaged, put_averages, take_in

Inputs = tuple[Any, ...] | Mapping[str, Any]
SAVE_EVERY = 30.0  # seconds: what a killed run loses at most, and half of the minute that is promised


@dataclass(frozen=True)
class Course:
    """How long, and how fast. Arguments of recover()."""

    minutes: float
    steps: int | None
    rate: float
    warmup: float
    clip: float
    decay: float
    accumulate: int
    checks: int
    patience: int
    average: float = 0.0

    def __post_init__(self) -> None:
        for name in ("accumulate", "checks", "patience", "steps"):
            value = getattr(self, name)
            if (name, value) != ("steps", None) and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"{name} is a number of 1 or more, got {value!r}", where="recover")
        for name in ("minutes", "rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is a number above 0, got {getattr(self, name)!r}", where="recover")
        if not 0 <= self.warmup < 1 or self.decay < 0:
            raise InputError("warmup lies in [0, 1), and decay is 0 or more", where="recover")
        if not 0 <= self.average < 1:
            raise InputError(f"average lies in [0, 1), got {self.average!r}", where="recover", hint="0.999, or 0 for none")

    def done(self, step: int, seconds: float, begun: float = 0.0, measuring: float = 0.0) -> float:
        """The share of the way that is behind after so many steps and seconds: 1 at the end.

        begun      seconds when the first step was over: what came before it (captures, kernels that are built) is no part of the way
        measuring  seconds that the last measurement of the metric needs behind it
        """
        end = 60 * self.minutes - min(measuring, 30 * self.minutes)
        by_time = (seconds - begun) / (end - begun) if seconds < end else 1.0
        return by_time if self.steps is None else max(step / self.steps, 1.0 if by_time >= 1 else 0.0)

    def rate_at(self, done: float) -> float:
        """Up in a line over `warmup`, then half a cosine down to 0."""
        if done < self.warmup:
            return self.rate * max(done / self.warmup, 0.01)
        return self.rate * (1 + math.cos(math.pi * (min(done, 1.0) - self.warmup) / (1 - self.warmup))) / 2


@dataclass(frozen=True)
class _Good:
    """Where a run goes back to when a loss is no number."""

    weights: dict[str, Tensor]
    steps: int
    hook: Mapping[str, int]


OPEN = ("the time is up", "the data ran out")  # a run that ended so can go on where there is more


class Loop:
    """Trains a module. `loss` gives the loss of one batch."""

    def __init__(self, module: nn.Module, hook: Hook, loss: Callable[[Inputs], Tensor], course: Course, *, record: Recovery,
                 metric: Callable[[nn.Module], float] | None = None, file: RunFile | None = None, show: Show, started: float) -> None:
        self._module, self._hook, self._loss, self._course = module, hook, loss, course
        self._metric, self._file, self._show = metric, file, show
        self._parameters = parameters_of(module)
        self._optimizer = torch.optim.AdamW(self._parameters, course.rate, weight_decay=course.decay, fused=True)
        self._record, self._best = record, None
        found = file.read(module, self._optimizer, hook) if file is not None else None
        if found is not None:
            self._record, self._best = found
        self._good = _Good(weights_of(module), self._record.steps, hook.state_dict())
        self._begun = started - self._record.seconds
        self._saved = time.monotonic()

    def run(self, batches: Iterable[Inputs]) -> Recovery:
        """Until the budget, the data or the patience is used up. The module is then what was best, or last without a metric."""
        record = self._record
        record.stopped = "" if record.stopped in OPEN else record.stopped
        if self._metric is not None and record.before is None:
            record.before = record.best = self._measured()
            record.best_step, self._best = record.steps, self._good.weights
        record.seconds = self._seconds()
        stream = endless(batches, skip=record.steps * self._course.accumulate)
        while not record.stopped:
            group = [batch for _, batch in zip(range(self._course.accumulate), stream, strict=False)]
            record.stopped = self._end() or ("" if len(group) == self._course.accumulate else OPEN[1]) or self._step(group)
        self._save()
        record.early = max(0, self._hook.ends - self._hook.steps)
        if self._best is not None and record.best_step != record.steps:
            self._module.load_state_dict(self._best)
        elif not record.failed:
            put_averages(self._optimizer)
        self._show("recover", 1000, 1000)
        return record

    def _end(self) -> str:
        """Why there is no further step; empty where there is one."""
        course, record = self._course, self._record
        if course.steps is not None and record.steps >= course.steps:
            return "all steps are done"
        if self._way(self._seconds()) >= 1:
            return OPEN[0]
        if record.misses() >= course.patience:
            return f"no better for {course.patience} measurements"
        return ""

    def _step(self, group: list[Inputs]) -> str:
        """One step of the optimizer. Why it is the last one, or nothing."""
        record, course = self._record, self._course
        rate = course.rate_at(self._way(self._seconds()))
        total = 0.0
        for batch in group:
            loss = (self._loss(batch) + self._hook.loss()) / len(group)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, course.clip))
        if not math.isfinite(total) or not math.isfinite(norm):
            self._optimizer.zero_grad()
            self._module.load_state_dict(self._good.weights)
            self._hook.load_state_dict(self._good.hook)
            what = f"the loss became {total}" if not math.isfinite(total) else f"the gradient became {norm}"
            step, record.steps = record.steps + 1, self._good.steps
            return f"{what} in step {step}: the last good weights, of step {record.steps}, are kept"
        for each in self._optimizer.param_groups:
            each["lr"] = rate
        self._optimizer.step()
        self._hook.step(self._optimizer)
        self._optimizer.zero_grad()
        before = self._way(record.seconds)  # when the last step was over: no measurement falls due unseen while it saves
        record.steps, seconds = record.steps + 1, self._seconds()
        if course.average:
            take_in(self._optimizer, course.average, record.steps)
        record.begun = seconds if record.steps == 1 else record.begun
        after = self._way(seconds)
        check = self._metric is not None and int(after * course.checks) > int(before * course.checks)
        record.add(Point(record.steps, seconds, total, rate, self._check() if check else None))
        record.seconds = self._seconds()
        self._show("recover", min(int(1000 * after), 999), 1000)
        if time.monotonic() - self._saved > SAVE_EVERY:
            self._save()
        return ""

    def _check(self) -> float:
        """Measure the user's metric, and keep the weights where it is the best so far."""
        with averaged(self._optimizer):
            found, record = self._measured(), self._record
            if record.best is None or found > record.best:
                record.best, record.best_step, self._best = found, record.steps, weights_of(self._module)
        return found

    def _measured(self) -> float:
        """The user's metric, and how long it takes at most."""
        assert self._metric is not None
        begun = time.monotonic()
        found = quality.measure(self._metric, self._module)
        self._record.measuring = max(self._record.measuring, time.monotonic() - begun)
        return found

    def _way(self, seconds: float) -> float:
        """The share of the way that is behind at a time: none before the first step, while there is time."""
        record, course = self._record, self._course
        found = course.done(record.steps, seconds, record.begun, record.measuring)
        return found if record.steps or found >= 1 else 0.0

    def _save(self) -> None:
        self._good, self._saved = _Good(weights_of(self._module), self._record.steps, self._hook.state_dict()), time.monotonic()
        if self._file is not None:
            self._file.write(self._good.weights, self._optimizer, self._hook, self._record, self._best)

    def _seconds(self) -> float:
        return time.monotonic() - self._begun


def endless(batches: Iterable[Inputs], skip: int = 0) -> Iterator[Inputs]:
    """The batches over and over again; once where they come from an iterator. The first `skip` are left out."""
    if isinstance(batches, Tensor | str | bytes | Mapping) or not isinstance(batches, Iterable):
        raise InputError(f"batches is an iterable of tuples or dicts, not {type(batches).__name__}", where="recover")
    seen = 0
    while True:
        before = seen
        for batch in batches:
            if not isinstance(batch, tuple | Mapping):
                raise InputError(f"a batch is a tuple or a dict, not {type(batch).__name__}", where="recover", hint="(x,) for one tensor")
            seen += 1
            if seen > skip:
                yield batch
        if seen == before or iter(batches) is batches:
            return
