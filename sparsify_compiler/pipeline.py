"""Pipeline: a tuple of passes, as Python objects, as text and as YAML, and how it runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from traceback import walk_tb
from types import TracebackType
from typing import overload

from torch import fx

from .errors import CalibrationError, InputError, SparsifyError
from .instruments import Instrument, from_environment
from .memory import give_back
from .passes_api import Context, Pass
from .pipeline_text import parse_passes, parse_value, print_value
from .pipeline_yaml import from_yaml, to_yaml
from .program import Program, Stage, prune_unused
from .verify import Signature, signature_of, verify

__all__ = ["Pipeline", "parse_value", "print_value"]

_ORDER = tuple(Stage)


@dataclass(frozen=True)
class Pipeline:
    """A tuple of passes. `str(pipeline)` and `Pipeline.parse` are inverses, and so are to_yaml() and from_yaml().

    `|` joins pipelines and passes: Pipeline((FoldBatchnorm(),)) | MaskWeights(structure=NM(2, 4)).
    Raises InputError where something else than a pass is given.
    """

    passes: tuple[Pass, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", tuple(self.passes))
        for item in self.passes:
            if not isinstance(item, Pass):
                raise InputError(f"not a pass: {item!r}", where="Pipeline", hint="give objects such as FoldBatchnorm(), or use Pipeline.parse")

    def __str__(self) -> str:
        return " | ".join(map(str, self.passes))

    def __len__(self) -> int:
        return len(self.passes)

    def __or__(self, other: Pipeline | Pass) -> Pipeline:
        return Pipeline(self.passes + _passes(other)) if isinstance(other, Pipeline | Pass) else NotImplemented

    def __ror__(self, other: Pass) -> Pipeline:
        return Pipeline((other, *self.passes)) if isinstance(other, Pass) else NotImplemented

    def _uncut(self, index: int, program: Program, ctx: Context) -> Program | None:
        """What is dense for the pass that comes now: the Program before the first of the passes in a row that cut layer by layer.

        None where that is the Program as it is now, and nobody will ask again.
        """
        if not self.passes[index].layer_by_layer:
            return None
        if index and self.passes[index - 1].layer_by_layer:
            return ctx.uncut
        return program.clone() if index + 1 < len(self.passes) and self.passes[index + 1].layer_by_layer else None

    @overload
    def __getitem__(self, index: int) -> Pass: ...
    @overload
    def __getitem__(self, index: slice) -> Pipeline: ...
    def __getitem__(self, index: int | slice) -> Pass | Pipeline:
        return Pipeline(self.passes[index]) if isinstance(index, slice) else self.passes[index]

    @staticmethod
    def parse(text: str) -> Pipeline:
        """The pipeline of a text such as "fold_batchnorm() | mask_weights(structure=NM(n=2, m=4))"; a recipe stands for its passes.

        Raises ParseError with the place and the nearest option names, UnknownNameError with the nearest passes.
        """
        return Pipeline(parse_passes(text))

    @staticmethod
    def from_yaml(source: str | Path) -> Pipeline:
        """The pipeline of a YAML file or text. Raises ParseError with line and column, InputError where there is no such file."""
        if isinstance(source, Path) or ("\n" not in source and source.endswith((".yaml", ".yml"))):
            try:
                return Pipeline(from_yaml(Path(source).read_text(encoding="utf-8"), str(source)))
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"cannot read the file: {error}", where=str(source)) from error
        return Pipeline(from_yaml(source))

    def to_yaml(self) -> str:
        """The pipeline as YAML text."""
        return to_yaml(self.passes)

    def run(self, program: Program, ctx: Context | None = None, instruments: Sequence[Instrument] | None = None) -> Program:
        """The Program after all passes; the given one is not touched.

        After each pass the graphs are cleaned, recompiled and verified. `instruments` watch; by default those that SPARSIFY_DEBUG names.
        Raises InputError before anything runs when the passes do not fit together; afterwards any SparsifyError, with the pass's name in it.
        """
        ctx = Context() if ctx is None else ctx
        watchers = tuple(from_environment() if instruments is None else instruments)
        for watcher in watchers:
            if not isinstance(watcher, Instrument):
                raise InputError(f"an instrument is an object such as Verify(), not {watcher!r}", where="instruments",
                                 hint="sparsify_compiler.instruments has them; SPARSIFY_DEBUG=verify takes names")
        check_stages(self.passes, program.stage)
        ctx.given, program, signature = program, program.clone(), signature_of(program)
        for watcher in watchers:
            watcher.start(self.passes, program, ctx)
        for index, item in enumerate(self.passes):
            for watcher in watchers:
                watcher.before(index, item, program, ctx)
            ctx.uncut = self._uncut(index, program, ctx)
            program = _run_one(item, program, ctx, signature)
            for watcher in watchers:
                watcher.after(index, item, program, ctx)
        ctx.uncut = None
        for watcher in watchers:
            watcher.finish(program, ctx)
        return program


def check_stages(passes: Iterable[Pass], stage: Stage) -> None:
    """Refuse, before anything runs, a pass that cannot accept what the ones before it leave. Raises InputError."""
    for item in passes:
        if not _ORDER.index(item.needs_stage) <= _ORDER.index(stage) <= _ORDER.index(item.until_stage):
            raise InputError(f"takes a Program from stage {item.needs_stage} to {item.until_stage}, and would get one at stage {stage}",
                             where=f"pass {item.name()}", hint="change the order of the passes")
        stage = item.gives_stage or stage


def _run_one(item: Pass, program: Program, ctx: Context, signature: Signature) -> Program:
    try:
        _provide_statistics(item, program, ctx)
    except SparsifyError as error:
        raise _placed(error, item) from error.__cause__
    try:
        program = item.run(program, ctx)
    except SparsifyError as error:
        raise _placed(error, item) from error.__cause__
    except Exception as error:
        node = _node_at(error.__traceback__)
        where = f"pass {item.name()}" + (f", node {node.name}" if node else "")
        raise SparsifyError(f"the pass failed with {type(error).__name__}: {error}", where=where,
                            hint="this is a bug of the pass: SPARSIFY_DEBUG=dump shows the graph before it") from error
    program.stage = item.gives_stage or program.stage
    for region in program.regions.values():
        prune_unused(region)
    give_back()
    try:
        verify(program, signature)
    except SparsifyError as error:
        raise _placed(error, item) from error.__cause__
    return program


def _provide_statistics(item: Pass, program: Program, ctx: Context) -> None:
    needs = item.needs(program)
    if not needs:
        return
    if ctx.calibrate is not None:
        ctx.statistics = ctx.calibrate(ctx.uncut or program, needs)
    if ctx.statistics is None:
        wanted = ", ".join(sorted({name for names in needs.values() for name in names}))
        raise CalibrationError(f"needs statistics ({wanted}) of {len(needs)} sites and there is no calibration",
                               hint="give calibration=batches, or a score that needs none such as magnitude")


def _placed(error: SparsifyError, item: Pass) -> SparsifyError:
    """The same error, with the pass's name in its place."""
    place = f"pass {item.name()}"
    if place not in error.where:
        where = f"{place}, {error.where}" if error.where not in ("", item.name()) else place
        SparsifyError.__init__(error, error.what, where=where, hint=error.hint)
    return error


def _node_at(traceback: TracebackType | None) -> fx.Node | None:
    """The node that the innermost frame was busy with, by the habit of calling it `node`."""
    found = [frame.f_locals.get("node") for frame, _ in walk_tb(traceback)]
    return next((node for node in reversed(found) if isinstance(node, fx.Node)), None)


def _passes(item: Pipeline | Pass) -> tuple[Pass, ...]:
    return item.passes if isinstance(item, Pipeline) else (item,)


