"""Instruments watch a pipeline run; passes never print. SPARSIFY_DEBUG=dump,verify,numbers,timer,fuel=3 turns them on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .errors import InputError, VerifyError, nearest
from .passes_api import Context, Pass, Preserves
from .program import Program

VARIABLE = "SPARSIFY_DEBUG"


class Instrument:
    """Base: is called around a run and around each pass. None of its methods may change the Program."""

    def start(self, passes: Sequence[Pass], program: Program, ctx: Context) -> None:
        """Before the first pass."""

    def before(self, index: int, item: Pass, program: Program, ctx: Context) -> None:
        """Before a pass; `index` counts from 0."""

    def after(self, index: int, item: Pass, program: Program, ctx: Context) -> None:
        """After a pass, its clean-up and its verification."""

    def finish(self, program: Program, ctx: Context) -> None:
        """After the last pass."""


class Dump(Instrument):
    """Writes the Program as text before the first pass and after each, to `folder`/<number>_<pass>.txt."""

    def __init__(self, folder: str | Path = "sparsify_dump") -> None:
        self.folder = Path(folder)

    def start(self, passes: Sequence[Pass], program: Program, ctx: Context) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write("00_input", program)

    def after(self, index: int, item: Pass, program: Program, ctx: Context) -> None:
        self._write(f"{index + 1:02d}_{item.name()}", program)

    def _write(self, name: str, program: Program) -> None:
        (self.folder / f"{name}.txt").write_text(program.text(), encoding="utf-8")


class Verify(Instrument):
    """Recomputes the shape and dtype of every node after each pass and compares with what the graph says. Raises VerifyError.

    The table of legal nodes is checked in any case; this costs a run of all ops on fake tensors.
    """

    def after(self, index: int, item: Pass, program: Program, ctx: Context) -> None:
        from .fakes import recompute

        for region in program.regions.values():
            for node, says, found in recompute(region):
                raise VerifyError(f"the graph says {says}, the op gives {found}", where=f"pass {item.name()}, node {region.qualified(node.name)}")


class SameNumbers(Instrument):
    """Runs the example inputs around each pass that preserves values and compares. Raises VerifyError with the pass and the worst output.

    Without example inputs in the context, every region runs on inputs made from its input spec.
    """

    def __init__(self) -> None:
        self._before: list[Any] | None = None

    def before(self, index: int, item: Pass, program: Program, ctx: Context) -> None:
        from .preserves import outputs

        if item.preserves is Preserves.VALUES and self._before is None:
            self._before = outputs(program, ctx.example_inputs, ctx.seed)

    def after(self, index: int, item: Pass, program: Program, ctx: Context) -> None:
        from .preserves import compare_outputs, outputs

        if item.preserves is not Preserves.VALUES or self._before is None:
            self._before = None
            return
        now = outputs(program, ctx.example_inputs, ctx.seed)
        compare_outputs(self._before, now, f"pass {item.name()}")
        self._before = now


class Timer(Instrument):
    """Measures each pass; afterwards `seconds` holds (name, seconds) in order, and `report` gets them as text where given."""

    def __init__(self, report: Callable[[str], None] | None = None) -> None:
        self.seconds: list[tuple[str, float]] = []
        self._report, self._began = report, 0.0

    def before(self, index: int, item: Pass, program: Program, ctx: Context) -> None:
        self._began = time.perf_counter()

    def after(self, index: int, item: Pass, program: Program, ctx: Context) -> None:
        self.seconds.append((item.name(), time.perf_counter() - self._began))

    def finish(self, program: Program, ctx: Context) -> None:
        if self._report is not None:
            self._report("\n".join(f"{seconds:8.3f} s  {name}" for name, seconds in self.seconds))


class Fuel(Instrument):
    """Stops after `rewrites` rewrites, to find by halving the one that is wrong."""

    def __init__(self, rewrites: int) -> None:
        self.rewrites = rewrites

    def start(self, passes: Sequence[Pass], program: Program, ctx: Context) -> None:
        ctx.fuel = ctx.rewrites + self.rewrites


class Progress(Instrument):
    """Tells `show(pass name, done, total)` how far the run is; also what passes report of their own steps."""

    def __init__(self, show: Callable[[str, int, int], None]) -> None:
        self.show, self.total = show, 0

    def start(self, passes: Sequence[Pass], program: Program, ctx: Context) -> None:
        self.total = len(passes)

    def before(self, index: int, item: Pass, program: Program, ctx: Context) -> None:
        self.show(item.name(), index, self.total)

    def finish(self, program: Program, ctx: Context) -> None:
        self.show("done", self.total, self.total)


def from_environment(variable: str | None = None) -> list[Instrument]:
    """The instruments that SPARSIFY_DEBUG (or the given text) names. Raises InputError for a name it does not know."""
    text = os.environ.get(VARIABLE, "") if variable is None else variable
    return [_make(*word.strip().partition("=")[::2]) for word in text.split(",") if word.strip()]


def _make(name: str, option: str) -> Instrument:
    if name == "fuel":
        if not option.isdigit():
            raise InputError(f"fuel needs a number of rewrites, got {option!r}", where=VARIABLE, hint=f"{VARIABLE}=fuel=3")
        return Fuel(int(option))
    if name == "dump":
        return Dump(option or "sparsify_dump")
    if name == "timer":
        return Timer(_to_log)
    plain: dict[str, type[Instrument]] = {"verify": Verify, "numbers": SameNumbers}
    if name not in plain:
        raise InputError(f"unknown instrument {name!r}", where=VARIABLE, hint=nearest(name, [*plain, "dump", "timer", "fuel"]))
    return plain[name]()


def _to_log(text: str) -> None:
    import logging

    logging.getLogger("sparsify_compiler").warning("time of each pass\n%s", text)
