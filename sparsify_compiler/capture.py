"""model, example inputs → Program: one torch.export of the whole where that works, the largest exportable submodules where it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .call import clone_structure, instantiate
from .capture_calls import foreign_result
from .capture_check import check_model
from .capture_graph import NotExportableError, export_region
from .capture_inputs import ExampleCall, read_call
from .capture_regions import capture_regions
from .capture_verify import allow_ones, compare, run
from .library_experts import give_experts, unfit_experts
from .normal_form import normalise
from .program import LeftOut, Program, prune_unused
from .shapes import note_sizes

Progress = Callable[[str, int, int], None]


def capture(model: nn.Module, example_inputs: Any, dynamic: Any = None, progress: Progress = lambda what, done, total: None,
            trains: bool = False) -> Program:
    """Capture a model in eval mode as graphs in normal form that share its parameters; the model is never modified.

    example_inputs  tuple of positional or dict of named arguments; None, bool, int, float and str among them are baked in
    dynamic         {"input_ids": {0: "batch", 1: "seq"}}, the same by position, or a tuple of such; the same name means the same size
    progress        called with (what, done, total)
    trains          gradients will pass through the Program: what detaches a value stays (torch.no_grad() too), and a pass may not see through it

    Raises ModelError, InputError, and CaptureError when nothing could be captured or the Program does not reproduce the model.
    """
    check_model(model)
    call = read_call(model, example_inputs, dynamic)
    expected = run(model, call, "example_inputs")
    model, unfit = give_experts(model, clone_structure), unfit_experts(model)
    progress("capture", 0, 1)
    try:
        if reason := foreign_result(expected):
            raise NotExportableError(reason)
        program = _whole(model, call, trains)
    except NotExportableError as problem:
        program = capture_regions(model, call, problem.reason, progress, trains)
    program.left_out += tuple(LeftOut(path, why) for path, why in unfit.items())
    compare(instantiate(program), call, expected)
    progress("capture", 1, 1)
    return program


def _whole(model: nn.Module, call: ExampleCall, trains: bool) -> Program:
    region, aliases = export_region(model, call, "", trains)
    normalise(region.module, trains)
    prune_unused(region)
    note_sizes(region, call)
    allow_ones(region, model, call)
    return Program({"": region}, aliases=aliases)
