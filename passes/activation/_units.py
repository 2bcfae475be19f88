"""What predictors choose in: the neurons of an FFN, the heads of an attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, fx

from sparsify_compiler.calibrate_rows import Place
from sparsify_compiler.decision import Decision
from sparsify_compiler.fold import evaluate, is_constant
from sparsify_compiler.normal_form_edit import only_user
from sparsify_compiler.ops import select
from sparsify_compiler.passes.activation._selection import Selection
from sparsify_compiler.passes.lower._predicted import BY
from sparsify_compiler.program import Program, Region, Site
from sparsify_compiler.site_ffn import neurons_of

MAX_BYTES = 1 << 29  # of rows that are held at one time


@dataclass(frozen=True)
class Unit:
    """One site. `value`, read by `reader`, is selected in units of `size` numbers, by a prediction from `source`; `op` reads `made`."""

    path: str
    region: Region
    what: str
    source: fx.Node
    value: fx.Node
    reader: fx.Node
    made: fx.Node
    op: fx.Node
    size: int

    def place(self, node: fx.Node) -> Place:
        return self.region.path, node.name

    @property
    def bytes_a_row(self) -> int:
        return sum(4 * int(node.meta["val"].shape[-1]) for node in (self.source, self.made))

    def importance(self, rows: Tensor, slopes: Tensor | None) -> Tensor:
        """[rows, units]."""
        if slopes is not None:
            return self._units(rows * slopes).sum(-1).abs()
        length = evaluate(self.region, self.op.kwargs["weight"]).float().square().sum(0).sqrt()  # type: ignore[arg-type]
        return self._units(rows * length).square().sum(-1).sqrt()

    def _units(self, rows: Tensor) -> Tensor:
        return rows.view(rows.shape[0], -1, self.size)


def unit_of(region: Region, site: Site, paths: dict[tuple[str, str], str]) -> Unit | str:
    """The site as a unit, or why it is none. paths: (region, op) -> the path of that linear site."""
    role = "down" if site.kind == "ffn" else "out"
    if role not in site.roles or ("q" not in site.roles and site.kind == "attention"):
        return "what it reads or what reads it is no linear"
    op, first = region.node(site.roles[role]), region.node(site.roles["up" if site.kind == "ffn" else "q"])
    made: Any = op.kwargs["input"]
    source: Any = first.kwargs["input"]
    weight = op.kwargs["weight"]
    if not isinstance(weight, fx.Node) or not is_constant(weight):
        return "its last projection has no stored weight"
    value = neurons_of(region, site) if site.kind == "ffn" else made
    reader, size = only_user(value), 1
    if site.kind == "attention":
        heads, size = int(site.facts["heads"]), int(site.facts["head_dim"])
        if heads * size != int(made.meta["val"].shape[-1]) or size == 0:
            return "its heads are not next to each other"
    if reader is None:
        return f"its {_what(site)} have {len(value.users)} readers"
    if value.target is select.op or reader.target is select.op:
        return f"its {_what(site)} are selected already"
    return Unit(paths[site.region, site.roles[role]], region, _what(site), source, value, reader, made, op, size)


def _what(site: Site) -> str:
    return "neurons" if site.kind == "ffn" else "heads"


def let_select(unit: Unit, selection: Selection, by: str, scores: fx.Node, density: float, recall: float, program: Program) -> None:
    """Read what a predictor's scores choose of the units, and write it down: in the report, and on the nodes where lowering looks for it."""
    chosen = selection.insert(unit.region, unit.reader, unit.value, by, scores)
    unit.reader.replace_input_with(unit.value, chosen)
    chosen.meta["site"] = unit.op.meta["site"] = unit.path
    weight = evaluate(unit.region, unit.op.kwargs["weight"])  # type: ignore[arg-type]
    row = program.decisions.setdefault(unit.path, Decision.of(unit.path, "linear", weight))
    row.structure, row.density, row.budget = f"{unit.what} {BY}", selection.found, density
    row.reason = f"the predictor finds {recall:.0%} of the {unit.what} that matter most"


class Rows(Protocol):
    """What keeps rows of calibration."""

    @property
    def bytes_a_row(self) -> int:
        """How many bytes each."""
        ...


Kept = TypeVar("Kept", bound=Rows)


def in_groups(units: Sequence[Kept], batches: Sequence[Any]) -> Iterator[list[Kept]]:
    """Units whose rows fit into memory together."""
    group: list[Kept] = []
    for unit in units:
        if group and (len(group) + 1) * unit.bytes_a_row * _rows_of(batches) > MAX_BYTES:
            yield group
            group = []
        group.append(unit)
    if group:
        yield group


def _rows_of(batches: Sequence[Any]) -> int:
    """About how many rows these batches have: the numbers of their largest integer tensor, or the rows of their largest other one."""
    total = 0
    for batch in batches:
        tensors = [value for value in torch.utils._pytree.tree_leaves(batch) if isinstance(value, Tensor)]
        total += max((t.numel() if not t.is_floating_point() else t.numel() // max(int(t.shape[-1]), 1) for t in tensors if t.dim()), default=1)
    return total
