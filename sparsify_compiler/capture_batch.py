"""Capture for whoever says nothing of dynamic dimensions: the batch may change where the model allows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .capture import capture
from .errors import CaptureError, InputError
from .program import Program

Inputs = tuple[Any, ...] | Mapping[str, Any]


def captured_for_any_batch(model: nn.Module, example_inputs: Inputs, dynamic: Any) -> Program:
    """With a dynamic batch, unless the model can only be captured whole with a fixed one; to be trained."""
    if dynamic is not None or not (batch := _batch(example_inputs)):
        return capture(model, example_inputs, dynamic, trains=True)
    try:
        program = capture(model, example_inputs, batch, trains=True)
    except (CaptureError, InputError):  # it fixes the batch, which the user has not asked it not to: what else is wrong is wrong again
        return capture(model, example_inputs, trains=True)
    if program.skeleton is not None:
        fixed = capture(model, example_inputs, trains=True)
        program = fixed if fixed.skeleton is None else program
    return program


def _batch(example_inputs: Inputs) -> dict[Any, dict[int, str]]:
    named = example_inputs.items() if isinstance(example_inputs, Mapping) else enumerate(example_inputs)
    sized = {key: value.shape[0] for key, value in named if isinstance(value, Tensor) and value.dim() > 1}
    return {key: {0: "batch"} for key in sized} if len(set(sized.values())) == 1 else {}
