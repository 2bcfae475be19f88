"""What the passes on linears share: who else reads a weight, whether a vector lies along the features, and new constant arguments, all or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from sparsify_compiler.fakes import fake_of, mode_of
from sparsify_compiler.fold import Fold, constants, erase_dead, evaluate, is_mask_product, plan, store
from sparsify_compiler.normal_form import normalise
from sparsify_compiler.passes_api import Context, Miss
from sparsify_compiler.program import Region, get_tensor
from sparsify_compiler.rule import Match

aten = torch.ops.aten


def tied(region: Region, node: fx.Node | None, readers: Iterable[fx.Node]) -> Miss | None:
    """A Miss when a weight is read by others than `readers`: a changed copy of it would be a second parameter, no longer tied to the first."""
    if node is None or not isinstance(node, fx.Node):
        return None
    fixed, allowed = constants(region.graph), set(readers)
    names = {leaf.target for leaf in _sources(node) if leaf.op == "get_attr" and get_tensor(region.module, str(leaf.target)).is_floating_point()}
    waiting = [one for one in region.graph.nodes if one.op == "get_attr" and one.target in names]
    seen: set[fx.Node] = set()
    while waiting:
        for user in waiting.pop().users:
            if user in fixed and user not in seen:
                waiting.append(user)
            elif user not in fixed and user not in allowed:
                return Miss(f"{', '.join(sorted(map(str, names)))} is tied: {user.name} reads it too")
            seen.add(user)
    return None


def tied_in(m: Match, *names: str) -> Miss | None:
    """`tied` for arguments of a pattern."""
    for name in names:
        miss = tied(m.region, m.node(name), m.nodes)
        if miss is not None:
            return miss
    return None


def number(value: Any) -> bool:
    """True for an int or float."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def not_along(s: Any, dim: int, features: int, like: Tensor) -> Miss | None:
    """None when `s` gives each feature at `dim` (negative) of a tensor like `like` its own factor, or all the same one, and the shape stays."""
    if number(s):
        return None
    if not isinstance(s, Tensor):
        return Miss(f"the scale is {s!r}, no number and no vector")
    if s.dtype != like.dtype and (s.ndim > 0 or not s.is_floating_point()):
        return Miss(f"the scale is {s.dtype}, the product {like.dtype}")
    others = [size for i, size in enumerate(s.shape) if i != s.ndim + dim]
    own = s.shape[s.ndim + dim] if s.ndim + dim >= 0 else 1
    if s.ndim > like.ndim or any(size != 1 for size in others) or own not in (1, features):
        return Miss(f"the scale {tuple(s.shape)} does not lie along the {features} features")
    return None


def lengthened(s: Any, dim: int, tensor: Tensor) -> Any:
    """A number as it is; a vector of one, or of the features, shaped to multiply `tensor` along one of its dimensions."""
    if not isinstance(s, Tensor) or s.ndim == 0:
        return s
    return s.reshape([-1 if d == dim % tensor.ndim else 1 for d in range(tensor.ndim)])


def _sources(node: fx.Node) -> set[fx.Node]:
    found, waiting = {node}, [node]
    while waiting:
        new = [source for source in waiting.pop().all_input_nodes if source not in found]
        found.update(new)
        waiting += new
    return found


@dataclass
class Change:
    """New constant arguments for several nodes, which are stored together or not at all.

    region  where they are
    by      the pass that makes them
    """

    region: Region
    by: str
    created: list[fx.Node] = field(default_factory=list)
    changed: list[tuple[fx.Node, dict[str, Any], fx.Node]] = field(default_factory=list)  # node, its arguments as they were, the new constant

    def compute(self, before: fx.Node, formula: Callable[..., Tensor], *constants: fx.Node) -> fx.Node:
        """A formula of constants, in front of `before`; it runs on fake tensors here, and in float64 when it is stored."""
        mode = mode_of(self.region)
        fakes = [fake_of(self.region, node, mode) for node in constants]
        with torch.inference_mode(False), torch.no_grad(), mode:
            module = make_fx(formula, pre_dispatch=True)(*fakes)
        normalise(module)
        new = dict(zip([node for node in module.graph.nodes if node.op == "placeholder"], constants, strict=True))
        with before.graph.inserting_before(before):
            for node in module.graph.nodes:
                if node.op == "call_function":
                    new[node] = before.graph.node_copy(node, new.__getitem__)
                    kept = {key: before.meta[key] for key in ("path", "module") if key in before.meta}
                    new[node].meta = kept | {"by": self.by, "val": node.meta.get("val")}
                    self.created.append(new[node])
        result: fx.Node = new[next(node for node in reversed(module.graph.nodes) if node.op == "output").args[0]]
        return result

    def set(self, node: fx.Node, argument: str, value: fx.Node) -> None:
        """Let `node` take a new constant."""
        self.changed.append((node, dict(node.kwargs), value))
        names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        kwargs = {**node.kwargs, argument: value}
        node.kwargs = {name: kwargs[name] for name in names if name in kwargs}

    def swap(self, node: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Let `node` take one constant where it took another, in whatever argument."""
        self.changed.append((node, dict(node.kwargs), new))
        node.replace_input_with(old, new)

    def refuse(self) -> None:
        """Put everything back."""
        for node, kwargs, _ in reversed(self.changed):
            node.kwargs = kwargs
        erase_dead(reversed(self.created))

    def store(self, ctx: Context) -> Miss | None:
        """Compute and store the new values; a Miss, and nothing changed, when a mask would go. Counts as one rewrite."""
        folds: dict[fx.Node, Fold] = {}
        for node, _, value in self.changed:
            made = self._folds(value)
            if isinstance(made, Miss):
                self.refuse()
                return Miss(made.why, node.name)
            folds.update({item.node: item for item in made})
        ctx.spend()
        before = [source for _, kwargs, _ in self.changed for source in _nodes(kwargs)]
        for item in folds.values():
            store(self.region, item, self.by)
        erase_dead([*reversed(self.created), *before])
        return None

    def _folds(self, value: fx.Node) -> list[Fold] | Miss:
        if value not in self.created:
            return []
        if value.meta["val"].ndim < 2:  # a bias holds no mask, though a masked weight may have gone into it
            return [Fold(value, evaluate(self.region, value), None)]
        above = _sources(value)
        return plan(self.region, [node for node in self.created if node in above], value)


def _nodes(kwargs: dict[str, Any]) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(kwargs, found.append)
    return found


def fold_combined(region: Region, ctx: Context, by: str) -> None:
    """Store every weight that is computed from several parameters at run time, such as m * (W + B A) / norm(W + B A), as one."""
    fixed = constants(region.graph)
    for node in list(region.graph.nodes):
        for argument in ("weight", "bias"):
            value = node.kwargs.get(argument)
            if isinstance(value, fx.Node) and is_mask_product(region, value):  # what is computed inside of a mask
                value = next((one for one in value.all_input_nodes if one.op == "call_function"), None)
            if node in fixed or not isinstance(value, fx.Node) or value.op != "call_function" or value not in fixed:
                continue
            above = _sources(value)
            floats = [n for n in above if n.op == "get_attr" and get_tensor(region.module, str(n.target)).is_floating_point()]
            if len(floats) < 2 or (ctx.fuel is not None and ctx.rewrites >= ctx.fuel):
                continue
            folds = plan(region, [n for n in region.graph.nodes if n in above and n.op == "call_function"], value)
            if isinstance(folds, Miss):
                ctx.miss(folds.why, region.qualified(node.name))
                continue
            ctx.spend()
            for item in folds:
                store(region, item, by)
