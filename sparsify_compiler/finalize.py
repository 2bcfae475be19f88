"""finalize(): what was trained with its zeros goes on to kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .compile import compile
from .compiled import CompiledModel
from .errors import InputError
from .packed import Packed
from .recovery import Recovery

Inputs = tuple[Any, ...] | Mapping[str, Any]
PACK = "pack() | lower()"


def finalize(module: nn.Module, example_inputs: Inputs, *, recovery: Recovery | None = None, **options: Any) -> CompiledModel:
    """Compile what attach() or recover() gave, once it is trained: adapters become one with their weights, masked weights are packed and lowered.

        module, hook = sc.attach(model, batches[0], "rigl")
        ...                                                     # the user's own loop, or sc.recover()
        compiled = sc.finalize(module.eval(), batches[0])

    module          in evaluation mode; it is not modified, and may train on
    example_inputs  as in compile(), as are the options (target, dynamic, calibration, quality, ...), but for the recipe: another one, for example
                    "exact_zeros" behind activations that were trained to be sparse, is compile()'s
    recovery        what recover() did, for the report
    """
    if "recipe" in options:
        raise InputError("finalize() packs and lowers, it takes no recipe", where="finalize", hint="sc.compile(module, ..., recipe=...)")
    packed = any(isinstance(part, Packed) for part in module.modules())     # what trains packed has no adapters
    compiled = compile(module, example_inputs, recipe=PACK if packed else f"merge_adapters() | {PACK}", **options)
    if recovery is not None:
        compiled.report().recovery = recovery
        if recovery.early:
            compiled.report().warnings.append(f"training ended {recovery.early} steps before the schedule of its masks: it needs more of them")
    return compiled
