"""compile(): the whole way of a model, each step one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import catalog
from .budget import Budget
from .calibrate import Known
from .calibrate_loss import Loss
from .compile_job import Inputs, Job
from .compiled import CompiledModel
from .errors import BudgetError, CalibrationError, InputError, nearest
from .instruments import Instrument
from .passes_api import Pass
from .pipeline import Pipeline
from .progress import display
from .step_choice import DECODING
from .target import Target, resolve
from .whole_choice import CALLS
from .yardstick import check_forms


def compile(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    recipe: str | Path | Pipeline | Pass = "wanda",
    target: str | Target = "cpu",
    budget: Budget | None = None,
    calibration: Iterable[Inputs] | None = None,
    dynamic: Any = None,
    loss: Loss | None = None,
    known: Known | None = None,
    quality: Callable[[nn.Module], float] | None = None,
    against: Sequence[str] = ("eager",),
    seed: int = 0,
    decoding: str = "auto",
    calls: str = "auto",
    progress: bool | Callable[[str, int, int], None] = False,
    instruments: Sequence[Instrument] | None = None,
) -> CompiledModel:
    """Compile a trained model for a machine, within a budget, and never slower than it was.

    model           in evaluation mode; it is not modified. Weights that no pass changes are shared with the result
    example_inputs  a tuple of positional or a dict of named arguments; latency is measured on them
    recipe          a name ("wanda"), recipes.wanda(structure="2:4"), a Pipeline, a Pass, pipeline text, or the path of a YAML file
    target          "cpu" (this machine), another name of `sparsify targets`, or a Target
    budget          Budget(density= | speedup= | latency_ms= | bytes= | flops= | joules= | quality_drop= | perplexity_rise=); None where the recipe
                    says its densities itself
    calibration     batches like example_inputs, for recipes that need statistics and for the quality of the outputs. A budget of quality holds
                    out a part of them, which no pass sees, and is met there
    dynamic         {"input_ids": {0: "batch", 1: "seq"}}, or by position: dimensions that may change between calls
    loss            loss(the model's output, the batch) -> one number, for scores that need gradients (snip, taylor); by default next-token cross
                    entropy for a language model, else the mean square of the outputs
    known           statistics of weights that were gathered elsewhere, as Movement.known() gives them
    quality         model -> float, higher is better, measured on the dense and on the compiled model
    against         dense forms to measure the whole model against: "eager", "compile" (torch.compile with frozen weights)
    seed            fixes whatever is random
    decoding        how a language model's generate() computes one token: "library", by one whole graph where that can be made and is faster;
                    "parts", as it was captured; "auto", a library where there are 64 MB of weights or more. To compile it, once, takes tens of
                    seconds, which the report counts as "decoding"; where it cannot be made the model decodes without, and the report says why
    calls           how a model that was captured whole is called, which a language model that generates is not: "library", by one function of its
                    whole graph where that can be made and is faster; "parts", kernel by kernel; "auto", a library where there are 16 MB of weights
                    or more. It takes calls up to the sizes of the example inputs. To compile it, once, takes some seconds, "calls" in the report
    progress        True for a progress display on the terminal, or a function (what, done, total)
    instruments     watch the passes; by default those that the variable SPARSIFY_DEBUG names

    Raises a SparsifyError that says what is wrong, where, and what to do next: InputError, ModelError, CaptureError, BudgetError,
    CalibrationError, UnknownNameError, TargetError and their like.
    """
    if budget is not None and not isinstance(budget, Budget):
        raise BudgetError(f"a budget is Budget(density=...) or the like, not {type(budget).__name__} {budget!r}", where="budget")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(f"a seed is an int, not {type(seed).__name__} {seed!r}", where="seed")
    if decoding not in DECODING:
        raise InputError(f"decoding is {', '.join(DECODING)}, not {decoding!r}", where="decoding", hint=nearest(str(decoding), DECODING))
    if calls not in CALLS:
        raise InputError(f"calls is {', '.join(CALLS)}, not {calls!r}", where="calls", hint=nearest(str(calls), CALLS))
    if loss is not None and not callable(loss):
        raise InputError(f"a loss is a function of the model's output and the batch, not {type(loss).__name__}", where="loss")
    with display(progress) as show, torch.no_grad():
        return Job(model, example_inputs, as_pipeline(recipe), resolve(target), budget, read_batches(calibration), dynamic, quality,
                   check_forms(against), seed, show, instruments, loss, known, decoding, calls).run()


def as_pipeline(recipe: str | Path | Pipeline | Pass) -> Pipeline:
    """The Pipeline of whatever `compile` takes as a recipe. Raises UnknownNameError, ParseError or InputError."""
    if isinstance(recipe, Pipeline):
        return recipe
    if isinstance(recipe, Pass):
        return Pipeline((recipe,))
    if isinstance(recipe, Path) or (isinstance(recipe, str) and recipe.endswith((".yaml", ".yml"))):
        return Pipeline.from_yaml(Path(recipe))
    if not isinstance(recipe, str):
        raise InputError(f"a recipe is a name, a Pipeline, a Pass or the path of a YAML file, not {type(recipe).__name__}", where="recipe")
    if any(mark in recipe for mark in "(|"):
        return Pipeline.parse(recipe)
    if recipe in catalog.names("pass"):
        raise InputError(f"{recipe!r} is a pass, not a recipe", where="recipe", hint=f"write {recipe}() for a pipeline of this one pass")
    made = catalog.get("recipe", recipe)()
    return made if isinstance(made, Pipeline) else Pipeline((made,))


def read_batches(calibration: Iterable[Inputs] | None) -> list[Inputs] | None:
    """The batches in memory: a generator could be walked only once, and a search over densities walks them again and again."""
    if calibration is None:
        return None
    if isinstance(calibration, torch.Tensor | str | bytes | Mapping) or not isinstance(calibration, Iterable):
        raise InputError(f"calibration is an iterable of batches, not {type(calibration).__name__}", where="calibration",
                         hint="give a list of tuples or dicts, each like example_inputs")
    batches = list(calibration)
    if not batches:
        raise CalibrationError("the calibration is empty: there is no batch in it", where="calibration",
                               hint="give at least one batch like example_inputs")
    return batches
