"""Turn masked weights into storage formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from sparsify_compiler import catalog
from sparsify_compiler.decision import Decision
from sparsify_compiler.errors import ParseError
from sparsify_compiler.normal_form_edit import take_place
from sparsify_compiler.operands import geometry_of, input_of, operator_of, packed_form, packed_operator, packed_weight
from sparsify_compiler.passes.lower import _predicted, _scored, _selected, _selected_ffn
from sparsify_compiler.passes.prune.structures._base import ANY_MASK, Structure
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Region, Stage, get_tensor
from sparsify_compiler.stored import read_stored
from sparsify_compiler.training import KNOWN, META

aten = torch.ops.aten
# Weights that a format may store beside those of the mask, as zeros, as a share of them. A mask made from the zeros of a trained weight has a hole
# wherever a kept value is 0 by chance: of 16 million normal numbers one or two are.
HOLES = 0.01
# Tried on a mask whose structure nobody wrote down, before the formats that need no numbers: kernels gain more from a structure than bits save.
COMMON = ("2:4", "1:4", "4:8", "2:8", "32x32", "16x16", "32x1", "16x1", "8x1", "4x1")


@dataclass(frozen=True)
class Pack(Pass):
    """Store each masked weight in the smallest format that its mask fits, and compute with that format's op.

    Matches    linear(x, weight * mask, bias) and conv2d(x, weight * mask, bias, ...), mask a buffer of bool, or of zeros and ones as
               torch.nn.utils.prune makes them; linear(select(x, ...), weight, bias), with scores and without; and
               linear(select(act(linear(x, gate)), ...) * linear(x, up), down), where scores are given also without up
    Rewrites   sparsify.linear_<format>(x, <format tensors>, bias) and sparsify.conv2d_<format>(x, <format tensors>, bias, ...), the convolution's
               weight [O, I / groups, kh, kw] stored as [O, I / groups * kh * kw]; any other use of weight * mask gets the product as a dense weight.
               sparsify.select_linear(x, ..., weight, bias), its weight stored input by input, sparsify.select_ffn(x, ..., gate, up, down), and
               sparsify.predicted_ffn(x, scores, ..., gate, down, up)
    Preserves  values exactly, and the mask: where it lacks a few weights of 2:4, of blocks or of a constant fan-in, those are stored too, as zeros
    Paper      none: storage; each format names its own source
    """

    preserves: ClassVar[Preserves] = Preserves.VALUES
    until_stage: ClassVar[Stage] = Stage.PACKED
    gives_stage: ClassVar[Stage | None] = Stage.PACKED

    def run(self, program: Program, ctx: Context) -> Program:
        _tell_of_packed(program)
        found = [product for region, node in program.nodes() if (product := _masked(region, node)) is not None]
        for done, product in enumerate(found):
            if not ctx.spend():
                break
            self._pack(product, program, ctx)
            ctx.progress("pack", done + 1, len(found))
        for region, node in program.nodes():
            if _selected.is_selecting(node) and ctx.spend():
                _selected.pack(region, node, program, self.name())
            elif (ffn := _selected_ffn.find(node)) is not None and ctx.spend():
                _selected_ffn.pack(region, node, ffn, program, self.name())
            elif (predicted := _predicted.find(node)) is not None and ctx.spend():
                _predicted.pack(region, node, predicted, program, self.name())
            elif _scored.is_scored(node) and ctx.spend():
                _scored.pack(region, node, program, self.name())
        return program

    def _pack(self, product: _Masked, program: Program, ctx: Context) -> None:
        """Replace every use of one weight * mask."""
        rows = {user: _row(user, product, program) for user in product.node.users}
        layers = [user for user in rows if _is_weight_of(user, product.node)]
        if layers:
            form = smallest(product.weight.flatten(1), product.mask.flatten(1), rows[layers[0]].structure, 0.0 if ctx.trains else HOLES)
            stored = _store(product, form)
            for user in layers:
                _replace(product, user, stored, form, product.weight.shape[2:])
                rows[user].format, rows[user].bytes = form.name(), form.bytes() if user is layers[0] else 0
        if len(layers) < len(rows):
            _fold(product)
        for user in [user for user in rows if user not in layers]:
            rows[user].bytes = rows[user].dense_bytes
            rows[user].reason = "stays dense: only linear layers and two-dimensional convolutions are packed; the mask is folded into the weight"
            ctx.miss(f"{user.target} is not packed; its mask is folded into the weight", rows[user].site)


def _tell_of_packed(program: Program) -> None:
    """A decision for each weight that came packed, as training on its kept places leaves it."""
    for region, node in program.nodes():
        if operator := packed_operator(node):
            site = str(node.meta.get("site") or node.meta.get("path") or region.qualified(node.name)).removesuffix(".weight_packed")
            node.meta["site"] = site
            if site not in program.decisions:
                form, weight = packed_form(region, node), packed_weight(region, node)
                row = Decision.of(site, "linear" if operator == "linear" else "conv", weight)
                density = form.places().numel() / max(1, weight.numel())
                program.decisions[site] = replace(row, structure="unknown", density=density, format=form.name(), bytes=form.bytes())


@dataclass(frozen=True)
class _Masked:
    """One weight * mask of a graph. `name` is the weight's."""

    region: Region
    node: fx.Node
    name: str
    weight: Tensor
    mask: Tensor


