"""What stands in a graph while calibration runs: modules that look at a value on its way and add up its statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .errors import CalibrationError
from .statistic import STATISTICS


class Tap(nn.Module):
    """Takes a value on its way through the graph and adds it up."""

    _is_impure = True  # so that fx does not drop it as dead code

    def __init__(self, site: str, names: Sequence[str], channel: int) -> None:
        super().__init__()
        self.site, self.channel, self.names = site, channel, tuple(names)
        self.sums: dict[str, Tensor] = {}
        self.rows = 0

    def forward(self, *values: Tensor) -> None:
        """Add the rows of the values. Raises CalibrationError where one is not finite."""
        self.add(*[self._rows(value) for value in values])

    def _rows(self, x: Tensor, what: str = "input") -> Tensor:
        rows = x.detach().movedim(self.channel, -1)
        rows = rows.reshape(-1, rows.shape[-1])
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if not bool(rows.sum(dtype=torch.float64).isfinite()):
            raise CalibrationError(f"the {what} of this site is NaN or infinite on a calibration batch", where=self.site,
                                   hint="check the batches, and that the model runs in a dtype that holds its activations")
        return rows

    def add(self, *rows: Tensor) -> None:
        """Add rows [rows, width], as many sets of them as the statistics take."""
        for name in self.names:
            if name not in self.sums:
                self.sums[name] = STATISTICS[name].start(rows[0].shape[-1])
            STATISTICS[name].add(self.sums[name], *rows)
        self.rows += rows[0].shape[0]

    def results(self) -> dict[str, Tensor]:
        """The statistics; none when no row came by."""
        return {name: STATISTICS[name].finish(total, self.rows) for name, total in self.sums.items()} if self.rows else {}


class GradientTap(Tap):
    """Stands between a weight and its op, and adds up the gradient of the loss by the weight."""

    def __init__(self, site: str, names: Sequence[str], shape: tuple[int, ...]) -> None:
        super().__init__(site, names, -1)
        self.shape = shape
        self.seen: list[Tensor] = []  # one leaf a call of this batch

    def forward(self, weight: Tensor) -> Tensor:  # type: ignore[override]
        """The same weight, as a leaf of its own."""
        leaf = (weight.clone() if weight.is_inference() else weight.detach()).requires_grad_()
        self.seen.append(leaf)
        return leaf

    def take(self, gradients: Sequence[Tensor | None]) -> None:
        """Add one batch's gradients. Raises CalibrationError where they are not finite."""
        known = [gradient.detach().float() for gradient in gradients if gradient is not None]
        seen, self.seen = self.seen, []
        if not known:
            return
        total = sum(known[1:], known[0]).reshape(-1)
        weight = seen[0].detach().reshape(-1).float()
        if not bool(total.isfinite().all()):
            raise CalibrationError("the gradient of this weight is NaN or infinite on a calibration batch", where=self.site,
                                   hint="check the loss, and that the model runs in a dtype that holds its gradients")
        self.add(total, weight)

    def results(self) -> dict[str, Tensor]:
        """The statistics, in the weight's shape; none when no gradient came by."""
        return {name: value.view(self.shape) for name, value in super().results().items()}


class InputGradientTap(GradientTap):
    """Stands between an op and what it reads, or what it gives and its readers, and adds up the gradient of the loss by that."""

    def __init__(self, site: str, names: Sequence[str], channel: int) -> None:
        super().__init__(site, names, ())
        self.channel = channel

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """The same value, under a name of its own: other ops that read it do not count."""
        read = x.view_as(x) if x.requires_grad else (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        self.seen.append(read)
        return read

    def take(self, gradients: Sequence[Tensor | None]) -> None:
        """Add one batch's gradients. Raises CalibrationError where they are not finite."""
        self.seen = []
        for gradient in gradients:
            if gradient is not None:
                self.add(self._rows(gradient, "gradient by the input or output"))

    def results(self) -> dict[str, Tensor]:
        """The statistics; none when no gradient came by."""
        return Tap.results(self)
