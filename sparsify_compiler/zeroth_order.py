"""Training by forward passes alone: no gradient, no activation is kept, and of the chosen places one bit each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .training import Hook

BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


class ZerothOrder(torch.optim.Optimizer):
    """An optimizer that measures how the loss changes along random directions, in the weights of small magnitude.

        optimizer = sc.ZerothOrder(module.parameters(), rate=1e-4, share=0.25)
        for batch in batches:
            optimizer.step(lambda: task_loss(module(**batch)))        # two forward passes; schedulers and hook.step(optimizer) work as ever

    A step draws z of normal numbers for the chosen places of every parameter, measures the loss at w + scale z and at w - scale z, and sets
    w -= rate * (difference / 2 scale) * z. z is drawn anew from a seed each time it is needed; which places are chosen is kept for a step,
    as bits: 1/32 of float32 weights. (MeZO, arXiv:2305.17333; the small weights alone: Sparse MeZO, arXiv:2402.15751.)

    rate     the learning rate; in param_groups as "lr"
    scale    of the perturbation
    share    of each matrix's weights that is chosen: those below the threshold which that share of the weights lies under at the start. 1: all.
             Parameters of one dimension train as a whole
    hook     that of attach(): of masked weights the kept ones are chosen from, and move; the share is of those
    seed     of the directions: a run that is resumed by state_dict() draws those that it would have drawn

    Parameters that do not require gradients stay as they are, to the bit. Others come back from a measurement as exactly as adding and taking away a
    number does, as in the authors' code of MeZO.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], rate: float = 1e-4, scale: float = 1e-3, share: float = 0.25,
                 hook: Hook | None = None, seed: int = 0) -> None:
        if not (rate >= 0 and scale > 0 and 0 < share <= 1):
            raise InputError(f"rate is 0 or more, scale above 0, share above 0 and at most 1: got {rate}, {scale}, {share}", where="ZerothOrder")
        chosen = [one for one in parameters if one.requires_grad]
        if not chosen:
            raise InputError("no parameter of these is to train", where="ZerothOrder", hint="call requires_grad_() on those that are")
        self._hook = hook
        super().__init__(chosen, {"lr": float(rate), "scale": float(scale), "share": float(share), "seed": seed, "steps": 0})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any optimizer, with "lr", "scale" and "share" of its own; which weights are small is settled now.

        Raises InputError for numbers that the constructor would refuse.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if not (group["lr"] >= 0 and group["scale"] > 0 and 0 < group["share"] <= 1):
            self.param_groups.pop()
            raise InputError(f"lr is 0 or more, scale above 0, share above 0 and at most 1: got {group['lr']}, {group['scale']}, {group['share']}",
                             where="ZerothOrder.add_param_group")
        for parameter in group["params"]:
            if group["share"] < 1 and parameter.dim() > 1 and parameter.requires_grad:
                mask = self._mask(parameter)
                self.state[parameter]["threshold"] = _threshold(parameter.detach() if mask is None else parameter.detach()[mask], group["share"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> float:  # type: ignore[override]
        """The mean of the two losses. The closure computes the loss of one batch, the same at both calls, and no backward pass.

        Raises InputError where there is no closure, or a loss is not finite. Weights are then, and where the closure raises, those before the
        step, as exactly as they come back from a measurement. Processes that train one model have to return one loss, the mean of theirs.
        """
        if closure is None:
            raise InputError("the loss has to be measured", where="ZerothOrder.step", hint="optimizer.step(lambda: loss(module(batch)))")
        places = {parameter: self._places(parameter) for parameter, _ in self._each()}
        losses, at = [], 0
        try:
            for to in (1, -1):
                self._move(places, "scale", to - at)
                at = to
                torch.clear_autocast_cache()  # where the user's autocast is around the step, it holds copies of the weights before they moved
                losses.append(float(closure()))
        finally:
            self._move(places, "scale", -at)
        if not all(loss - loss == 0 for loss in losses):
            raise InputError(f"the loss is not finite: {losses}", where="ZerothOrder.step", hint="lower scale or rate, or look at the batch")
        for group in self.param_groups:
            group["slope"] = (losses[0] - losses[1]) / (2 * group["scale"]) * group["lr"]
        self._move(places, "slope", -1)
        torch.clear_autocast_cache()
        for group in self.param_groups:
            del group["slope"]
            group["steps"] += 1
        return sum(losses) / 2

    def _each(self) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    yield parameter, group

    def _mask(self, parameter: nn.Parameter) -> Tensor | None:
        return None if self._hook is None else self._hook.mask_of(parameter)

    def _places(self, parameter: nn.Parameter) -> Tensor | None:
        """Which places are chosen, eight in a byte; None for all."""
        threshold, mask = self.state[parameter].get("threshold"), self._mask(parameter)
        small = None if threshold is None else parameter.abs() <= threshold.to(parameter)
        both = [one for one in (small, mask) if one is not None]
        return _packed(both[0] if len(both) == 1 else both[0] & both[1]) if both else None

    def _move(self, places: dict[nn.Parameter, Tensor | None], name: str, by: int) -> None:
        """w += by * (what the group has under the name) * z at the chosen places, one parameter after the other."""
        for number, (parameter, group) in enumerate(self._each()):
            seed = (group["seed"] * 1_000_003 + group["steps"]) * 1_000_033 + number
            generator = torch.Generator(parameter.device).manual_seed(seed % 2**63)
            change = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype, device=parameter.device).mul_(by * group[name])
            chosen = places[parameter]
            if chosen is not None:
                change.masked_fill_(~_unpacked(chosen, parameter.shape), 0)
            parameter.add_(change)


def _threshold(weight: Tensor, share: float) -> Tensor:
    """float32 []: of the magnitudes, as many as the share lie at or below it."""
    magnitudes = weight.float().abs().flatten()
    if not magnitudes.numel():
        return weight.new_zeros((), dtype=torch.float32)
    return magnitudes.kthvalue(max(1, min(magnitudes.numel(), round(share * magnitudes.numel())))).values


def _packed(mask: Tensor) -> Tensor:
    """uint8 [numel / 8]."""
    flat = mask.flatten()
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).view(-1, 8)
    return (padded * BITS.to(mask.device)).sum(1, dtype=torch.uint8)


def _unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    """bool of the shape."""
    return (bits[:, None] & BITS.to(bits.device)).ne(0).flatten()[: shape.numel()].view(shape)
