"""What the reading commands print: passes with their examples, misses, lists, times."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from .cost_models.machine import Machine
    from .measure import Timing
    from .passes_api import Context
    from .pipeline import Pipeline
    from .program import Program


def show(what: str, model: str | None, batch: int, sequence: int) -> str:
    """The description, and the Program before and after."""
    from . import catalog
    from .cli_model import load_model

    pipeline = _pipeline(what)
    parts = [_description(item) for item in dict.fromkeys(type(p) for p in pipeline.passes)]
    if what in catalog.names("recipe"):
        parts = [f"recipe {what}\n\n{inspect.getdoc(catalog.get('recipe', what))}\n\n= {pipeline}", *parts]
    if model is not None:
        source = load_model(model, batch=batch, sequence=sequence)
        built, example = source.model, source.example_inputs
    else:
        built, example = _example(pipeline)
    before, after, ctx = _run(pipeline, built, example)
    misses = [f"not done {miss}" for miss in ctx.misses]
    return "\n\n".join([*parts, f"before\n\n{before.text()}", f"after {pipeline}\n\n{after.text()}", *(["\n".join(misses)] if misses else [])])


def why(what: str, model: str, batch: int, sequence: int) -> str:
    """The nearest misses of a pass on a model."""
    from .cli_model import load_model

    source = load_model(model, batch=batch, sequence=sequence)
    pipeline = _pipeline(what)
    _, _, ctx = _run(pipeline, source.model, source.example_inputs)
    times = "once" if ctx.rewrites == 1 else f"{ctx.rewrites} times"
    acted = f"{pipeline} acted {times}" if ctx.rewrites else f"{pipeline} did not act"
    if not ctx.misses:
        return f"{acted}; nothing in this model came near its pattern" if not ctx.rewrites else f"{acted} and left nothing out"
    return "\n".join([f"{acted}; what it left, and why:", *(f"  {miss}" for miss in ctx.misses)])


def table(kind: str) -> Table:
    """Every entry of a kind with the first line of its docstring, and its paper."""
    from . import catalog

    found = _table(kind, "what it does", "paper")
    for name in catalog.names(kind):
        described = catalog.describe(kind, name)
        paper = described.fields.get("Paper", "").replace("\n", " ")
        found.add_row(name, described.summary, "" if paper.startswith("none") else paper)
    return found


def found(method: str) -> Table | str:
    """Everything that is made for a method, or speaks of it."""
    from .mentions import mentions

    rows = mentions(method)
    listed = _table(method, "kind", "what it does")
    for one in rows:
        listed.add_row(one.name, one.kind, one.summary)
    return listed if rows else f"nothing here speaks of {method!r}; sparsify recipes lists all, sparsify passes what they are made of"


def targets(measure: bool, fit: float | None = None) -> Group | Table:
    """The targets, whether their code runs here, and the machines of data sheets; or this machine's numbers, measured anew, and costs fitted."""
    from rich.console import Group

    from .machines import measure_host

    if fit is not None:
        return _fitted(fit)
    return rates(measure_host()) if measure else Group(_targets(), _machines())


def _fitted(minutes: float) -> Group:
    from rich.console import Group

    from .machine_costs import fit_host
    from .progress import display

    with display(True) as show:
        found = fit_host(minutes, show)
    kept = "They are kept: predictions for this machine are made of them." if found.kept else "They are not kept."
    said = (f"{found.forms} forms of {found.layers} layers were timed. On layers that were not fitted on, predictions are off by {found.before:.1%} "
            f"in the median with what was known before, and by {found.after:.1%} with these costs. {kept}")
    return Group(rates(found.machine), said)


def _targets() -> Table:
    from .target import NAMES, host, resolve, title

    here = host()
    found = _table("target", "machine", "features", "runs here")
    for name in NAMES:
        each = resolve(name)
        found.add_row(name, title(each), " ".join(each.features), "yes" if each.runs_on(here) else "no")
    return found


def _machines() -> Table:
    from .machines import machine, names
    from .target import HERE

    found = _table("machine", "what it is", "float32", "bfloat16", "memory")
    for name in names():
        if name not in HERE:
            each = machine(name)
            found.add_row(name, each.title, *_peaks(each), f"{each.memory[-1].all / 1e9:.4g} GB/s")
    return found


def rates(machine: Machine) -> Group:
    """What a machine does in a second, and where that was found out."""
    from rich.console import Group

    numbers = _table("", machine.title, "unit", "source")
    for name, number in machine.numbers.items():
        numbers.add_row(name, f"{number.value:.3g}", number.unit, number.source)
    memory = _table("read again after", "one core", "all cores", "a call takes longer by")
    for level in machine.memory:
        memory.add_row(f"{level.bytes / 1024:.0f} KB", f"{level.one / 1e9:.1f} GB/s", f"{level.all / 1e9:.1f} GB/s", f"{level.cold * 1e6:.1f} µs")
    return Group(numbers, memory)


def _peaks(machine: Machine) -> tuple[str, str]:
    from .cost import quantity

    per_core = [machine.numbers[name].value if name in machine.numbers else None for name in ("vector", "matrix")]
    vector, matrix = ("–" if value is None else f"{quantity(value * machine.cores)}flop/s" for value in per_core)
    return vector, matrix


def timings(times: Mapping[str, Timing]) -> Table:
    """Times of several forms; the last one's gain over each."""
    from .report import words

    found = _table("form", "median", "quartiles", "compiled gains")
    last = list(times.values())[-1]
    for name, timing in times.items():
        gain = words.DASH if timing is last else words.ratio(timing.median, last.median)
        found.add_row(name, words.ms(timing.median), f"{words.ms(timing.low)} – {words.ms(timing.high)}", gain)
    return found


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    found = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0))
    found.columns[0].no_wrap = True
    for column in found.columns[1:]:
        column.overflow = "fold"
    return found


def _pipeline(what: str) -> Pipeline:
    """A pass or recipe by its bare name, or pipeline text. Raises UnknownNameError or ParseError."""
    from .pipeline import Pipeline

    if ":" in what and "(" not in what:
        raise InputError(f"not a pass, recipe or pipeline: {what!r}", hint="first the pass, then the model: sparsify show fold_batchnorm my.py:make")
    return Pipeline.parse(f"{what}()" if what.isidentifier() else what)


def _description(item: type) -> str:
    return f"pass {item.name()}\n\n{inspect.getdoc(item)}"  # type: ignore[attr-defined]


def _example(pipeline: Pipeline) -> tuple[Any, Any]:
    """The example of the pipeline's first pass, from the end of its file."""
    if not pipeline.passes:
        raise InputError("the pipeline is empty", where="PASS_OR_PIPELINE", hint="sparsify passes lists them")
    example = getattr(sys.modules[type(pipeline.passes[0]).__module__], "example", None)
    if example is None:
        raise InputError(f"{pipeline.passes[0].name()} has no example of its own", where="MODEL", hint="name a model to show it on")
    made: tuple[Any, Any] = example()
    return made


def _run(pipeline: Pipeline, model: Any, example: Any) -> tuple[Program, Program, Context]:
    from .calibrate import calibrate
    from .capture import capture
    from .codegen import runtime
    from .passes_api import Context
    from .target import host

    before = capture(model, example)
    ctx = Context(
        target=host(), density=0.5, example_inputs=example, kernels=runtime, calibrate=lambda program, needs: calibrate(program, [example], needs)
    )
    return before, pipeline.run(before, ctx), ctx
