"""attach(): a recipe's rewrites on a copy of the model that trains in the user's own loop, and the hook that the loop calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from .calibrate import calibrate
from .call import instantiate, own_tensors
from .capture_batch import captured_for_any_batch
from .compile import as_pipeline, read_batches
from .errors import InputError
from .ops import select
from .passes_api import Context, Pass
from .pipeline import Pipeline
from .program import Program, Region, Stage, get_tensor
from .site_ffn import neurons_of
from .sites import find_sites
from .training import META, Hook, Marked, Part, TrainingPass, Watch, watch

Inputs = tuple[Any, ...] | Mapping[str, Any]


def attach(model: nn.Module, example_inputs: Inputs, recipe: str | Path | Pipeline | Pass, *, calibration: Iterable[Inputs] | None = None,
           density: float | None = None, dynamic: Any = None, seed: int = 0) -> tuple[nn.Module, Hook]:
    """Rewrite a model for training with a recipe: (a module with the model's signature that trains, the hook for the loop).

    model           in evaluation mode. It is not modified and shares no tensor with the result
    example_inputs  a tuple of positional or a dict of named arguments
    recipe          as in compile(); it may not pack or lower
    calibration     batches like example_inputs, for recipes that need statistics
    density         for recipes that leave it to the budget
    dynamic         as in compile(): dimensions that may change between calls. By default the first of every tensor (the batch), where the model
                    allows it

    The module is plain PyTorch: parameters under the model's own names, what a rewrite added beside them, and it saves, moves, and goes through
    compile() when it is trained. Dropout is not in it: the graph is that of the model in evaluation. A learned activation's parameters are among
    its parameters(), so make the optimizer after.

    Raises InputError, CaptureError and their like, as compile() does.
    """
    pipeline, batches = as_pipeline(recipe), read_batches(calibration)
    ctx = Context(example_inputs=example_inputs, density=density, seed=seed)
    if batches is not None:
        ctx.batches = batches
        ctx.calibrate = lambda program, needs: calibrate(program, batches, needs)
    with torch.no_grad():
        program = pipeline.run(captured_for_any_batch(model, example_inputs, dynamic), ctx)
    if program.stage not in (Stage.TRACED, Stage.SPARSE):
        raise InputError("this recipe packs or lowers, and what is packed does not train", where="recipe",
                         hint="attach with the rewrites alone; compile() packs and lowers what was trained")
    return _hooked(program)


def _hooked(program: Program) -> tuple[nn.Module, Hook]:
    watched = program.clone()
    ffns = [(site, watched.regions[site.region]) for site in find_sites(watched, ("ffn",))]
    seen: dict[fx.Node, Watch] = {}

    def watch_of(region: Region, node: fx.Node) -> Watch:
        if node not in seen:
            seen[node] = watch(region, f"sparsify_watch_{len(seen)}", node)
        return seen[node]

    values = {site.path: Marked(site.path, watch_of(region, neurons_of(region, site))) for site, region in ffns}
    marks = [(by, path, region, node) for region, node in watched.nodes() for by, path in node.meta.get(META, ())]
    watches = [watch_of(region, node) for _, _, region, node in marks]
    for region in watched.regions.values():
        region.module.recompile()
    module = own_tensors(instantiate(watched))
    marked: dict[TrainingPass, list[Marked]] = {}
    for (by, path, region, node), one in zip(marks, watches, strict=True):
        marked.setdefault(by, []).append(Marked(path, one, _limit(module, region, node)))
    parts: list[Part] = [by.part(places) for by, places in marked.items()]
    return module, Hook(parts, values)


def _limit(module: nn.Module, region: Region, node: fx.Node) -> Tensor | None:
    """The buffer of the trained module that a selection compares with."""
    limit = node.kwargs.get("limit") if node.target is select.op else None
    return get_tensor(module, region.qualified(str(limit.target))) if isinstance(limit, fx.Node) and limit.op == "get_attr" else None
