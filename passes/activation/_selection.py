"""One selection, calibrated, and how it is written into a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler.fold import put
from sparsify_compiler.named import Named
from sparsify_compiler.normal_form_edit import insert
from sparsify_compiler.ops import select
from sparsify_compiler.program import Region
from sparsify_compiler.splice import insert_formula


@dataclass(frozen=True)
class Selection:
    """What of a value is selected: a selector with its calibrated number, None to select all; scale and center, None for 1 and 0.

    found  share of the sampled scores that is selected
    """

    selector: Named
    number: float | None
    found: float
    scale: Tensor | None = None
    center: Tensor | None = None

    @staticmethod
    def of(selector: str, scores: Tensor, density: float, scale: Tensor | None = None, center: Tensor | None = None) -> Selection:
        """The selection that takes `density` of the sampled scores [rows, K]."""
        named = Named.parse("selector", selector)
        if density >= 1 and not exact(named):
            return Selection(named, None, 1.0, scale, center)
        number: float = named.module.calibrate(scores, density)
        limit = named(scores, number)
        return Selection(named, number, float((scores >= (number if limit is None else limit)).float().mean()), scale, center)

    def __call__(self, rows: Tensor) -> Tensor:
        """select(rows), [..., K]."""
        if self.number is None:
            return rows
        limit = self.selector(select.score(rows, self.scale, self.center), self.number)
        return select.reference(rows, rows.new_tensor(self.number) if limit is None else limit, self.scale, self.center)

    def insert(self, region: Region, before: fx.Node, x: Any, by: str, scores: fx.Node | None = None, straight_through: bool = False) -> fx.Node:
        """The node of select(x, ...), in front of another; by scores that another node gives, where it is named."""

        def stored(value: Tensor, name: str) -> fx.Node:
            return put(region, before, value, name, (), before.meta, by)

        given: dict[str, Any] = {} if self.scale is None else {"scale": stored(self.scale, "input_scale")}
        if self.center is not None:
            given["center"] = stored(self.center.to(x.meta["val"].dtype), "input_center")

        given |= {} if scores is None else {"scores": scores}

        def limit_of(x: Tensor, scale: Tensor | None = None, center: Tensor | None = None, scores: Tensor | None = None) -> Any:
            return self.selector(select.score(x, scale, center) if scores is None else scores, self.number)

        number = self.number if self.number is not None else 0.0 if scores is None else float("-inf")
        if self.number is None or self.selector(torch.ones(1, 1, dtype=torch.float32), 1.0) is None:
            limit = stored(torch.tensor(number, dtype=torch.float32), "input_limit")
        else:
            limit = insert_formula(region, before, limit_of, {"x": x, **given}, by)
        chosen = insert(before, select.op, x=x, limit=limit, **given, **({"straight_through": True} if straight_through else {}))
        chosen.meta |= {"by": by, "optional": True}  # lower drops it where it does not pay; a model's own selection stays
        return chosen


def exact(selector: Named) -> bool:
    """Whether a selector leaves out zeros only, so that it needs no density."""
    return bool(getattr(selector.module, "EXACT", False))
