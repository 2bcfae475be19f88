"""The guard of a stack of blocks, written into its graphs: which rows still run through the next block."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler.calibrate_rows import Place
from sparsify_compiler.fold import put
from sparsify_compiler.normal_form_edit import insert
from sparsify_compiler.ops import noted, put_rows, take_rows
from sparsify_compiler.program import Program, Region, Site
from sparsify_compiler.session import PLACES
from sparsify_compiler.splice import insert_formula


@dataclass(frozen=True)
class Stream:
    """Where the residual stream around an FFN is seen: nodes before and after it in its graph, or the key of a note on what stands before it."""

    before: str = ""
    after: str = ""
    key: str = ""


@dataclass
class Guard:
    """One stack. Blocks are added in the order of execution.

    key       of the note on which rows are open, between regions
    likeness  where the cosines are that decide, of all blocks but the last
    limits    (region, name) of the buffers that they are compared with
    """

    program: Program
    key: str
    warm: int
    by: str
    likeness: list[Place] = field(default_factory=list)
    limits: list[tuple[str, str]] = field(default_factory=list)
    _open: tuple[Region, fx.Node] | None = None

    def add(self, site: Site, stream: Stream, decides: bool) -> None:
        """Put the guard around one FFN; decides: the rows that it hardly changes are closed behind it."""
        region = self.program.regions[site.region]
        first = min((region.node(site.roles[role]) for role in ("up", "gate") if role in site.roles), key=list(region.graph.nodes).index)
        source: Any = first.kwargs["input"]
        down = after = region.node(site.roles["down"])
        before = region.node(stream.before) if stream.before else self._told(region, first, source, stream.key)
        known = None if self._open is None else self._known(region, first, source)
        if known is not None:
            after = self._around(region, site, source, down, first, known)
        if not decides:
            return
        if stream.after:
            after = region.node(stream.after)
            cosine = self._formula(region, after.next, _cosine, x=before, y=after)
        else:
            cosine = self._formula(region, after.next, lambda x, y: _cosine(x, x + y), x=before, y=after)
        limit = put(region, cosine.next, torch.tensor(2.0, dtype=torch.float32), "guard_limit", (), down.meta, self.by)
        kept = {} if known is None else {"known": known}
        open_ = self._formula(region, limit.next, partial(_still_open, dtype=source.meta["val"].dtype), cosine=cosine, limit=limit, **kept)
        if self.program.skeleton is not None:
            open_ = self._own(insert(open_.next, noted.op, value=open_, key=self.key, new=True))
        self.likeness.append((region.path, cosine.name))
        self.limits.append((region.path, str(limit.target)))
        self._open = region, open_

    def _around(self, region: Region, site: Site, source: fx.Node, down: fx.Node, first: fx.Node, known: fx.Node) -> fx.Node:
        """The FFN on the open rows alone. Returns what it gives in all rows."""
        places = self._formula(region, first, _places, x=source)
        if self.program.skeleton is not None:
            places = self._own(insert(first, noted.op, value=places, key=PLACES))
        open_ = self._formula(region, first, partial(_or_warm, warm=self.warm), known=known, places=places)
        taken = self._own(insert(first, take_rows.op, x=source, open=open_))
        for role in ("up", "gate"):
            if role in site.roles:
                node = region.node(site.roles[role])
                node.kwargs = {**node.kwargs, "input": taken}
        back = self._own(insert(down.next, put_rows.op, y=down, open=open_))
        down.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)
        return back

    def _known(self, region: Region, first: fx.Node, source: fx.Node) -> fx.Node:
        """Which rows the blocks before left open."""
        assert self._open is not None
        if self._open[0] is region:
            return self._open[1]
        every = self._formula(region, first, lambda x: torch.ones_like(x[..., :1]), x=source)
        return self._own(insert(first, noted.op, value=every, key=self.key))

    def _told(self, region: Region, first: fx.Node, source: fx.Node, key: str) -> fx.Node:
        """The stream before the block, NaN where nobody tells it: then no row is closed."""
        unknown = self._formula(region, first, lambda x: torch.full_like(x, float("nan")), x=source)
        return self._own(insert(first, noted.op, value=unknown, key=key))

    def _formula(self, region: Region, before: fx.Node, function: Any, **inputs: fx.Node) -> fx.Node:
        return insert_formula(region, before, function, inputs, self.by)

    def _own(self, node: fx.Node) -> fx.Node:
        node.meta["by"] = self.by
        return node


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.float(), y.float()
    product: Tensor = (x * y).sum(-1, keepdim=True)
    return product / (x.square().sum(-1, keepdim=True) * y.square().sum(-1, keepdim=True)).sqrt().clamp_min(1e-30)


def _still_open(cosine: Tensor, limit: Tensor, known: Tensor | None = None, *, dtype: torch.dtype) -> Tensor:
    """1 where the row was open and did not reach the limit; a NaN does not."""
    open_ = (~(cosine >= limit)).to(dtype)
    return open_ if known is None else open_ * known


def _or_warm(known: Tensor, places: Tensor, *, warm: int) -> Tensor:
    """Open, or among the first tokens of its text."""
    return torch.maximum(known, (places < warm).to(known.dtype))


def _places(x: Tensor) -> Tensor:
    """0, 1, 2, ... along the tokens: float32 [..., tokens, 1]."""
    return torch.arange(x.shape[-2], dtype=torch.float32, device=x.device)[:, None].expand(*x.shape[:-1], 1)
