"""Experts written into a graph: router, selector, weights and a shared expert as plain nodes around one op."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import linear

from sparsify_compiler.fold import erase_dead
from sparsify_compiler.normal_form_edit import aten, insert
from sparsify_compiler.ops import experts_ffn
from sparsify_compiler.passes.moe._evidence import Ffn, Formula
from sparsify_compiler.passes.moe._free import Free, given_by, with_residual
from sparsify_compiler.passes.moe._placed import Placed
from sparsify_compiler.passes.moe._sites import Dense
from sparsify_compiler.passes.moe._split import Split

SCORES = "scores of experts"  # in the metadata of a router's last node
SHARED = "experts share it"  # in the metadata of the node that an FFN ends at
LOOPS = "loops"  # true in the metadata of an op whose one expert is a whole FFN, which a row runs through again or not: no router is about it
CHOICE = "choice of experts"  # in the metadata of the choice that an op reads: the name of the one with experts that no kernel sees


@dataclass(frozen=True)
class Routing:
    """What decides which experts a row runs through: formulas of x; of the scores; and of the scores and the choice, None for weights of 1.

    free      experts that cost nothing, in the choice beside the others
    residual  let scores depend on those of the mixture before, where there is one of as many experts
    given     what else the router reads
    """

    router: Formula
    select: Formula
    weight: Formula | None
    free: Free | None = None
    residual: bool = False
    given: fx.Node | None = None


def write(dense: Dense, split: Split, routing: Routing, by: str) -> fx.Node:
    """Put the split FFN in the place of the dense one. Returns the op's node."""
    return _Writer(dense, dense.down, dense.site.path.partition("@")[0], by).run(split, routing)


def write_shared(dense: Dense, routing: Routing, made: Formula, by: str) -> fx.Node:
    """Let a formula of what the FFN gives, of a choice and its weights stand for what it gives. Returns the last node."""
    down, readers = dense.down, list(dense.down.users)
    writer = _Writer(dense, down.next, dense.site.path.partition("@")[0], by)
    scores = writer.scores(routing, {})
    chosen = writer.formula("router", routing.select, {"scores": scores}, {})
    scores.meta[SCORES] = True
    assert routing.weight is not None
    weights = writer.formula("router", routing.weight, {"scores": scores, "chosen": chosen}, {})
    new = writer.formula("experts", made, {"y": down, "chosen": chosen, "weights": weights}, {})
    for reader in readers:
        reader.replace_input_with(down, new)
    down.meta[SHARED] = True
    return new


def is_shared(down: fx.Node) -> bool:
    """Do experts change what the FFN that ends here gives?"""
    return bool(down.meta.get(SHARED))


@dataclass(frozen=True)
class _Writer:
    dense: Dense
    before: fx.Node
    path: str
    by: str

    def run(self, split: Split, routing: Routing) -> fx.Node:
        own = {name: self._stored("experts", name, value) for name, value in {**split.own, "down": split.down}.items()}
        x = self.dense.x
        scores = self.scores(routing, own)
        choice = chosen = self.formula("router", routing.select, {"scores": scores}, {})
        scores.meta[SCORES] = True
        if routing.free is not None:
            chosen = self.formula("router", routing.free.kept(), {"chosen": choice}, {})
        given: dict[str, Any] = {"x": x, "chosen": chosen, "weights": None, "up": None, **own}
        if routing.weight is not None:
            given["weights"] = self.formula("router", routing.weight, {"scores": scores, "chosen": chosen}, {})
        if routing.free is not None:
            given["chosen"] = self.formula("router", routing.free.routed(), {"chosen": chosen}, {})
            given["chosen"].meta[CHOICE] = choice.name
        if split.bias is not None:
            given["bias"] = self._stored("experts", "bias", split.bias)
        op = insert(self.before, experts_ffn.op, **given, activation=self.dense.activation)
        op.meta |= {"by": self.by, "path": self._at("experts"), "site": self.dense.site.path}
        self._replace(self._free(self._beside(op, split), routing.free, chosen, given["weights"]))
        return op

    def scores(self, routing: Routing, own: Mapping[str, fx.Node]) -> fx.Node:
        before = self._before() if routing.residual else None
        scores = self.formula("router", routing.router, {"x": self.dense.x} | ({} if routing.given is None else {"given": routing.given}), own)
        if routing.free is not None:
            scores = self.formula("router", routing.free.columns, {"scores": scores, "x": self.dense.x}, {})
        if before is not None and str(before.meta["val"].shape) == str(scores.meta["val"].shape):  # of dynamic sizes: of the same name
            experts = int(scores.meta["val"].shape[-1])
            zeros = torch.zeros(experts, experts, dtype=torch.float32)
            scores = self.formula("router", Formula({"residual": zeros}, with_residual), {"scores": scores, "before": before}, {})
        return scores

    def _before(self) -> fx.Node | None:
        """The scores of the mixture before, in the order of execution."""
        node = self.before
        while node.prev.op != "root":
            node = node.prev
            if node.meta.get(SCORES):
                return node
        return None

    def _free(self, total: fx.Node, free: Free | None, chosen: fx.Node, weights: fx.Node | None) -> fx.Node:
        """What experts that no kernel sees give, added."""
        for at, made in enumerate(free.outputs if free is not None else ()):
            if free is not None and made is not None:
                y = self.formula(f"free.{at}", made, {"x": self.dense.x}, {})
                known = {"y": y, "chosen": chosen} | ({} if weights is None else {"weights": weights})
                other = self.formula(f"free.{at}", Formula({}, partial(given_by, expert=free.experts + at)), known, {})
                total = insert(self.before, aten.add.Tensor, total.meta["val"], self=total, other=other)
                total.meta |= {"by": self.by, "path": self._at("")}
        return total

    def _beside(self, op: fx.Node, split: Split) -> fx.Node:
        """What is computed for every row, added to the op."""
        if split.always.numel():
            tensors = dict(split.shared) | ({} if split.base is None else {"bias": split.base})
            other = self.formula("shared", Formula(tensors, partial(_dense, activation=self.dense.activation)), {"x": self.dense.x}, {})
        elif split.base is not None:
            other = self._stored("experts", "base", split.base)
        else:
            return op
        total = insert(self.before, aten.add.Tensor, op.meta["val"], self=op, other=other)
        total.meta |= {"by": self.by, "path": self._at("")}
        return total

    def _replace(self, new: fx.Node) -> None:
        self.before.replace_all_uses_with(new)
        erase_dead([self.before])

    def _at(self, part: str) -> str:
        return self._placed.at(part)

    def _stored(self, part: str, name: str, value: Tensor) -> fx.Node:
        return self._placed.stored(part, name, value)

    def formula(self, part: str, formula: Formula, inputs: Mapping[str, fx.Node], experts: Mapping[str, fx.Node]) -> fx.Node:
        return self._placed.formula(part, formula, inputs, experts)

    @property
    def _placed(self) -> Placed:
        return Placed(self.dense.region, self.before, self.path, tuple(self.dense.leaves()), self.dense.x.meta["val"].dtype, self.by)


def _dense(x: Tensor, gate: Tensor, down: Tensor, up: Tensor | None = None, gate_bias: Tensor | None = None, up_bias: Tensor | None = None,
           bias: Tensor | None = None, *, activation: str) -> Tensor:
    """The shared expert: an ordinary FFN."""
    found: Tensor = linear(Ffn(gate, down, activation, up, gate_bias, up_bias).hidden(x), down, bias)
    return found
