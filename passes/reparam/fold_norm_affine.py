"""The scale and shift of a norm go into all the projections that read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.fold import erase_dead, is_constant
from sparsify_compiler.normal_form_edit import Call, argument, aten, is_call, rank, same_shape, shape
from sparsify_compiler.passes.reparam._features import follow
from sparsify_compiler.passes.reparam._weights import Change, tied
from sparsify_compiler.passes_api import Context, Miss, Pass
from sparsify_compiler.pattern import op_name
from sparsify_compiler.program import Program, Region

_NORMS = (aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default)
_ROOTS = (aten.rsqrt.default, aten.sqrt.default, aten.reciprocal.default, aten.pow.Tensor_Scalar)
_CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


@dataclass(frozen=True)
class FoldNormAffine(Pass):
    """Fold gamma and beta of a LayerNorm, RMSNorm or GroupNorm into every linear or conv that reads it; the norm is left without them.

    untie  fold into a weight that others read too, such as a head tied to the embedding, by giving it a copy of its own

    Matches    z = norm(x, g, beta), where everything that reads z, or a reshape, transpose or slice of z that leaves its features whole, is a
               linear(z, w, b) over the features of a layer_norm or rms_norm, or a conv over the channels of a group_norm (unpadded, if there is beta)
    Rewrites   norm(x), and for each reader linear(z, w * g, b + w beta)
    Preserves  values, up to float reassociation
    Paper      Ashkboos et al., SliceGPT, arXiv:2401.15024, section 3.2
    """

    untie: bool = False

    def run(self, program: Program, ctx: Context) -> Program:
        for region in program.regions.values():
            norms = [(node, found) for node in region.graph.nodes if (found := _affine(node)) is not None]
            for norm, (g, beta) in norms:
                if ctx.fuel is None or ctx.rewrites < ctx.fuel:
                    miss = self._fold(region, norm, g, beta, ctx)
                    if miss is not None:
                        ctx.miss(miss.why, region.qualified(miss.at or norm.name))
            if not norms:
                ctx.miss("there is no norm with a weight or bias", region.path)
        return program

    def _fold(self, region: Region, norm: fx.Node, g: Any, beta: Any, ctx: Context) -> Miss | None:
        readers = _readers(norm)
        if isinstance(readers, Miss):
            return readers
        for reader in readers:
            why = _unfit(reader, g, beta) or (None if self.untie else tied(region, reader.kwargs["weight"], [reader]))
            if why is not None:
                return why
        change = Change(region, self.name())
        for reader in readers:
            _take(change, reader, g, beta)
        miss = change.store(ctx)
        if miss is None:
            if is_call(norm, aten.mul.Tensor):
                norm.replace_all_uses_with(_other(norm, g))
                region.graph.erase_node(norm)
            else:
                norm.kwargs = {k: v for k, v in norm.kwargs.items() if k not in ("weight", "bias")}
                norm.meta["by"] = self.name()
            erase_dead([vector for vector in (g, beta) if isinstance(vector, fx.Node) and not vector._erased])
        return miss


def _affine(node: fx.Node) -> tuple[Any, Any] | None:
    """Scale and shift of a norm that has one; the scale behind a norm, as Llama has it in a narrow dtype: rms_norm(x).to(dtype) * g."""
    if is_call(node, *_NORMS):
        return (node.kwargs.get("weight"), node.kwargs.get("bias")) if {"weight", "bias"} & node.kwargs.keys() else None
    if not is_call(node, aten.mul.Tensor):
        return None
    for g in (node.kwargs["self"], node.kwargs["other"]):
        if isinstance(g, fx.Node) and is_constant(g) and rank(g) == 1 and same_shape(shape(g), (shape(node) or (0,))[-1:]):
            scaled = _other(node, g)
            inner = scaled.kwargs["self"] if is_call(scaled, aten.to.dtype) else scaled
            roots = inner.kwargs.values() if is_call(inner, aten.mul.Tensor, aten.div.Tensor) else ()
            normed = is_call(inner, *_NORMS[:2]) or any(is_call(root, *_ROOTS) for root in roots)
            if normed and same_shape(shape(scaled), shape(node)):
                return (g, None) if scaled.meta["val"].dtype == node.meta["val"].dtype else None
    return None


def _other(product: Call, factor: fx.Node) -> Any:
    return product.kwargs["other"] if product.kwargs["self"] is factor else product.kwargs["self"]


def _readers(norm: fx.Node) -> Sequence[Call] | Miss:
    """The projections that read a norm's features."""
    dims = rank(norm) or 0
    if is_call(norm, aten.layer_norm.default, aten.rms_norm.default) and len(norm.kwargs["normalized_shape"]) != 1:
        return Miss(f"it normalises over {len(norm.kwargs['normalized_shape'])} dimensions, of which a linear mixes one")
    found: list[Call] = []
    waiting: list[tuple[fx.Node, int]] = [(norm, 1 if is_call(norm, aten.group_norm.default) else dims - 1)]
    while waiting:
        node, dim = waiting.pop()
        for user in node.users:
            moved = None if is_call(user, aten.cat.default) else follow(user, node, dim)
            if _mixes(user, node, dim):
                found.append(user)
            elif moved is not None:
                waiting.append((user, moved))
            elif op_name(user) != "sym_size":
                return Miss(f"{op_name(user)} ({user.name}) reads it too" if user.op == "call_function" else "the output reads it too")
    return list(dict.fromkeys(found)) or Miss("nothing reads it")


