"""One call of compile(), from the captured Program to the report."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from . import catalog, step_choice, whole_choice
from .budget import Budget
from .calibrate import Known, calibrate
from .calibrate_loss import Loss
from .call import call_arguments, instantiate
from .capture import capture
from .capture_verify import unchanged
from .compiled import CompiledModel
from .errors import TargetError
from .estimates import Estimate, estimate_program
from .far import far_kernels, is_far
from .far_times import DENSE, says
from .held_out import split
from .instruments import Instrument
from .machines import measured_host, nearest_machine
from .measure import interleave
from .meet_budget import meet_budget
from .memory import give_back
from .packed_storage import leave_in_temporary_file
from .passes_api import Context, Miss, Pass
from .pipeline import Pipeline
from .planned import Planned
from .program import Program
from .quality import Distance, measure, output_distance
from .report import Form, PassTime, Quality, Refusal, Report
from .site_cost import fill_costs
from .target import Target
from .trials import COMPILED, latency
from .version import __version__
from .yardstick import dense_forms

Inputs = tuple[Any, ...] | Mapping[str, Any]
LOWERING = ("pack", "lower")  # what is added to a recipe that does not say it itself
QUALITY_BATCHES = 8  # of the calibration batches, how many the distance of the outputs is measured on, where none are held out


@dataclass
class Job:
    """One call of compile(): what it was given, and what it has found out so far."""

    model: nn.Module
    example: Inputs
    pipeline: Pipeline
    target: Target
    budget: Budget | None
    batches: list[Inputs] | None
    dynamic: Any
    quality: Callable[[nn.Module], float] | None
    against: tuple[str, ...]
    seed: int
    progress: Callable[[str, int, int], None]
    instruments: Sequence[Instrument] | None
    loss: Loss | None = None
    known: Known | None = None
    decoding: str = "auto"
    calls: str = "auto"
    warnings: list[str] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    plan: Planned | None = None
    estimate: Estimate | None = None  # of the dense model, on a machine that is not here

    def run(self) -> CompiledModel:
        lowered = importlib.import_module(".codegen.runtime", __package__).ARCHITECTURES
        if self.target.arch not in lowered:
            raise TargetError(f"layers are not lowered for {self.target.arch}", where=self.target.name, hint=f"they are for {', '.join(lowered)}")
        captured = self.timed("capture", lambda: capture(self.model, self.example, self.dynamic))
        if self.far:
            self.estimate = estimate_program(captured, self.example, nearest_machine(self.target)[0])
        with unchanged(self.model), unchanged(captured.skeleton or nn.Module()):    # what they count is not for the calls that measure them
            forms = self.timed("dense forms", self.dense_forms)
            program = self.timed("compile", lambda: meet_budget(self, captured, forms))
            return self.finish(captured, program, forms)

    @property
    def far(self) -> bool:
        """Is it for a machine that is not here, of which nothing can be measured?"""
        return is_far(self.target)

    def timed(self, what: str, step: Callable[[], Any]) -> Any:
        """Run one step, tell the progress display, and remember how long it took."""
        self.progress(what, 0, 1)
        started = time.perf_counter()
        result = step()
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started
        self.progress(what, 1, 1)
        return result

    def dense_forms(self) -> dict[str, Callable[[], object]]:
        if self.far:
            return {DENSE: lambda: None}
        args, kwargs = call_arguments(self.example)
        forms, warnings = dense_forms(self.model, args, kwargs, self.against)
        self.warnings += warnings
        return forms

    # --- the batches ------------------------------------------------------------------------------------------------------------------------

    @property
    def fitted(self) -> list[Inputs]:
        """The batches that passes may see."""
        return self._batches[0]

    @property
    def held(self) -> list[Inputs]:
        """The batches that quality is measured on: of a budget of quality without a metric of the user's those that no pass has seen."""
        return self._batches[1]

    @cached_property
    def _batches(self) -> tuple[list[Inputs], list[Inputs]]:
        given = self.batches or [self.example]
        if self.budget is None or not self.budget.of_quality or self.quality is not None:
            return given, given[:QUALITY_BATCHES]
        fitted, held = split(given)
        if len(given) == 1:
            self.warnings.append("quality was measured on the batch that was calibrated on: give two or more, and some are held out for it")
        return fitted, held

    # --- the recipe's passes, run to a density --------------------------------------------------------------------------------------------

    def build(self, captured: Program, density: float | None, ignore: tuple[str, ...] = ()) -> Program:
        """All passes in one run, so that masks are gone before lowering lays out kernels."""
        ctx = self.context(density)
        program = (self.rewriting(ignore) | self.lowering()).run(captured, ctx, self.instruments)
        self.plan = ctx.planned
        return program

    def rewrite(self, captured: Program, density: float) -> Program:
        return self.rewriting().run(captured, self.context(density), self.instruments)

    def lower(self, rewritten: Program) -> Program:
        return self.lowering().run(rewritten, self.context(None), self.instruments)

    def rewriting(self, ignore: tuple[str, ...] = ()) -> Pipeline:
        """The recipe's own passes: masks, folds and the like, up to where packing begins."""
        return Pipeline(tuple(_without(p, ignore) if ignore else p for p in self.pipeline.passes if not _lowers(p)))

    def lowering(self) -> Pipeline:
        """pack() and lower(), with the options that the recipe gives them where it names them."""
        named = {p.name(): p for p in self.pipeline.passes if _lowers(p)}
        prefer = {"prefer": "bytes"} if self.budget is not None and self.budget.counted is not None else {}
        return Pipeline(tuple(named.get(name) or catalog.get("pass", name)(**(prefer if name == "lower" else {})) for name in LOWERING))

    def context(self, density: float | None) -> Context:
        runtime = importlib.import_module(".codegen.runtime", __package__)
        ctx = Context(target=self.target, density=density, example_inputs=self.example, seed=self.seed, kernels=runtime,
                      progress=self.progress, misses=self.misses)
        if self.batches is not None:
            ctx.calibrate, ctx.batches, ctx.loss = self.calibrate, self.fitted, self.loss
        return ctx

    # --- what came of it --------------------------------------------------------------------------------------------------------------

    def finish(self, captured: Program, program: Program, dense: Mapping[str, Callable[[], object]]) -> CompiledModel:
        """The compiled model with its report: times of the whole, bytes, quality."""
        args, kwargs = call_arguments(self.example)
        report = self.report(program)
        fill_costs(report.sites, captured, program)
        compiled = CompiledModel(program, self.target, report, leave_in_temporary_file(program))
        give_back()
        self.choose_decoding(compiled, report)
        self.choose_calls(compiled, report)
        if self.far:
            times = latency(self, program, dense)
            report.dense, report.compiled = [Form(DENSE, times[DENSE])], Form(COMPILED, times[COMPILED])
        else:
            timings = self.timed("measure", lambda: interleave({**dense, COMPILED: lambda: compiled(*args, **kwargs)}))
            report.dense = [Form(name, timings[name].median, timings[name].low, timings[name].high) for name in dense]
            report.compiled = Form(COMPILED, timings[COMPILED].median, timings[COMPILED].low, timings[COMPILED].high)
        report.dense_bytes = tensor_bytes(self.model)
        report.compiled_bytes = compiled.resident_bytes()
        report.quality = self.timed("measure quality", lambda: self.qualities(captured, compiled))
        report.passes = [PassTime(name, seconds) for name, seconds in self.seconds.items()]
        report.warnings = list(dict.fromkeys([*self.warnings, *_room_warnings()]))
        return compiled

    def choose_decoding(self, compiled: CompiledModel, report: Report) -> None:
        """Of a language model: let one library take its tokens where that is faster."""
        if self.far or not step_choice.is_wanted(self.decoding, compiled.program, tensor_bytes(self.model)):
            report.decoding = step_choice.why_not(compiled.program) if self.decoding == "library" and not self.far else ""
            return
        choice = self.timed("decoding", lambda: step_choice.choose_step(compiled.program, compiled.model, self.target))
        report.decoding = choice.told
        if choice.step is not None:
            compiled.decode_by(choice.step)

    def choose_calls(self, compiled: CompiledModel, report: Report) -> None:
        """Of a model that was captured whole: let one library take its calls where that is faster, and the bytes stay within their budget."""
        if self.far or not whole_choice.is_wanted(self.calls, compiled.program, tensor_bytes(self.model)):
            report.calls = whole_choice.why_not(compiled.program) if self.calls == "library" and not self.far else ""
            return
        room = 0 if self.budget is not None and self.budget.bytes is not None else None
        choice = self.timed("calls", lambda: whole_choice.choose_call(compiled, self.example, self.target, room))
        report.calls = choice.told
        if choice.whole is not None:
            compiled.call_by(choice.whole)

    def report(self, program: Program) -> Report:
        """The report's head and its sites; what is measured comes later."""
        return Report(
            model=type(self.model).__name__,
            parameters=sum(p.numel() for p in self.model.parameters()),
            target=self.target.to_json(),
            versions={"sparsify_compiler": __version__, "torch": torch.__version__, "tvm": version("apache-tvm")},
            threads=self.target.cores if self.far else torch.get_num_threads(),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            recipe=str(self.pipeline),
            budget=str(self.budget) if self.budget else "",
            seed=self.seed,
            example=_describe(self.example),
            sites=list(program.decisions.values()),
            plan=self.plan,
            left_out=list(program.left_out),
            machine=known.to_json() if (known := nearest_machine(self.target)[0] if self.far else measured_host()) is not None else None,
            elsewhere=says(self.target, len(far_kernels(program))) if self.far else "",
            misses=[Refusal(miss.why, miss.at) for miss in dict.fromkeys(self.misses)],
        )

    def qualities(self, captured: Program, compiled: nn.Module) -> list[Quality]:
        """The user's metric on the dense and on the compiled model, and how far the outputs moved."""
        rows = []
        if self.quality is not None:
            note = "the given metric; higher is better"
            rows.append(Quality("quality", measure(self.quality, self.model), measure(self.quality, compiled), note))
        return [*rows, *[Quality(f"{d.name}: cosine to dense", None, d.cosine) for d in self.distance(captured, compiled)]]

    def calibrate(self, program: Program, needs: Mapping[str, frozenset[str]]) -> Any:
        return calibrate(program, self.fitted, needs, progress=self.progress, warn=self.warnings.append, loss=self.loss,
                         known=self.known)

    def measure_quality(self, model: nn.Module, captured: Program) -> float:
        """The user's metric; without one, how close the outputs are to the dense model's: the lowest cosine of them, at most 1."""
        if self.quality is not None:
            return measure(self.quality, model)
        return min(d.cosine for d in self.distance(captured, model))

    def distance(self, captured: Program, model: nn.Module) -> list[Distance]:
        """How far the model's outputs are from the dense ones, on the batches that are held out."""
        return output_distance(instantiate(captured), model, self.held)


def _lowers(item: Pass) -> bool:
    return item.name() in LOWERING


def _without(item: Pass, sites: tuple[str, ...]) -> Pass:
    """The same pass, leaving these sites alone; passes that take no selectors are as they were."""
    ignored: tuple[str, ...] | None = getattr(item, "ignore", None)
    if ignored is None:
        return item
    changed: Any = {"ignore": (*ignored, *sites)}
    return replace(item, **changed)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each counted once however often it is shared."""
    tensors = {(t.data_ptr(), t.numel()): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _describe(example: Inputs) -> str:
    named = example.items() if isinstance(example, Mapping) else ((str(i), value) for i, value in enumerate(example))
    return ", ".join(f"{name} {'×'.join(map(str, value.shape)) or 'scalar'}" for name, value in named if isinstance(value, torch.Tensor))


def _room_warnings() -> list[str]:
    """What the kernel room has to say: a cache that cannot be used, threads that are not torch's."""
    cache, omp = (importlib.import_module(f".codegen.{name}", __package__) for name in ("cache", "omp"))
    status: str = omp.status()
    return [*cache.warnings(), *([f"kernels run on {status}"] if "torch's OpenMP" not in status.partition("(")[0] else [])]
