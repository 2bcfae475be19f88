"""How a graph's values are read as maps: where the channels are, which places they have, and what is constant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler.fold import constants, evaluate
from sparsify_compiler.passes.reparam._affine import Affine
from sparsify_compiler.program import Region

Known = Mapping[fx.Node, Affine]  # value -> its map from the source


@dataclass(frozen=True)
class Space:
    """One region read in one layout."""

    region: Region
    channels_last: bool
    fixed: frozenset[fx.Node] = frozenset()  # values that depend on parameters alone
    memo: dict[fx.Node, Any] = field(default_factory=dict)

    @staticmethod
    def of(region: Region, channels_last: bool) -> Space:
        return Space(region, channels_last, frozenset(constants(region.graph)))

    def dim(self, value: Tensor) -> int:
        """The dimension of the channels."""
        return value.dim() - 1 if self.channels_last else 1

    def places(self, node: fx.Node) -> tuple[int | None, ...]:
        """Sizes of the spatial dimensions, None where dynamic."""
        shape = () if self.channels_last else node.meta["val"].shape[2:]
        return tuple(size if isinstance(size, int) else None for size in shape)

    def fits(self, node: Any) -> bool:
        """Is this a value that has channels in this layout?"""
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        return (isinstance(value, Tensor) and value.is_floating_point() and (3 if self.channels_last else 2) <= value.dim() <= 5
                and isinstance(value.shape[self.dim(value)], int) and node not in self.fixed)

    def constant(self, node: Any) -> Tensor | None:
        """The float64 value of a parameter or of what is computed from parameters; None for another node."""
        if not isinstance(node, fx.Node):
            return torch.tensor(float(node), dtype=torch.float64) if isinstance(node, int | float) and not isinstance(node, bool) else None
        if node not in self.fixed:
            return None
        if node not in self.memo:
            self.memo[node] = evaluate(self.region, node).double()
        found: Tensor = self.memo[node]
        return found

    def needed(self, node: fx.Node) -> Tensor:
        """The float64 value of a node that is known to be constant."""
        found = self.constant(node)
        assert found is not None
        return found

    def per_channel(self, node: Any, value: Tensor) -> Tensor | None:
        """A constant that multiplies `value` channel by channel, as float64 [channels]; None where it is none."""
        given, dim = self.constant(node), self.dim(value)
        if given is None or given.dim() > value.dim():
            return None
        full = given.reshape([1] * (value.dim() - given.dim()) + list(given.shape))
        if any(size != 1 for d, size in enumerate(full.shape) if d != dim):
            return None
        return full.reshape(-1).expand(value.shape[dim]).clone()

    def added(self, node: Any, value: Tensor) -> Tensor | None:
        """A constant that is added to `value`, as a shift: [channels], or [channels, *places]."""
        flat = self.per_channel(node, value)
        given = self.constant(node)
        if flat is not None or given is None or self.channels_last or given.dim() > value.dim():
            return flat
        if not all(isinstance(size, int) for size in value.shape[1:]):
            return None
        full = given.reshape([1] * (value.dim() - given.dim()) + list(given.shape))
        return full[0].expand(value.shape[1:]).clone() if full.shape[0] == 1 else None

    def tolerance(self, node: fx.Node) -> float:
        """By how much two computations of one shift may differ."""
        return 8 * torch.finfo(node.meta["val"].dtype).eps


def named(node: fx.Node) -> Mapping[str, Any]:
    """A node's arguments by name."""
    return node.kwargs
