"""reparameterize(): the exact merges alone, from a model to a plain module that trains on, exports and saves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .call import instantiate, own_tensors
from .capture_batch import captured_for_any_batch
from .compile import as_pipeline
from .errors import SparsifyError
from .passes_api import Context, Pass
from .pipeline import Pipeline

Inputs = tuple[Any, ...] | Mapping[str, Any]


def reparameterize(model: nn.Module, example_inputs: Inputs, *, recipe: str | Path | Pipeline | Pass = "reparam", dynamic: Any = None) -> nn.Module:
    """Merge what can be merged exactly, and where that pays: a module with the model's signature, its outputs the same up to float reassociation.

    model           in evaluation mode: norms are merged with the statistics that they have stored. It is not modified and shares no tensor
                    with the result
    example_inputs  a tuple of positional or a dict of named arguments
    recipe          what to run: by default every exact merge. Only passes that preserve values are allowed
    dynamic         as in compile(): dimensions that may change between calls. By default the first of every tensor (the batch), where the model
                    allows it

    The result holds plain aten operations on parameters: it trains, torch.export and torch.onnx.export take it, and its state_dict() saves
    as safetensors. `sparsify why "collapse()" <model>` says what was not merged, and why.

    Raises InputError, CaptureError and their like, and SparsifyError for a recipe with a pass that changes values.
    """
    pipeline = as_pipeline(recipe)
    inexact = [item.name() for item in pipeline.passes if item.preserves != "values"]
    if inexact:
        raise SparsifyError(f"{inexact[0]} changes values, and reparameterize() is exact", where="recipe", hint="use compile() for it")
    program = captured_for_any_batch(model, example_inputs, dynamic)
    after = pipeline.run(program, Context(example_inputs=example_inputs))
    with torch.no_grad():
        return own_tensors(instantiate(after)).eval()
