"""What indexers learn from the calibration batches: options of scorers, and which choice fits which head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.attention_taps import with_taps
from sparsify_compiler.block_grid import Grid
from sparsify_compiler.calibrate_run import call_on
from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.indexer import Indexer
from sparsify_compiler.named import Named
from sparsify_compiler.ops import attend
from sparsify_compiler.ops.attend_blocks import scale_of
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline_text import print_value
from sparsify_compiler.program import Program, Site

KINDS = {"scorer": "block scorer", "order": "token order"}  # options of an indexer that may learn from calibration -> their kind

# (query [B, H, Q, D], key and value [B, G, K, ...], mask, is_causal, scale, what dense attention gives) -> what is summed over all calls
Observe = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float, Tensor], Any]


def observed(program: Program, sites: list[Site], ctx: Context, observe: Observe, by: str) -> dict[str, Any]:
    """Site path -> the sum (of tuples, all of their items) of what `observe` says of every call that the calibration batches make.

    The model computes densely.

    Raises CalibrationError where there is no batch, or none that reaches a site.
    """
    if not ctx.batches:
        raise CalibrationError("needs calibration batches", where=by, hint="give calibration=[...], of the lengths that attention is to be sparse at")
    total: dict[str, Any] = {}

    def watch(path: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
        out = attend.dense(query, key, value, mask, is_causal=causal, scale=scale)
        found = observe(query, key, value, mask, causal, scale_of(query, scale), out)
        total[path] = total[path] + found if path in total else found
        return out

    model = with_taps(program, sites, watch)
    with torch.no_grad():
        for number, batch in enumerate(ctx.batches):
            call_on(model, batch, number)
            ctx.progress("calibrate attention", number + 1, len(ctx.batches))
    missing = [site.path for site in sites if site.path not in total]
    if missing:
        raise CalibrationError("no calibration batch reached this attention", where=missing[0])
    return total


def calibrated(indexer: Indexer, program: Program, sites: list[Site], ctx: Context) -> dict[str, tuple[Indexer, dict[str, Tensor]]]:
    """Site path -> the indexer, with the options of its scorer and order that are learned, and the tensors that they learned.

    Such a function learns if its file has `observe(query, key, key_mask, grid, scale)`, summed over all calls, and
    `learn(sum, **options) -> (options, tensors)`, the tensors those of its LEARNED.
    """
    given = {field: Named.parse(kind, text) for field, kind in KINDS.items() if (text := getattr(indexer, field))}
    learners = {field: named for field, named in given.items() if hasattr(named.module, "observe")}
    found: dict[str, tuple[Indexer, dict[str, Tensor]]] = {site.path: (indexer, {}) for site in sites}
    for field, named in learners.items() if sites else ():
        if named.learned and all(set(named.learned) <= set(tensors) for _, tensors in found.values()):
            continue  # the same tensors as of another function

        def observe(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float, out: Tensor,
                    module: Any = named.module) -> Any:
            key_mask, _, triangle = attend.split_mask(mask, query, key)
            grid = Grid(query.shape[2], key.shape[2], indexer.block_q, indexer.block_k, causal or triangle)
            return module.observe(query, key, key_mask, grid, scale)

        for path, total in observed(program, sites, ctx, observe, named.name).items():
            options, tensors = named.module.learn(total, **named.options)
            changed: dict[str, Any] = {field: _written(named, options)}
            found[path] = replace(found[path][0], **changed), {**found[path][1], **tensors}
    return found


def _written(named: Named, options: dict[str, Any]) -> str:
    return f"{named.name}({', '.join(f'{name}={print_value(value)}' for name, value in options.items())})"
