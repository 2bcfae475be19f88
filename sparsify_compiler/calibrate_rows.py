"""Rows of values inside the model, over all calibration batches, for passes that train something on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .calibrate_loss import Loss, differentiate, self_supervised
from .calibrate_run import call_on, recordable
from .call import instantiate
from .errors import CalibrationError
from .program import Program

Place = tuple[str, str]  # path of a region, name of a node


class Glance(nn.Module):
    """Hands a value on, and keeps it until it is taken: as a leaf of the gradient's graph, where there is to be one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            x = x.view_as(x) if x.requires_grad else (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        self.seen.append(x)
        return x

    def take(self) -> list[Tensor]:
        """What was seen since, one tensor a call."""
        seen, self.seen = self.seen, []
        return seen


def collect_rows(program: Program, batches: Iterable[Any], places: Sequence[Place], gradients: Sequence[Place] = (), loss: Loss = self_supervised
                 ) -> tuple[dict[Place, Tensor], dict[Place, Tensor]]:
    """(place -> its rows [rows, width], place -> the rows of the loss's gradient by it), float32, over all batches; the second for `gradients` only.

    Raises CalibrationError where a place is not reached or a value is not finite, InputError for a batch that is no call of the model.
    """
    watched = program.clone()
    every = list(dict.fromkeys([*places, *gradients]))
    glances = {place: _insert(watched, place, f"sparsify_glance_{i}") for i, place in enumerate(every)}
    for region in watched.regions.values():
        region.module.recompile()
    model = instantiate(watched)
    rows: dict[Place, list[Tensor]] = {place: [] for place in every}
    slopes: dict[Place, list[Tensor]] = {place: [] for place in gradients}
    for number, batch in enumerate(batches):
        with torch.inference_mode(False), torch.set_grad_enabled(bool(gradients)):
            output = call_on(model, recordable(batch), number)
            seen = {place: glance.take() for place, glance in glances.items()}
            flat = [(place, value) for place in gradients for value in seen[place]]
            found = differentiate(loss, output, batch, [value for _, value in flat]) if flat else []
        for place, values in seen.items():
            rows[place] += [_rows(value) for value in values]
        for (place, value), slope in zip(flat, found, strict=True):
            slopes[place].append(_rows(torch.zeros_like(value) if slope is None else slope))
    return _joined(rows), _joined(slopes)


def _insert(program: Program, place: Place, name: str) -> Glance:
    region, made = program.regions[place[0]], Glance()
    node = region.node(place[1])
    region.module.add_module(name, made)
    with region.graph.inserting_after(node):
        seen: fx.Node = region.graph.call_module(name, (node,))
    node.replace_all_uses_with(seen, delete_user_cb=lambda user: user is not seen)
    return made


def _rows(value: Tensor) -> Tensor:
    return value.detach().float().flatten(0, -2)


def _joined(rows: dict[Place, list[Tensor]]) -> dict[Place, Tensor]:
    found = {}
    for place, parts in rows.items():
        if not parts or not sum(part.shape[0] for part in parts):
            raise CalibrationError("no input reached this place", where="/".join(place), hint="give batches that use this part of the model")
        found[place] = torch.cat(parts)
        if not bool(found[place].isfinite().all()):
            raise CalibrationError("a value here is NaN or infinite on a calibration batch", where="/".join(place), hint="check the batches")
    return found