def smallest(weight: Tensor, mask: Tensor, structure: str, holes: float = HOLES) -> Any:
    """The weight [N, K] in the format with the fewest bytes, among those that suit its structure (text) and fit its mask or one with fewer holes.

    holes   so many zeros may be kept besides, as a share of the kept weights
    """
    most = int(int(mask.sum()) * (1 + holes))
    for suited in _suited(structure):
        made = []
        for name, attributes in suited:
            kind = catalog.get("format", name)
            whole = mask if kind.fits(weight, mask, **attributes) is None else kind.widened(mask, most, **attributes)
            if whole is not None:
                made.append(kind.encode(weight if whole is mask else weight.detach().masked_fill(~mask, 0), whole, **attributes))
        if made:
            break
    return min(made, key=lambda form: form.bytes())


def _suited(structure: str) -> tuple[tuple[tuple[str, Mapping[str, int]], ...], ...]:
    """Formats with their attributes: those of the structure, then what holds the mask when it is not what its structure says."""
    try:
        return Structure.parse(structure).formats(), ANY_MASK
    except ParseError:
        common = tuple(pair for text in COMMON for pair in Structure.parse(text).formats())
        return common, (("condensed", {}), *ANY_MASK)


def _store(product: _Masked, form: Any) -> dict[str, fx.Node]:
    """Put the format's tensors beside the weight, as <weight>_packed.<tensor>; a get_attr for each."""
    return {name: _read(product, f"{product.name}_packed.{name}", tensor) for name, tensor in form.tensors().items()}


def _replace(product: _Masked, layer: fx.Node, stored: Mapping[str, fx.Node], form: Any, kernel_size: Sequence[int]) -> None:
    """Compute a linear or convolution with the format's op instead. Who acts on the product in training acts on that."""
    graph, op = product.region.graph, catalog.get("op", f"{operator_of(layer)}_{form.name()}").op
    bias = {"bias": layer.kwargs["bias"]} if layer.kwargs.get("bias") is not None else {}
    geometry = {"kernel_size": list(kernel_size), **geometry_of(layer, len(kernel_size))} if kernel_size else {}
    with graph.inserting_before(layer):
        packed = graph.call_function(op, (), {"x": layer.kwargs["input"], **stored, **bias, **form.attributes(), **geometry})
    take_place(layer, packed, "pack")
    packed.meta |= {key: product.node.meta[key] for key in (META, KNOWN) if key in product.node.meta}


def _fold(product: _Masked) -> None:
    """Store weight * mask, zeros where the mask says so, and read it in place of the product."""
    dense = product.weight.detach().masked_fill(~product.mask, 0)
    stored = nn.Parameter(dense, requires_grad=False) if isinstance(product.weight, nn.Parameter) else dense
    product.node.replace_all_uses_with(_read(product, f"{product.name}_masked", stored))


def _read(product: _Masked, name: str, tensor: Tensor) -> fx.Node:
    """Store a tensor in the region; the get_attr of it, before the product."""
    node = read_stored(product.region, product.node, name, "pack", tensor)
    node.meta |= {key: product.node.meta[key] for key in ("path", "module") if key in product.node.meta}
    return node


def _masked(region: Region, node: fx.Node) -> _Masked | None:
    """The parts of weight * mask, both stored and of one shape; None for any other node."""
    if node.target is not aten.mul.Tensor:
        return None
    sources = [node.kwargs.get("self"), node.kwargs.get("other")]
    stored = [(str(s.target), get_tensor(region.module, str(s.target))) for s in sources if isinstance(s, fx.Node) and s.op == "get_attr"]
    for (name, weight), (_, mask) in zip(stored, reversed(stored), strict=True):
        if len(stored) == 2 and mask.shape == weight.shape and weight.is_floating_point() and _is_mask(mask):
            return _Masked(region, node, name, weight, mask.bool())
    return None


def _is_mask(tensor: Tensor) -> bool:
    """A bool buffer, or one of zeros and ones (torch.nn.utils.prune)."""
    return tensor.dtype == torch.bool or (not isinstance(tensor, nn.Parameter) and bool(((tensor == 0) | (tensor == 1)).all()))


def _is_weight_of(user: fx.Node, product: fx.Node) -> bool:
    """True when the product is the weight of this linear, or convolution over a batch of images, and nothing else of it."""
    only = [name for name, value in user.kwargs.items() if value is product] == ["weight"]
    dimensions = 2 if user.target is aten.linear.default else 4 if user.target is aten.conv2d.default else 0
    return only and product.meta["val"].dim() == dimensions and (dimensions == 2 or input_of(user).meta["val"].dim() == 4)


def _row(user: fx.Node, product: _Masked, program: Program) -> Decision:
    """The decision of the site that the node belongs to; a new one for a mask that no pass of ours made."""
    site = str(user.meta.get("site") or user.meta.get("path") or product.region.qualified(user.name))
    user.meta["site"] = site
    kind = "linear" if user.target is aten.linear.default else "conv"
    weight = product.weight
    made = Decision(site, kind, tuple(weight.shape), str(weight.dtype).removeprefix("torch."), "unknown", float(product.mask.double().mean()),
                    dense_bytes=weight.numel() * weight.element_size())
    return program.decisions.setdefault(site, made)


class _Example(nn.Module):
    """A linear layer with a mask of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 16))
        self.register_buffer("weight_mask", torch.arange(16).expand(32, 16) % 4 < 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = self.weight_mask
        assert isinstance(mask, Tensor)
        return nn.functional.linear(x, self.weight * mask)


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """One masked linear layer."""
    torch.manual_seed(0)
    return _Example().eval(), (torch.randn(2, 16),)
