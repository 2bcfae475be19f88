"""What a pass is: Program -> Program, printed as text and parsed back, saying what it preserves."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from .errors import BudgetError
from .program import Program, Site, Stage

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .planned import Planned
    from .target import Target
    from .work import Work


class Preserves(StrEnum):
    """What holds between a Program before and after a pass; the pipeline checks it."""

    VALUES = "values"  # same outputs, up to float reassociation
    MASK = "mask"  # the set of zeros of every weight
    SIGNATURE = "signature"  # shapes and dtypes only; quality is measured, never assumed


@dataclass(frozen=True)
class Miss:
    """Why a rule or pass did not act: the sentence that `sparsify why` prints. `at` names the node or site."""

    why: str
    at: str = ""

    def __str__(self) -> str:
        return f"at {self.at}: {self.why}" if self.at else self.why


class Statistics(Protocol):
    """Calibration results, per site path and statistic name (see calibrate.STATISTICS)."""

    def get(self, site: str, statistic: str) -> Tensor: ...


class KernelProvider(Protocol):
    """What lowering asks of the kernel room (codegen.runtime)."""

    def candidates(self, op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype,
                   rows: Sequence[int], target: Target, shared: dict[str, list[Any]] | None = None) -> Sequence[Any]: ...

    def known(self, op: str, shape: tuple[int, int], rows: int, density: float, attributes: Mapping[str, Any], chain: str, dtype: str,
              target: Target) -> tuple[Any, Any]: ...

    def as_tuned(self, found: Sequence[tuple[Any, Any]], record: Any) -> list[tuple[Any, Any]]: ...

    def space(self, found: Sequence[Any]) -> list[Any]: ...


@dataclass
class Context:
    """What a pass may use beside its own options. Passes never print: they note misses here, and instruments watch."""

    target: Target | None = None
    density: float | None = None  # the user's budget, for passes whose own density is not set
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None  # what lowering measures on
    seed: int = 0
    trains: bool = False  # the Program is trained afterwards: what a mask leaves out must have no number that could become one
    statistics: Statistics | None = None
    calibrate: Callable[[Program, Mapping[str, frozenset[str]]], Statistics] | None = None  # asked for what a pass needs(), just before it runs
    batches: Sequence[Any] | None = None  # the calibration batches, for passes that walk through them themselves
    loss: Callable[[Any, Any], Any] | None = None  # the user's, of (output, batch); by default that of the next token
    given: Program | None = None  # what the pipeline was given, untouched, for passes that compare with it
    uncut: Program | None = None  # what a run of passes that cut layer by layer began with: statistics for each of them are of this
    planned: Planned | None = None  # what a planner says of its plan, for the report
    kernels: KernelProvider | None = None
    board: Any = None  # a remote machine of the target's kind (codegen/board.py), for tuning
    progress: Callable[[str, int, int], None] = lambda what, done, total: None  # a pass reports its own steps
    misses: list[Miss] = field(default_factory=list)
    rewrites: int = 0  # how many times a rule or pass acted; Fuel counts them
    fuel: int | None = None  # stop after this many rewrites

    def miss(self, why: str, at: str = "") -> None:
        """Record why something was not done."""
        self.misses.append(Miss(why, at))

    def spend(self) -> bool:
        """Ask to do one more rewrite; False when the fuel is used up (to bisect a wrong rewrite)."""
        if self.fuel is not None and self.rewrites >= self.fuel:
            return False
        self.rewrites += 1
        return True


@dataclass(frozen=True)
class Pass:
    """Base of all passes: a frozen dataclass whose options are plain values, in a file named after it.

    Every pass has a docstring with the fields Matches, Rewrites, Preserves and Paper, and its file ends with
    `example() -> (model, example_inputs)`, the smallest model that triggers it.
    """

    preserves: ClassVar[Preserves] = Preserves.VALUES
    needs_stage: ClassVar[Stage] = Stage.TRACED  # the earliest stage that it accepts
    until_stage: ClassVar[Stage] = Stage.SPARSE  # the latest
    gives_stage: ClassVar[Stage | None] = None  # the stage that the Program is in afterwards, when that changes
    idempotent: ClassVar[bool] = True
    layer_by_layer: ClassVar[bool] = False  # what it does to a layer depends on its weight and statistics alone, not on the layers around it

    @classmethod
    def name(cls) -> str:
        """The pass's name in text and on the command line: its file's name; for a class of a script or notebook, its own in snake case."""
        spec = sys.modules[cls.__module__].__spec__
        file = (spec.name if spec is not None else "").rpartition(".")[2]
        own = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
        return file if file.replace("_", "") == own.replace("_", "") else own

    def needs(self, program: Program) -> Mapping[str, frozenset[str]]:
        """Site path -> names of the statistics that must be in ctx.statistics before run(). None by default."""
        return {}

    def own_density(self) -> float | None:
        """The density that this pass's options fix, whatever the budget says; None where the budget decides, or there is nothing to decide."""
        density: float | None = getattr(self, "density", None)
        return density

    def work(self, shape: tuple[int, int], rows: int, density: float, dtype: str, between: int) -> tuple[Work, ...]:
        """What a call of a linear layer [N, K] has to do after this pass took it to a density: a planner asks. As before, by default.

        between  bytes that the model reads between two calls (see Work)
        """
        from .work import Work

        return (Work.of(shape, rows, dtype=dtype, between=between),)

    def density_of(self, ctx: Context) -> float:
        """own_density(), or the budget's. Raises BudgetError where neither is given."""
        own = self.own_density()
        density = ctx.density if own is None else own
        if density is None:
            raise BudgetError("no density was given", where=self.name(),
                              hint=f"{self.name()}(density=0.5), compile(..., budget=Budget(density=0.5)), or --density 0.5 on the command line")
        return density

    def check_density(self, density: float | None) -> None:
        """For __post_init__. Raises BudgetError."""
        if density is not None and not 0 < density <= 1:
            raise BudgetError(f"a density lies above 0 and at most at 1, got {density}", where=self.name())

    def take_selectors(self, *options: str) -> None:
        """For __post_init__: these options become tuples of selectors, also where one was given as plain text."""
        for option in options:
            value = getattr(self, option)
            object.__setattr__(self, option, (value,) if isinstance(value, str) else tuple(value))

    def ffns(self, program: Program, ctx: Context) -> list[Site]:
        """The FFNs that the options `targets` and `ignore` choose; a miss where the model has none. Raises SelectorError."""
        from .sites import chosen_sites

        sites = chosen_sites(program, ("ffn",), self.targets, self.ignore)  # type: ignore[attr-defined]
        if not sites:
            ctx.miss("the model has no FFN")
        return sites

    def run(self, program: Program, ctx: Context) -> Program:
        """The Program after the pass. `program` is a private clone: edit it in place and return it."""
        raise NotImplementedError

    def __or__(self, other: Pass | Pipeline) -> Pipeline:
        from .pipeline import Pipeline

        return Pipeline((self,)) | other

    def options(self) -> dict[str, Any]:
        """Options that differ from their defaults, in the order of the fields."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init and getattr(self, f.name) != _default(f)}

    def __str__(self) -> str:
        from .pipeline import print_value

        return f"{self.name()}({', '.join(f'{k}={print_value(v)}' for k, v in self.options().items())})"


def _default(f: Any) -> Any:
    if f.default is not MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not MISSING else MISSING
