"""An FFN of a graph as a thing to be divided: its weights, and where calibration looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler.calibrate_rows import Place, collect_rows
from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.fold import evaluate, is_constant, masks
from sparsify_compiler.passes.activation._units import in_groups
from sparsify_compiler.passes.lower._selected_ffn import activation_of_ffn
from sparsify_compiler.passes.moe._evidence import Evidence, Ffn
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region, Site

Parts = dict[str, tuple[fx.Node, slice]]  # role -> its linear, and which of its outputs are meant


@dataclass(frozen=True)
class Dense:
    """A dense FFN in its graph: what it reads and what down reads, and where its weights are."""

    region: Region
    site: Site
    activation: str
    parts: Parts

    @property
    def down(self) -> fx.Node:
        """The node that the whole ends at."""
        return self.region.node(self.site.roles["down"])

    @property
    def x(self) -> fx.Node:
        """What the FFN reads."""
        return self._input("up")

    @property
    def read(self) -> fx.Node:
        """What down reads."""
        return self._input("down")

    def _input(self, role: str) -> fx.Node:
        found = self.region.node(self.site.roles[role]).kwargs["input"]
        assert isinstance(found, fx.Node)
        return found

    @property
    def bytes_a_row(self) -> int:
        """Of what calibration keeps, without slopes."""
        return sum(4 * int(node.meta["val"].shape[-1]) for node in (self.x, self.read))

    @cached_property
    def ffn(self) -> Ffn:
        """The weights, in their own dtype. In an FFN without a gate, gate is the one projection."""
        found: dict[str, Tensor] = {}
        for role, (node, rows) in self.parts.items():
            found[role] = evaluate(self.region, node.kwargs["weight"])[rows]  # type: ignore[arg-type]
            if isinstance(bias := node.kwargs.get("bias"), fx.Node):
                found["bias" if role == "down" else f"{role}_bias"] = evaluate(self.region, bias)[rows]
        if "up" in found and "gate_bias" in found and "up_bias" not in found:
            found["up_bias"] = torch.zeros_like(found["gate_bias"])
        return Ffn(**found, activation=self.activation)

    def leaves(self) -> list[fx.Node]:
        """The parameters that the FFN is made of."""
        return [node for linear, _ in self.parts.values() for node in linear.all_input_nodes if node.op == "get_attr"]


def dense_of(region: Region, site: Site, by: str) -> Dense | str:
    """The site as an FFN that can be divided, or why it cannot be."""
    nodes = {role: region.node(site.roles[role]) for role in ("gate", "up", "down") if role in site.roles}
    if nodes["down"].meta.get("by") == by:
        return "it is a shared expert already"
    for node in nodes.values():
        weight, bias = node.kwargs["weight"], node.kwargs.get("bias")
        if not all(isinstance(one, fx.Node) and is_constant(one) for one in (weight, bias) if one is not None):
            return "its weights are not stored"
        if masks(region, weight):  # type: ignore[arg-type]
            return "its weights are masked: divide it first, and prune its experts"
    activation = activation_of_ffn(region, site)
    if not activation:
        return f"its activation is {site.facts['activation']}, or more than that"
    whole = slice(None)
    if not site.facts["gated"]:
        return Dense(region, site, activation, {"gate": (nodes["up"], whole), "down": (nodes["down"], whole)})
    if not site.facts["fused"]:
        return Dense(region, site, activation, {role: (node, whole) for role, node in nodes.items()})
    return _fused(region, site, activation, nodes)


def _fused(region: Region, site: Site, activation: str, nodes: dict[str, fx.Node]) -> Dense | str:
    """Gate and up are the halves of one linear: the activation says which half is the gate."""
    half: Any = region.node(site.roles["activation"]).kwargs["self"]
    width = int(site.facts["hidden"])
    if int(nodes["up"].meta["val"].shape[-1]) != 2 * width:
        return "gate and up are not the halves of their linear"
    first, second = slice(0, width), slice(width, 2 * width)
    gate, up = (first, second) if half.args[1] == 0 else (second, first)
    return Dense(region, site, activation, {"gate": (nodes["up"], gate), "up": (nodes["up"], up), "down": (nodes["down"], slice(None))})


def gather(program: Program, found: Sequence[Dense], statistics: frozenset[str], ctx: Context) -> Iterator[tuple[Dense, Evidence]]:
    """What calibration sees of each, a group that fits into memory at a time. Raises CalibrationError where rows are asked for and there are none."""
    if statistics and not ctx.batches and found:
        raise CalibrationError("experts are found on rows of calibration, and there are none", where=found[0].site.path,
                               hint="give calibration=batches")
    for group in in_groups(found, ctx.batches or ()) if statistics else [list(found)]:
        reads = [(one.region.path, one.read.name) for one in group]
        rows: dict[Place, Tensor] = {}
        slopes: dict[Place, Tensor] = {}
        if statistics:
            places = [*((one.region.path, one.x.name) for one in group), *reads]
            rows, slopes = collect_rows(program, ctx.batches or (), places, reads if "slopes" in statistics else ())
        for one, read in zip(group, reads, strict=True):
            ffn = one.ffn.float()
            empty = torch.zeros(0, ffn.gate.shape[1], dtype=torch.float32), torch.zeros(0, ffn.neurons, dtype=torch.float32)
            x, neurons = (rows[one.region.path, one.x.name], rows[read]) if rows else empty
            yield one, Evidence(ffn, x, neurons, slopes.get(read), ctx.seed, one.site.path)
