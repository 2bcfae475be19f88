"""Give each FFN another activation, one with exact zeros; the model is fine-tuned afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.fold import erase_dead, evaluate, is_constant, put
from sparsify_compiler.named import Named
from sparsify_compiler.normal_form_edit import only_user
from sparsify_compiler.passes.activation.functions._base import Activation
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Region, Site
from sparsify_compiler.site_ffn import neurons_of
from sparsify_compiler.splice import insert_formula

KIND = ("ffn",)
META = "activation"  # in a node's metadata: what was written here


@dataclass(frozen=True)
class ReplaceActivation(Pass):
    """Replace the activation of each FFN with another, ReLU and its kin, whose zeros are exact and whose neurons need not be computed.

    Matches    linear(act(linear(x, up)), down) and linear(act(linear(x, gate)) * linear(x, up), down); a square, a selection, a scale and an offset
               behind act belong to it
    Rewrites   the same with `to` in the place of act. The numbers of `to` are stored once an FFN, as parameters where they are learned
    Preserves  signature; quality is measured, and comes back with training
    Paper      ReLU Strikes Back, Mirzadeh et al., arXiv:2310.04564

    to       a file of passes/activation/functions, with options of its own in parentheses: "relu", "relu2", "drelu", "shifted_relu(shift=1.0)",
             "fatrelu(threshold=0.01)", "thresholded_silu(threshold=0.1)", "star_relu"
    targets  selectors of FFN sites; all by default
    ignore   selectors of FFN sites that keep their activation

    An activation on the up projection of a gated FFN goes, where `to` has none. What comes of it is plain PyTorch that trains: sc.attach().
    """

    to: str = "relu"
    targets: tuple[str, ...] = KIND
    ignore: tuple[str, ...] = ()

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE

    def __post_init__(self) -> None:
        Named.parse("activation", self.to)()
        self.take_selectors("targets", "ignore")

    def run(self, program: Program, ctx: Context) -> Program:
        given: Activation = Named.parse("activation", self.to)()
        for site in self.ffns(program, ctx):
            write = _Write(program.regions[site.region], site, given, self.to, self.name())
            why = write.unfit()
            if why is not None:
                ctx.miss(why, site.path)
            elif ctx.spend():
                write.run()
        return program


class _Write:
    """One FFN's activation. `value` is its last node, `source` what it is computed of; of the up projection, `up` and `raised` the same."""

    def __init__(self, region: Region, site: Site, to: Activation, label: str, by: str) -> None:
        self.region, self.site, self.to, self.label, self.by = region, site, to, label, by
        self.value = neurons_of(region, site)
        self.first = region.node(site.roles["activation"])
        self.linear = region.node(site.roles["gate" if site.facts["gated"] else "up"])
        second = site.roles.get("up_activation")
        self.second = None if second is None else region.node(second)

    def unfit(self) -> str | None:
        if self.value.meta.get(META) == self.label:
            return f"its activation is {self.label} already"
        if not self.to.shift:
            return None
        if self.site.facts["fused"]:
            return "gate and up are one linear, whose bias cannot be shifted for the gate alone"
        bias: Any = self.linear.kwargs.get("bias")
        return None if bias is None or is_constant(bias) else "the bias of its projection is no stored tensor"

    def run(self) -> None:
        source: Any = self.first.kwargs["self"]
        if self.to.shift:
            self._shift()
        numbers = {name: self._stored(self.value, torch.tensor(number, dtype=torch.float32), name) for name, number in self.to.numbers.items()}
        new = insert_formula(self.region, self.value, self.to.formula, {"x": source, **numbers}, self.by)
        self._take_over(self.value, new)
        new.meta[META] = self.label
        if self.site.facts["gated"]:
            self._raise(new)

    def _shift(self) -> None:
        """bias -= shift; -shift itself where there was none."""
        bias: Any = self.linear.kwargs.get("bias")
        value = self.linear.meta["val"]
        if bias is None:
            moved = torch.full((int(value.shape[-1]),), -self.to.shift, dtype=value.dtype)
            stored = self._stored(self.linear, moved, "bias")
        else:
            stored = put(self.region, self.linear, evaluate(self.region, bias) - self.to.shift, "bias", _leaves(bias), self.linear.meta, self.by)
        self.linear.kwargs = {**self.linear.kwargs, "bias": stored}

    def _stored(self, before: fx.Node, value: Tensor, name: str) -> fx.Node:
        """A number of the activation; where it is learned, it trains if the projection's weight does."""
        like = _leaves(self.linear.kwargs["weight"]) if self.to.learned else []
        return put(self.region, before, value, name, like, self.linear.meta, self.by)

    def _raise(self, gate: fx.Node) -> None:
        """The activation of up: the one that `to` names, or none."""
        product: Any = only_user(gate)
        up = product.kwargs["other"] if product.kwargs["self"] is gate else product.kwargs["self"]
        source: Any = up if self.second is None else self.second.kwargs["self"]
        if not self.to.up:
            if self.second is not None:
                self._take_over(up, source)
            return
        given: Activation = Named.parse("activation", self.to.up)()
        new = insert_formula(self.region, product, given.formula, {"x": source}, self.by)
        product.replace_input_with(up, new)
        erase_dead([up] if self.second is not None else [])

    def _take_over(self, old: fx.Node, new: fx.Node) -> None:
        old.replace_all_uses_with(new)
        erase_dead([old])


def _leaves(node: Any) -> list[fx.Node]:
    """The stored tensors that a constant is made of."""
    return [node] if node.op == "get_attr" else [leaf for source in node.all_input_nodes for leaf in _leaves(source)]


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A gated FFN."""
    from sparsify_compiler.passes.activation.select_neurons import GatedFfn

    torch.manual_seed(0)
    return GatedFfn(16, 32).eval(), (torch.randn(6, 16),)
