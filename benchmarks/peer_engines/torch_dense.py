"""torch: eager, torch.compile with frozen weights, and oneDNN with weights packed ahead; float32 and bfloat16. Blind to zeros."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify_compiler.yardstick import dense_forms

from ._torch import DTYPES, Call, case_of, module


def forms(folder: Path, threads: int) -> Iterator[tuple[Any, ...]]:
    """torch's own forms of the case."""
    torch.set_num_threads(threads)
    for word, dtype in DTYPES.items():
        model, x = module(folder, dtype)
        made, warnings = dense_forms(model, (x,), {}, ("eager", "compile"))
        for name, form in made.items():
            yield f"torch {word} {'compile' if 'compile' in name else 'eager'}", word, Call(lambda _, form=form: form(), x)
        if warnings:
            yield f"torch {word} compile", warnings[0]
        if case_of(folder).is_chain:
            yield f"oneDNN {word} packed", word, Call(_packed(model, x), x)


def _packed(model: nn.Module, x: Tensor) -> Any:
    """The chain with weights that oneDNN packed for this many rows and the ReLU in the same call."""
    ops = torch.ops.mkldnn
    layers = [(ops._reorder_linear_weight(layer.weight.detach(), x.shape[0]), layer.bias.detach())
              for layer in model.children() if isinstance(layer, nn.Linear)]

    def run(x: Tensor) -> Tensor:
        for weight, bias in layers:
            x = ops._linear_pointwise(x, weight, bias, "relu", [], "")
        return x

    return run
