"""Every kernel's numbers, before it is timed: one that says something else than torch, on this machine and of this layer, is not used.

A kernel is tested wherever it is built, but compilers, processors and their emulators have faults that no test here has met.
"""

from __future__ import annotations

from functools import cache

from sparsify_compiler.nearness import distance, near
from sparsify_compiler.passes.lower._layer import Layer, say

NEAR_SELECTED = 0.3     # of rows that select by what a kernel has computed: a neuron that is near the limit may fall on its other side


def check(layer: Layer) -> None:
    """Run every kernel once beside what it has to compute, let go of those whose numbers are others, and say so in the decision."""
    known = cache(lambda expected: expected())  # what several kernels have to compute is computed once
    for name in [name for name, form in layer.forms.items() if form.kernel is not None]:
        off = max(distance(run(), known(expected), slices=not layer.selects) for run, expected in layer.compared(name))
        if not off <= (NEAR_SELECTED if layer.selects else near(layer.weight.dtype)):
            layer.drop(name)
            say(layer.decision, f"{name} is not used: its numbers are {off:.1e} from torch's, by their norm")
