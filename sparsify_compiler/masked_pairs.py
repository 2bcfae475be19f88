"""How inputs and outputs of a layer go together in training: their correlation, of all rows of the forward passes of a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from .errors import InputError
from .masked import plain
from .normal_form_edit import aten
from .program import Region


class Pairs(nn.Module):
    """Stands in a graph behind a linear layer, and adds up over the forward passes since take() what its correlation is made of.

    wanted  add up; without gradients, as in an evaluation, nothing is
    """

    _is_impure = True  # so that fx does not drop it as dead code

    def __init__(self) -> None:
        super().__init__()
        self.wanted = False
        self._sums: tuple[Tensor, ...] | None = None

    def forward(self, x: Tensor, y: Tensor) -> None:
        if not self.wanted or not plain(x) or not torch.is_grad_enabled():
            return
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            rows, outs = x.reshape(-1, x.shape[-1]).double(), y.reshape(-1, y.shape[-1]).double()
            found = (rows.new_tensor([len(rows)]), rows.sum(0), outs.sum(0), rows.square().sum(0), outs.square().sum(0), outs.T @ rows)
            self._sums = found if self._sums is None else tuple(a + b for a, b in zip(self._sums, found, strict=True))

    def take(self) -> tuple[Tensor, ...] | None:
        """float64: the number of rows, sums of x, y, x² and y², and of the products [out, in]; None where no row came. It starts again at none."""
        found, self._sums = self._sums, None
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sums": None}


def correlation(sums: tuple[Tensor, ...]) -> Tensor:
    """float32 [out, in], between -1 and 1, of what Pairs.take() gave; 0 where an input or an output does not vary."""
    count, x, y, xx, yy, xy = sums
    (spread_x, varies_x), (spread_y, varies_y) = (_spread(total / count, squares / count) for total, squares in ((x, xx), (y, yy)))
    both = xy / count - (y / count)[:, None] * (x / count)[None]
    spread, varies = spread_y[:, None] * spread_x[None], varies_y[:, None] & varies_x[None]
    return (torch.where(varies, both / spread.masked_fill(~varies, 1), 0).clamp(-1, 1) + 0 * xy).float()


def _spread(mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """The standard deviation, and does it vary at all? Not by less than a millionth, which is rounding."""
    variance = square - mean.square()
    return variance.clamp_min(0).sqrt(), variance > 1e-12 * square


def tap_pairs(region: Region, name: str, product: fx.Node) -> tuple[Pairs, ...]:
    """Put a Pairs behind each linear layer that reads a product weight * mask. Raises InputError for a convolution."""
    made: list[Pairs] = []
    for op in [user for user in product.users if user.kwargs.get("weight") is product]:
        if op.target is not aten.linear.default:
            raise InputError("inputs and outputs are correlated of linear layers alone", where=str(op.meta.get("path", op.name)),
                             hint="name the layer in ignore=, or let it grow by 'gradient'")
        made.append(Pairs())
        region.module.add_module(f"{name}_pairs_{len(made)}", made[-1])
        with region.graph.inserting_after(op):
            region.graph.call_module(f"{name}_pairs_{len(made)}", (op.kwargs["input"], op))
    return tuple(made)
