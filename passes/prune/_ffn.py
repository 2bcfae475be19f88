"""FFNs whose projections can be cut together, and what they compute on rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sparsify_compiler.passes.prune._layers import Layer, LeftDense, find_layers
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region, get_tensor
from sparsify_compiler.selectors import select
from sparsify_compiler.sites import find_sites


@dataclass(frozen=True)
class Ffn:
    """up, gate where there is one, and down, each a weight of its own; between them ops that act number by number."""

    region: Region
    makers: tuple[Layer, ...]  # up, and gate
    down: Layer
    between: tuple[fx.Node, ...]  # from the makers' outputs to down's input, in the order of execution

    @property
    def up(self) -> Layer:
        return self.makers[0]

    def bias(self, layer: Layer) -> Tensor:
        """[out], or zero."""
        source = layer.uses[0].op.kwargs.get("bias")
        if not isinstance(source, fx.Node):
            return torch.zeros((), dtype=torch.promote_types(layer.weight.dtype, torch.float32))
        bias = get_tensor(self.region.module, str(source.target)).detach()
        return bias.to(torch.promote_types(bias.dtype, torch.float32))

    def of(self, layer: Layer, x: Tensor) -> Tensor:
        """The dense layer's output on rows x."""
        return x @ layer.weight.detach().to(x).T + self.bias(layer)

    def hidden(self, *made: Tensor) -> Tensor:
        """[rows, hidden], from the makers' outputs."""
        values: dict[fx.Node, Tensor] = {layer.uses[0].op: value for layer, value in zip(self.makers, made, strict=True)}
        for node in self.between:
            args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), lambda v: values[v] if isinstance(v, fx.Node) else v)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return values[self.between[-1]]

    def slopes(self, made: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """(hidden, its derivative by each maker's output), number by number."""
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [value.detach().clone().requires_grad_() for value in made]
            hidden = self.hidden(*leaves)
            return hidden.detach(), list(torch.autograd.grad(hidden.sum(), leaves))


def find(program: Program, targets: Iterable[str], ctx: Context) -> tuple[list[Ffn], list[LeftDense]]:
    """FFNs in the order of execution, and the layers of others, which stay dense. Raises SelectorError for a selector that matches nothing."""
    sites = find_sites(program, ("ffn",))
    layers, left = find_layers(program, ("ffn",), ()) if sites else ([], [])
    of = {(use.region.path, use.op.name): layer for layer in layers for use in layer.uses}
    found: list[Ffn] = []
    for site in select(sites, tuple(targets), (), program) if sites else []:
        region = program.regions[site.region]
        makers = [of.get((site.region, site.roles[role])) for role in ("up", "gate") if role in site.roles]
        down = of.get((site.region, site.roles["down"]))
        known = [layer for layer in (*makers, down) if layer is not None]
        why = _unfit(known, len(makers) + 1, site.facts.get("fused", False))
        between = _between(known) if why is None else None
        if why is None and between is None:
            why = "what lies between its projections does not act number by number on them alone"
        if why is not None:
            ctx.miss(why, site.path)
            left += [LeftDense(use, why) for layer in known for use in layer.uses]
        elif bool(torch.stack([layer.weight.detach().any() for layer in known]).all()):
            found.append(Ffn(region, tuple(known[:-1]), known[-1], tuple(between or ())))
        else:
            left += [LeftDense(use, "every weight of one of its projections is zero") for layer in known for use in layer.uses]
    return found, left


def _unfit(layers: list[Layer], wanted: int, fused: bool) -> str | None:
    if fused:
        return "its gate and up are one layer"
    if len(layers) < wanted:
        return "one of its projections cannot be cut"
    return "one of its weights is used more than once" if any(len(layer.uses) > 1 for layer in layers) else None


def _between(layers: list[Layer]) -> list[fx.Node] | None:
    """The nodes from the makers to down, or None where something else is read on the way."""
    makers = {layer.uses[0].op for layer in layers[:-1]}
    start = layers[-1].uses[0].op.kwargs["input"]
    above: set[fx.Node] = set()
    waiting = [start]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node) or node in makers or node in above:
            continue
        if node.op != "call_function":
            return None
        above.add(node)
        waiting += node.all_input_nodes
    return [node for node in layers[0].uses[0].region.graph.nodes if node in above] or None
