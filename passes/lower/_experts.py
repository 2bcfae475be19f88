"""Mixtures of experts: the kernel that reads the chosen experts only, or torch's grouped product, whichever is measured to be faster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler.measure import Timing
from sparsify_compiler.operands import input_of, is_stored, operands
from sparsify_compiler.ops import experts_ffn
from sparsify_compiler.passes.lower._dense_ffn import add_dense, size_of, whole
from sparsify_compiler.passes.lower._layer import DECODE, Form, noise, row_of, say
from sparsify_compiler.passes.lower._linear import Linear, eager
from sparsify_compiler.passes.lower._origin import Origin, around, linears_of, origin_of, restore
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region

__all__ = ["choose", "is_packed", "layer", "make_dense", "size_of"]

EAGER = "one by one"  # an expert after the other, each by torch's own linears


@dataclass(eq=False)
class Mixture(Linear):
    """One mixture.

    many    number of rows that it is measured with besides, 0 where it is always called with the same
    origin  the dense FFN that it was made of: all forms are then timed with router and shared expert, beside that FFN's own, named in `whole`
    """

    many: int = 0
    origin: Origin | None = None
    whole: tuple[str, ...] = ()

    def compared(self, name: str) -> list[tuple[Callable[[], object], Callable[[], object]]]:
        return [(self.runs[one], self.runs[first]) for one, first in ((name, EAGER), (_many(name), _many(EAGER))) if one in self.runs]

    def drop(self, name: str) -> None:
        super().drop(name)
        self.runs.pop(_many(name), None)


def is_packed(node: fx.Node) -> bool:
    """A mixture that has no kernel yet, and whose experts are stored."""
    return node.target is experts_ffn.op and "kernel" not in node.meta and all(is_stored(node.kwargs[name]) for name in ("gate", "down"))


def layer(region: Region, node: fx.Node, program: Program, ctx: Context) -> Mixture:
    """The mixture at a node, its kernels built and ready to run: at one row and at the example's where their number varies."""
    assert ctx.kernels is not None
    assert ctx.target is not None
    tensors, attributes, bias = operands(region, node)
    x = noise(region, input_of(node), ctx)
    x = x.reshape(-1, x.shape[-1])
    varies = any(not isinstance(size, int) for size in node.meta["val"].shape)
    row = row_of(region, node, "experts", tensors["gate"], program)
    given = _routed(node, tensors["gate"].shape[0], x.shape[0], ctx)
    chosen, experts = given[0].shape[-1], tensors["gate"].shape[0]
    made = Mixture(region, node, row, tensors["gate"], bias, packed=True, rows=DECODE if varies else x.shape[0], many=x.shape[0] if varies else 0)
    row.dense_bytes = row.bytes = size_of(region, node)
    if row.structure == "dense":  # the model's own
        row.structure, row.density = f"{chosen} of {experts} experts", chosen / max(experts, 1)
    row.format = "experts"
    plain = partial(_plain, {**tensors, **attributes, **({} if bias is None else {"bias": bias})})
    made.origin = origin_of(region, node, ctx)
    for name, kernel in {EAGER: None, **_kernels(made, tensors, attributes, bias, x, ctx)}.items():
        function = plain if kernel is None else kernel
        if made.origin is None:
            _add(made, name, kernel, function, x, given)
        else:
            _add(made, name, kernel, around(region, node, made.origin.end, function), x.reshape(*[1] * (node.meta["val"].dim() - 2), *x.shape), [])
    if made.origin is not None:
        _add_origin(made, made.origin, x, ctx)
    return made


def _add_origin(made: Mixture, origin: Origin, x: Tensor, ctx: Context) -> None:
    """The dense FFN in its forms."""
    before, linears = set(made.forms), linears_of(origin)
    add_dense(made, linears, origin.dense.activation, x[: made.rows], ctx)
    made.whole = tuple(name for name in made.forms if name not in before)
    for name in made.whole if made.many else ():
        made.runs[_many(name)] = partial(whole, {part: partial(eager, *pair) for part, pair in linears.items()}, origin.dense.activation, x)


