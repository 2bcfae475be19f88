from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sample_plugin.passes.prune.structures.grid import Grid

from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program


@dataclass(frozen=True)
class EveryOption(Pass):
    """Do nothing, with options of every type."""

    preserves: ClassVar[Preserves] = Preserves.VALUES

    count: int = 0
    ratio: float = 0.5
    title: str = "plain"
    maybe: bool | None = None
    either: int | str = 0
    sizes: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    pair: tuple[str, float] = ("a", 1.0)
    mode: Literal["fast", "slow"] = "fast"
    keep: Preserves = Preserves.VALUES
    grid: Grid | None = None
    grids: tuple[Grid, ...] = ()

    def run(self, program: Program, ctx: Context) -> Program:
        return program
