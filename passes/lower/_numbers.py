"""Every kernel's numbers, before it is timed: one that says something else than torch, on this machine and of this layer, is not used.

A kernel is tested wherever it is built, but compilers, processors and their emulators have faults that no test here has met.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsify_compiler.passes.lower._layer import Layer, say

# Distance from the right numbers, by their norm, that rounding alone does not reach.
NEAR, NEAR_HALF = 1e-3, 3e-2
NEAR_SELECTED = 0.3     # of rows that select: one neuron that is near the limit may fall on its other side


def check(layer: Layer) -> None:
    """Run every kernel once beside what it has to compute, let go of those whose numbers are others, and say so in the decision."""
    for name in [name for name, form in layer.forms.items() if form.kernel is not None]:
        off = max(distance(run(), expected()) for run, expected in layer.compared(name))
        if not off <= (NEAR_SELECTED if name in layer.expected else near(layer.weight.dtype)):
            layer.drop(name)
            say(layer.decision, f"{name} is not used: its numbers are {off:.1e} from torch's, by their norm")


def near(dtype: torch.dtype) -> float:
    """The distance that is allowed of numbers of this dtype."""
    return NEAR if dtype is torch.float32 else NEAR_HALF


def distance(found: object, expected: object) -> float:
    """The norm of the difference over that of `expected`, 0 where both are 0; infinite where shapes differ, or one is no number and the other is."""
    assert isinstance(found, Tensor)
    assert isinstance(expected, Tensor)
    if found.shape != expected.shape:
        return math.inf
    numbers = expected.isfinite()
    if not torch.equal(found.isfinite(), numbers):
        return math.inf
    right = torch.where(numbers, expected, 0).double()
    away, size = (float(torch.linalg.vector_norm(x)) for x in (torch.where(numbers, found, 0).double() - right, right))
    return away / size if size else 0.0 if not away else math.inf
