"""Every sparse kernel of ours that lowering would time for the case, each in a chain of its own with torch's ReLU: for whoever tunes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify_compiler import catalog
from sparsify_compiler.codegen import runtime
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.target import host

from ._torch import DTYPES, Call, case_of, module


def forms(folder: Path, threads: int) -> Iterator[tuple[Any, ...]]:
    """One form for each format that suits the structure and each candidate kernel of it."""
    torch.set_num_threads(threads)
    case = case_of(folder)
    if not case.is_chain or case.structure == "dense":
        yield "ours kernels", "only chains of sparse linear layers"
        return
    for word, dtype in DTYPES.items():
        model, x = module(folder, dtype)
        layers = [layer for layer in model.children() if isinstance(layer, nn.Linear)]
        for name, attributes in Structure.parse(case.structure).formats():
            kind = catalog.get("format", name)
            if any(kind.fits(layer.weight, layer.weight != 0, **attributes) for layer in layers):
                yield f"ours {word} {name}", "the mask does not fit this format"
                continue
            found = [_candidates(kind.encode(layer.weight, layer.weight != 0, **attributes), dtype, x.shape[0]) for layer in layers]
            for choices in zip(*found, strict=True):
                bound = [candidate.bind(layer.bias.detach()) for candidate, layer in zip(choices, layers, strict=True)]
                yield f"ours {word} {choices[0].name}", word, Call(_run(bound), x)


def _candidates(stored: Any, dtype: torch.dtype, rows: int) -> list[Any]:
    return runtime.candidates(f"linear_{stored.name()}", stored.tensors(), stored.attributes(), dtype, (rows,), host())


def _run(kernels: list[Any]) -> Any:
    def run(x: Tensor) -> Tensor:
        for kernel in kernels:
            x = kernel(x).relu_()
        return x

    return run
