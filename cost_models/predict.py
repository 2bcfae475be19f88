"""Seconds of every form of a layer on a machine, from formulas: no kernel is built, and nothing is timed."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify_compiler.cost_models.forms import attention, dense, eager, experts, gather, lanes, planes, slices, streams, strips, tiles
from sparsify_compiler.cost_models.forms._base import Form, Values
from sparsify_compiler.cost_models.machine import Machine
from sparsify_compiler.cost_models.shipped import costs_of
from sparsify_compiler.cost_models.symbols import compiled

DTYPES = ("float32", "bfloat16")
FAMILIES = (dense, tiles, streams, slices, strips, lanes, gather, planes, experts, attention)


@dataclass(frozen=True)
class Seconds:
    """The parts of a time: calling at all, computing, and waiting for the weight."""

    overhead: float
    compute: float
    memory: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.overhead + self.compute + self.memory

    @property
    def bound(self) -> str:
        """The largest part."""
        return max(("overhead", "compute", "memory"), key=lambda part: getattr(self, part))


EAGER_CALLS = 8.0       # of a call of one of torch's own operators, in calls of a kernel


def rough(flops: float, moved: float, machine: Machine) -> Seconds:
    """Of an op of which no more is known than operations, in float32, and bytes: a roofline, on all cores, over what lies as far away."""
    times = machine.times(machine.cores)
    overhead = EAGER_CALLS * times["call"] + times["wake"]
    compute, memory = flops / (machine.cores * machine.numbers["vector"].value), moved / machine.rate(moved, machine.cores)
    return Seconds(overhead, compute, 0.0) if compute > memory else Seconds(overhead, 0.0, memory)


def forms(op: str, values: Values, dtype: str, machine: Machine) -> list[Form]:
    """Every form that an op of these sizes has on the machine, the dense ones first; none for an op that no family computes. GPUs have torch's."""
    if dtype not in DTYPES:
        return []
    families = (eager, planes) if op in eager.FORMULAS else (dense, planes) if machine.arch == "cuda" else FAMILIES
    return [form for family in families for form in family.offer(op, values, dtype, machine)]


def numbers(form: Form, values: Values, machine: Machine, between: float, again: float | None = None) -> dict[str, float]:
    """Every number that the form's formula asks for but what is fitted.

    between  bytes that are read between two calls
    again    bytes between two calls of the same kernel, for other layers of its kind too, after which its code comes back; None: between
    """
    given = {**values, **form.given, "threads": machine.cores}
    if form.formula.work is not None:
        count, alone = form.formula.work
        given["threads"] = 1 if compiled(count)(given) < alone else machine.cores
    threads = int(given["threads"])
    distance = between + compiled(form.formula.weight)(given)
    cold = machine.cold(between if again is None else again)
    return {**given, **machine.times(threads), "arrive": 1 / machine.rate(distance, threads), "cold": cold}


def weight(form: Form, values: Values, machine: Machine) -> float:
    """Bytes of the weight that the form reads."""
    return compiled(form.formula.weight)({**values, **form.given, "threads": machine.cores})


def is_fitted(form: Form, machine: Machine) -> bool:
    """Is it known what a step of this kernel costs, there or on any other processor?"""
    return form.fitted in machine.costs or form.fitted in costs_of(machine.arch, machine.features)


def seconds(form: Form, values: Values, machine: Machine, between: float, again: float | None = None) -> Seconds:
    """What a call takes. Raises KeyError for a size that is missing."""
    costs = machine.costs.get(form.fitted) or costs_of(machine.arch, machine.features)[form.fitted]
    given = {**numbers(form, values, machine, between, again), **costs}
    parts = (form.formula.overhead, form.formula.compute, form.formula.memory)
    return Seconds(*(compiled(part)(given) for part in parts))
