"""Costs of kernels from times that were measured: least squares of the logarithm of predicted over measured, for each kernel by itself.

What a cost is thought to be before anything was timed pulls on it, so that a few times settle what they tell of and nothing else.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify_compiler.cost_models import predict
from sparsify_compiler.cost_models.forms._base import Form, Values
from sparsify_compiler.cost_models.machine import Machine
from sparsify_compiler.cost_models.symbols import TABLE, compiled

# What a cost is thought to be where nothing is known of the kernel, and how strongly: a factor of e away counts as much as an error of that.
PRIOR: Mapping[str, float] = {"calls": 8.0, "displaced": 2.0, "late": 1.0, "product": 1.5, "loaded": 1.0, "packing": 2.0, "taken": 2.0, "put": 2.0,
                              "operation": 1.5, "exponential": 10.0, "moved": 2.0}
ELSE = 3.0
PULL: Mapping[str, float] = {"late": 0.2}
PULL_OTHERS = 0.02
FORMS = Path(__file__).with_name("forms")
BOUNDS = (-12.0, 8.0)       # of the logarithm of a cost


@dataclass(frozen=True)
class Timed:
    """A form of a layer of these sizes took so many seconds.

    between  bytes that were read between two calls
    machine  as it was then, where that is not the one that is fitted
    again    bytes between two calls without those of other forms of the layer, which displace data but little code; None: between
    """

    form: Form
    values: Values
    between: float
    seconds: float
    machine: Machine | None = None
    again: float | None = None


def version() -> str:
    """Of what a cost means: the texts of the formulas."""
    files = sorted(FORMS.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def fit(points: Iterable[Timed], machine: Machine, before: Mapping[str, Mapping[str, float]] | None = None,
        pull: float = PULL_OTHERS) -> dict[str, dict[str, float]]:
    """Costs of every kernel that has a point of its own, none negative, by the names of Form.fitted.

    machine  what it does in a second: the units that costs are multiples of, but for points that have a machine of their own
    before   costs of the same kernels on another machine, which pull instead of PRIOR
    pull     how strongly
    """
    groups: dict[str, list[Timed]] = defaultdict(list)
    for point in points:
        if not point.form.borrowed:
            groups[point.form.fitted].append(point)
    return {key: _fit(group, machine, (before or {}).get(key, {}), pull) for key, group in sorted(groups.items())}


def _fit(group: Sequence[Timed], machine: Machine, before: Mapping[str, float], pull: float) -> dict[str, float]:
    import numpy as np
    from scipy.optimize import least_squares

    names = sorted({symbol.name for point in group for symbol in point.form.formula.seconds.free_symbols} - set(TABLE))
    counts, fixed = _counts(group, names, machine)
    taken = np.array([point.seconds for point in group])
    prior = np.clip(np.log([max(before.get(name, PRIOR.get(name, ELSE)), 1e-9) for name in names]), *BOUNDS)
    pulls = np.array([max(pull, PULL.get(name, pull)) for name in names])

    def errors(logs: Any) -> Any:
        ratio = np.log((counts @ np.exp(logs) + fixed) / taken)
        return np.concatenate([np.arctan(ratio), pulls * (logs - prior)])

    def slopes(logs: Any) -> Any:
        parts = counts @ np.diag(np.exp(logs))
        total = parts.sum(1) + fixed
        return np.vstack([parts / (total * (1 + np.log(total / taken) ** 2))[:, None], np.diag(pulls)])

    starts = [np.clip(prior + shift, *BOUNDS) for shift in (0.0, -1.0, 1.0)]
    best = min((least_squares(errors, start, slopes, bounds=BOUNDS) for start in starts), key=lambda found: float(found.cost))
    return {name: float(f"{math.exp(log):.3g}") for name, log in zip(names, best.x, strict=True)}


def _counts(group: Sequence[Timed], names: Sequence[str], machine: Machine) -> tuple[Any, Any]:
    """Seconds that one of each cost adds to each point [points, names], and what does not depend on costs [points]."""
    import numpy as np

    rows = []
    for point in group:
        given = predict.numbers(point.form, point.values, point.machine or machine, point.between, point.again) | dict.fromkeys(names, 0.0)
        base = compiled(point.form.formula.seconds)
        fixed = base(given)
        rows.append([base(given | {name: 1.0}) - fixed for name in names] + [fixed])
    made = np.array(rows)
    return made[:, :-1], made[:, -1]