def _kernels(made: Mixture, tensors: dict[str, Tensor], attributes: dict[str, Any], bias: Tensor | None, x: Tensor, ctx: Context) -> dict[str, Any]:
    found = ctx.kernels.candidates("experts_ffn", tensors, attributes, x.dtype, (made.rows,), ctx.target)  # type: ignore[union-attr, arg-type]
    return {candidate.name: candidate.bind(bias) for candidate in found}


def _add(made: Mixture, name: str, kernel: Any, function: Any, x: Tensor, given: list[Tensor]) -> None:
    """A form at both numbers of rows: what is timed with many of them has a name of its own."""
    form = Form(kernel is None or not hasattr(kernel, "target"), kernel)
    made.forms[name], made.runs[name] = form, partial(function, x[..., : made.rows, :], *[tensor[: made.rows] for tensor in given])
    if made.many:
        made.runs[_many(name)] = partial(function, x, *given)


def _many(name: str) -> str:
    return f"{name}, many rows"


def _plain(fixed: dict[str, Any], x: Tensor, chosen: Tensor, weights: Tensor | None = None) -> Tensor:
    y: Tensor = experts_ffn.op(x, chosen, weights, fixed["gate"], fixed.get("up"), fixed["down"], fixed.get("gate_bias"), fixed.get("up_bias"),
                               fixed.get("bias"), activation=fixed["activation"])
    return y


def _routed(node: fx.Node, experts: int, rows: int, ctx: Context) -> list[Tensor]:
    """Different experts for every row, as chance has it, and weights where the node has some."""
    like = node.kwargs["chosen"].meta["val"]  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(ctx.seed)
    scores = torch.rand(rows, experts, generator=generator, dtype=torch.float32)
    chosen = scores.topk(min(int(like.shape[-1]), experts), -1).indices.to(like.dtype)
    weights = node.kwargs.get("weights")
    return [chosen] if weights is None else [chosen, torch.rand(chosen.shape, generator=generator, dtype=torch.float32).to(weights.meta["val"].dtype)]  # type: ignore[union-attr]


def choose(made: Mixture, timings: Mapping[str, Timing], margin: float) -> bool:
    """Bind the form whose worse time, at one row or at many, is the nearest to the fastest there; what was measured is written down.

    False where the dense FFN that the mixture was made of is as fast as all of them, at one row or at many.
    """
    times = {name: timing.median for name, timing in timings.items()}
    kinds = [lambda name: name, _many] if made.many else [lambda name: name]

    def loss(name: str) -> float:
        return max(times[kind(name)] / min(times[kind(one)] for one in made.forms) for kind in kinds)

    def pays(name: str) -> bool:
        return all(times[kind(name)] <= (1 - margin) * min(times[kind(one)] for one in made.whole) for kind in kinds if made.whole)

    dense = [name for name, form in made.forms.items() if form.dense]
    ours = next((name for name, form in made.forms.items() if not form.dense), None)
    divided = [name for name in made.forms if name not in made.whole]
    best = ours if ours is not None and margin < 0 else min([name for name in divided if pays(name)] or made.whole, key=loss)
    row, rival = made.decision, min(made.whole or dense, key=times.__getitem__)
    row.rows, row.dense_form, row.dense_ms, row.compiled_ms, row.kernel = made.rows, rival, times[rival], times[best], best
    row.sparse_ms = None if ours is None else times[ours]
    split = min(divided, key=loss) if best in made.whole else best
    more = f", {min(times[_many(name)] for name in made.whole or dense) / times[_many(split)]:.2f} times at {made.many} rows" if made.many else ""
    gain = f"{times[rival] / times[split]:.2f} times the speed of {rival} at {made.rows} row{'s' if made.rows != 1 else ''}{more}"
    if best in made.whole:
        row.format, row.density, row.bytes = "dense", 1.0, row.dense_bytes
        say(row, f"stays dense: with router and shared expert {gain}")
        return False
    say(row, gain)
    made.bind(best)
    return True


def make_dense(made: Mixture) -> list[fx.Node]:
    """The FFN that the mixture was made of, in its place. Returns its linears."""
    assert made.origin is not None
    return restore(made.region, made.origin, input_of(made.node))