def _mixes(user: fx.Node, node: fx.Node, dim: int) -> TypeGuard[Call]:
    """Whether a linear or conv with a constant weight takes these features as its inputs."""
    if not is_call(user, aten.linear.default, *_CONVS) or user.kwargs["input"] is not node or not is_constant(user.kwargs["weight"]):
        return False
    if is_call(user, aten.linear.default):
        return dim == (rank(node) or 0) - 1
    return rank(node) == rank(user.kwargs["weight"]) and dim == 1


def _unfit(reader: Call, g: Any, beta: Any) -> Miss | None:
    kinds = {node.meta["val"].dtype for node in (g, beta, reader.kwargs["weight"]) if isinstance(node, fx.Node)}
    if len(kinds) > 1:
        return Miss(f"the norm and the weight of {reader.name} have different dtypes: {', '.join(sorted(map(str, kinds)))}")
    padding = argument(reader, "padding") if is_call(reader, *_CONVS) else 0
    if beta is not None and padding not in (0, [0] * len(padding) if isinstance(padding, list) else 0):
        return Miss(f"{reader.name} pads by {padding} after the norm: beta would reach its border")
    return Miss(f"the bias of {reader.name} is no parameter") if "bias" in reader.kwargs and not is_constant(reader.kwargs["bias"]) else None


def _take(change: Change, reader: Call, g: Any, beta: Any) -> None:
    """w * g and b + w beta for one reader, whose weight is [out, in / groups, ...]."""
    w, b = reader.kwargs["weight"], reader.kwargs.get("bias")
    groups = argument(reader, "groups") if is_call(reader, *_CONVS) else 1

    def each(v: Tensor, weight: Tensor) -> Tensor:  # [in] -> what every output's own group of inputs has
        out, taken = weight.shape[:2]
        rows = v.reshape(groups, 1, taken).expand(groups, out // groups, taken)
        return rows.reshape([out, taken, *[1] * (weight.ndim - 2)])

    def shift(weight: Tensor, v: Tensor) -> Tensor:
        return (weight * each(v, weight)).flatten(1).sum(1)

    if beta is not None:
        bias = change.compute(reader, shift, w, beta) if b is None else change.compute(reader, lambda o, v, c: c + shift(o, v), w, beta, b)
        change.set(reader, "bias", bias)
    if g is not None:
        change.set(reader, "weight", change.compute(reader, lambda o, v: o * each(v, o), w, g))


class _Block(nn.Module):
    """Two norms of a transformer: one that three projections read, one that one does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-6)
        self.q, self.k, self.v, self.up = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8), nn.Linear(8, 12)
        for vector in (self.first.weight, self.first.bias, self.second.weight):
            nn.init.uniform_(vector, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        x = x + nn.functional.scaled_dot_product_attention(self.q(z), self.k(z), self.v(z))
        y: Tensor = self.up(self.second(x)[:, 0])
        return y


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A LayerNorm before an attention, and an RMSNorm of which one token is read."""
    torch.manual_seed(0)
    return _Block().eval(), (torch.randn(2, 5, 8),)
