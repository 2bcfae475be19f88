"""A transformer with LayerNorms as one with RMSNorms: the mean is taken out of all that is written to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.fold import is_constant
from sparsify_compiler.normal_form_edit import argument, aten, is_call, rank
from sparsify_compiler.passes.reparam._stream import Stream, centred, stream_of
from sparsify_compiler.passes.reparam._weights import Change, tied
from sparsify_compiler.passes_api import Context, Miss, Pass
from sparsify_compiler.pattern import op_name
from sparsify_compiler.program import Program, Region

_CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


@dataclass(frozen=True)
class LayernormToRmsnorm(Pass):
    """Turn every LayerNorm that reads a residual stream into an RMSNorm, by giving all that is written to that stream a mean of zero.

    Writers are linears, convs, embeddings and parameters such as position embeddings. After fold_norm_affine no norm has a shift, and the norms
    become plain RMSNorms; a shift that is there is added behind the norm.

    untie  change an embedding or weight that others read too, by giving the stream a copy of its own

    Matches    layer_norm(h, g, beta), h a sum of linear(x, w, b), embedding(i, e) and parameters p, whose mean nothing but layer_norms and sums reads
    Rewrites   rms_norm(h, g) + beta, and with M = I - 1 1' / D: linear(x, M w, M b), embedding(i, e M), p M
    Preserves  values, up to float reassociation
    Paper      Ashkboos et al., SliceGPT, arXiv:2401.15024, section 3.2
    """

    untie: bool = False

    def run(self, program: Program, ctx: Context) -> Program:
        for region in program.regions.values():
            norms = [node for node in region.graph.nodes if is_call(node, aten.layer_norm.default)]
            done: set[fx.Node] = set()
            ready: list[fx.Node] = []
            for norm in norms:
                if norm not in done and (ctx.fuel is None or ctx.rewrites < ctx.fuel):
                    stream = stream_of(norm)
                    done.update([norm, *stream.norms])
                    miss = self._convert(region, norm, stream, ctx)
                    if miss is not None:
                        ctx.miss(miss.why, region.qualified(miss.at or norm.name))
                    else:
                        ready += stream.norms
            for one in ready:  # last: one without affine is a writer of the next stream, and known to be centred
                _replace(region, one, self.name())
            if not norms:
                ctx.miss("there is no layer_norm in the graph", region.path)
        return program

    def _convert(self, region: Region, norm: fx.Node, stream: Stream, ctx: Context) -> Miss | None:
        if len(norm.kwargs["normalized_shape"]) != 1:  # type: ignore[arg-type]
            return Miss("it normalises over several dimensions, of which a linear mixes one")
        if stream.miss is not None:
            return stream.miss
        for node, dim in stream.writers.items():
            weight: Any = node.kwargs.get("weight")
            why = _no_writer(node, dim) or (None if self.untie or centred(node) else tied(region, weight, [node]))
            if why is not None:
                return Miss(why.why, node.name)
        change = Change(region, self.name())
        for node in stream.writers:
            _centre_writer(change, node)
        for user, leaf, dim in stream.leaves:
            why = None if self.untie else tied(region, leaf, {reader for reader, _, _ in stream.leaves})
            if why is not None:
                change.refuse()
                return why
            change.swap(user, leaf, _without_mean(change, user, leaf, dim))
        return change.store(ctx)


def _no_writer(node: fx.Node, dim: int) -> Miss | None:
    """None for a value whose mean over the features can be taken out of its weights."""
    name = f"{op_name(node)} ({node.name})" if node.op == "call_function" else f"the input {node.name}"
    if centred(node):
        return None
    if is_call(node, aten.layer_norm.default, aten.rms_norm.default):
        return Miss(f"{name} writes to the residual stream what others read, and its scale gives that a mean")
    if is_call(node, aten.mul.Tensor):
        return Miss(f"{name} scales what it writes to the residual stream: fold_scale first")
    if not is_call(node, aten.linear.default, aten.embedding.default, *_CONVS):
        return Miss(f"{name} writes to the residual stream, and has no weight to take the mean out of")
    if not is_constant(node.kwargs["weight"]) or (isinstance(node.kwargs.get("bias"), fx.Node) and not is_constant(node.kwargs["bias"])):
        return Miss(f"the weight of {name} is no parameter")
    if is_call(node, *_CONVS) and argument(node, "groups") != 1:
        return Miss(f"{name} has groups, and the mean is over all of them")
    at = (rank(node) or 0) - rank(node.kwargs["weight"]) + 1 if is_call(node, *_CONVS) else (rank(node) or 0) - 1  # type: ignore[operator]
    return None if dim == at else Miss(f"{name} gives its features in another dimension")


def _centre_writer(change: Change, node: fx.Node) -> None:
    """M w and M b, or e M for an embedding, whose rows are what it writes."""
    if centred(node):
        return
    over = 1 if is_call(node, aten.embedding.default) else 0
    change.set(node, "weight", _without_mean(change, node, node.kwargs["weight"], over))
    if isinstance(node.kwargs.get("bias"), fx.Node):
        change.set(node, "bias", _without_mean(change, node, node.kwargs["bias"], 0))


def _without_mean(change: Change, before: fx.Node, tensor: Any, over: int) -> fx.Node:
    return change.compute(before, lambda t: t - t.mean(over, keepdim=True), tensor)


def _replace(region: Region, norm: fx.Node, by: str) -> None:
    """rms_norm(h, g) + beta in the place of a layer_norm whose input has mean 0."""
    kwargs: dict[str, Any] = {k: norm.kwargs[k] for k in ("input", "normalized_shape", "weight") if k in norm.kwargs}
    with region.graph.inserting_before(norm):
        new = region.graph.create_node("call_function", aten.rms_norm.default, (), {**kwargs, "eps": argument(norm, "eps")}, name="rms_norm")
        new.meta = {**norm.meta, "by": by}
        if "bias" in norm.kwargs:
            new = region.graph.create_node("call_function", aten.add.Tensor, (), {"self": new, "other": norm.kwargs["bias"]}, name="add")
            new.meta = {**norm.meta, "by": by}
    norm.replace_all_uses_with(new)
    region.graph.erase_node(norm)


class _Transformer(nn.Module):
    """As small as a pre-norm language model gets: tokens and positions, one FFN around which the stream goes, a last norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8), nn.Parameter(torch.randn(1, 5, 8))
        self.norm, self.last = nn.LayerNorm(8), nn.LayerNorm(8, elementwise_affine=False)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 11, bias=False)
        for vector in (self.norm.weight, self.norm.bias):
            nn.init.uniform_(vector, 0.5, 1.5)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tokens(ids) + self.positions
        h = h + self.down(nn.functional.gelu(self.up(self.norm(h))))
        y: Tensor = self.head(self.last(h))
        return y


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A language model of one block, without attention."""
    torch.manual_seed(0)
    return _Transformer().eval(), (torch.randint(0, 11, (2, 5)),)
