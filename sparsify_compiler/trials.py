"""What is found of a Program that was made to meet a budget: latency, bytes, the quality that it lost, and where that bought nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from .call import call_arguments, instantiate
from .compiled import CompiledModel
from .decision import Decision
from .far_times import compiled_ms
from .held_out import upper
from .measure import interleave
from .packed_storage import leave_in_temporary_file
from .program import Program
from .quality import MAX_LOSS, batch_losses, output_distance
from .site_cost import flops_of, joules_of, row_joules, row_joules_before

if TYPE_CHECKING:
    from .compile_job import Job

COMPILED = "compiled"


def loss_of_quality(job: Job, captured: Program) -> Callable[[nn.Module], float]:
    """How much of the dense model's quality a model has lost, in the unit of the budget.

    By the user's metric; else on the batches that are held out, as much as may be lost on others like them (held_out.upper).
    """
    assert job.budget is not None
    reference = instantiate(captured)
    if job.budget.perplexity_rise is not None:
        return partial(_rise, job, *batch_losses(reference, job.held, job.loss))
    if job.quality is not None:
        baseline = job.measure_quality(reference, captured)
        return lambda model: baseline - job.measure_quality(model, captured)
    return partial(_moved, job, reference)


def _rise(job: Job, dense: Sequence[float], tokens: Sequence[int], model: nn.Module) -> float:
    """By which share the perplexity rises: losses are compared batch by batch."""
    losses, _ = batch_losses(model, job.held, job.loss)
    return math.exp(min(upper([new - old for new, old in zip(losses, dense, strict=True)], tokens), MAX_LOSS)) - 1


def _moved(job: Job, reference: nn.Module, model: nn.Module) -> float:
    """1 - cosine of the outputs to the dense ones, the largest of several."""
    each = [[1 - distance.cosine for distance in output_distance(reference, model, [batch])] for batch in job.held]
    return max(upper(values, [1.0] * len(values)) for values in zip(*each, strict=True))


def resident_bytes(job: Job, lowered: Program) -> float:
    """Bytes of all weights in memory."""
    return float(CompiledModel(lowered, job.target, mapped=leave_in_temporary_file(lowered)).resident_bytes())


@dataclass(frozen=True)
class Counted:
    """A cost that is counted of a lowered Program: of the whole, and of a row as it is and as it was; None where a row does not tell."""

    whole: Callable[[Program], float]
    now: Callable[[Decision], float | None]
    was: Callable[[Decision], float | None]


def counted(job: Job, captured: Program, kind: str) -> Counted:
    """How a budget's "bytes", "flops" or "joules" are counted."""
    return {"bytes": Counted(partial(resident_bytes, job), lambda row: row.bytes, lambda row: row.dense_bytes),
            "flops": Counted(partial(flops_of, captured), lambda row: row.flops, lambda row: row.flops_before),
            "joules": Counted(partial(joules_of, captured), row_joules, row_joules_before)}[kind]


def idle(lowered: Program) -> tuple[str, ...]:
    """Sites that were cut and run dense all the same."""
    return tuple(row.site for row in lowered.decisions.values() if row.format == "dense" and row.structure != "dense")


def dense_latency(job: Job, dense: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of each dense form of the whole model."""
    if job.estimate is not None:
        return dict.fromkeys(dense, job.estimate.ms)
    return {name: timing.median for name, timing in interleave(dense).items()}


def latency(job: Job, lowered: Program, beside: Mapping[str, Callable[[], object]] | None = None) -> dict[str, float]:
    """Milliseconds of the whole model on the example, as "compiled", and of other forms that take turns with it; or predicted."""
    if job.estimate is not None:
        return dict.fromkeys(beside or (), job.estimate.ms) | {COMPILED: compiled_ms(job.estimate, lowered)}
    args, kwargs = call_arguments(job.example)
    compiled = CompiledModel(lowered, job.target)
    timings = interleave({**(beside or {}), COMPILED: lambda: compiled(*args, **kwargs)})
    return {name: timing.median for name, timing in timings.items()}
