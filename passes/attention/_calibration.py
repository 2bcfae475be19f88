"""What indexers learn from the calibration batches: options of scorers, and which choice fits which head."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.attention_taps import with_taps
from sparsify_compiler.calibrate_run import call_on
from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.indexer import Indexer
from sparsify_compiler.named import Named
from sparsify_compiler.ops import attend
from sparsify_compiler.ops.attend_blocks import scale_of
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline_text import print_value
from sparsify_compiler.program import Program, Site

# (query [B, H, Q, D], key and value [B, G, K, ...], mask, is_causal, scale, what dense attention gives) -> what is summed over all calls
Observe = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float, Tensor], Tensor]


def observed(program: Program, sites: list[Site], ctx: Context, observe: Observe, by: str) -> dict[str, Tensor]:
    """Site path -> the sum of what `observe` says of every call that the calibration batches make. The model computes densely.

    Raises CalibrationError where there is no batch, or none that reaches a site.
    """
    if not ctx.batches:
        raise CalibrationError("needs calibration batches", where=by, hint="give calibration=[...], of the lengths that attention is to be sparse at")
    total: dict[str, Tensor] = {}

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


def calibrated(indexer: Indexer, program: Program, sites: list[Site], ctx: Context) -> dict[str, Indexer]:
    """Site path -> the indexer, with the options of its scorer that are learned.

    A scorer learns if its file has `observe(query, key, key_mask) -> Tensor`, summed over all calls, and `learn(sum, **options) -> options`.
    """
    scorer = Named.parse("block scorer", indexer.scorer) if indexer.scorer else None
    module: Any = None if scorer is None else sys.modules[scorer.function.__module__]
    if scorer is None or not hasattr(module, "observe") or not sites:
        return {site.path: indexer for site in sites}

    def observe(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float, out: Tensor) -> Tensor:
        found: Tensor = module.observe(query, key, attend.split_mask(mask, query, key)[0])
        return found

    sums = observed(program, sites, ctx, observe, scorer.name)
    return {path: replace(indexer, scorer=_written(scorer, module.learn(total, **scorer.options))) for path, total in sums.items()}


def _written(scorer: Named, options: dict[str, Any]) -> str:
    return f"{scorer.name}({', '.join(f'{name}={print_value(value)}' for name, value in options.items())})"
