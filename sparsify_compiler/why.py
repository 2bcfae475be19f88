"""Why did a pass not act? What `sparsify why <pass> <model>` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .errors import InputError
from .passes_api import Context, Miss, Pass
from .pipeline import Pipeline
from .program import Program


def why(item: str | Pass, model: nn.Module | Program, example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None) -> list[Miss]:
    """Run one pass (an object, or text such as "fold_batchnorm") on a model or Program and return what it did not do, with the reasons.

    The model is not modified. Raises InputError where a model comes without example inputs, and whatever capture and the pass raise.
    """
    if isinstance(model, nn.Module):
        from .capture import capture

        if example_inputs is None:
            raise InputError("a model is captured with example inputs, and there are none", where="why")
        model = capture(model, example_inputs)
    ctx = Context(example_inputs=example_inputs)
    (Pipeline.parse(item) if isinstance(item, str) else Pipeline((item,))).run(model, ctx)
    return ctx.misses
