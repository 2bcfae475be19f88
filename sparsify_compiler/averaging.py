"""The average of several trained models of the same connectivity: as sparse as each of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .packed import Packed
from .pipeline import Pipeline
from .quality import measure
from .training import Hook
from .training_attach import Inputs, attach


def average(models: Sequence[nn.Module], shares: Sequence[float] | None = None) -> nn.Module:
    """A model of the kind of the first whose parameters are the mean of all, computed in float64; the models are not modified.

    shares  of each model, positive and finite; they are brought to the sum 1. Equal by default

    Masks, the places of packed values and all else that is not a float must be the same in all, and so must the zeros of weights without a mask:
    otherwise the mean would keep more than each of them (Sparse Model Soups, arXiv:2306.16788). Float buffers are averaged as well; single counts,
    such as a batch norm's of its batches, are the first's.

    Raises InputError that names the first layer where the models differ.
    """
    if not models or (shares is not None and (len(shares) != len(models) or not all(0 < share < math.inf for share in shares))):
        raise InputError(f"needs models, and a positive share for each: {len(models)} models, shares {shares}", where="average")
    states = [model.state_dict() for model in models]
    names = list(states[0])
    for number, state in enumerate(states[1:], 1):
        _same(states[0], state, number)
    total = float(sum(shares)) if shares is not None else float(len(models))
    weights = [share / total for share in (shares or [1.0] * len(models))]
    mean = {}
    for name in names:
        each = [state[name] for state in states]
        if each[0].is_floating_point():
            if each[0].dim() > 1 and not _has_mask(states[0], name):
                _same_zeros(each, name)
            mean[name] = torch.stack([one.double() * weight for one, weight in zip(each, weights, strict=True)]).sum(0)
    _same_ties(states[0], mean)
    made = copy.deepcopy(models[0])
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            if name in mean:
                tensor.copy_(mean[name])
    return made


def soup(models: Sequence[nn.Module], metric: Callable[[nn.Module], float]) -> nn.Module:
    """The average of those models that make it better: from the best on, one after the other, each stays where the metric does not fall.

    metric  higher is better, as for recover(); on data that is not that of the final test

    Model soups, arXiv:2203.05482 (the greedy one). Raises InputError as average() does, and for a metric that is not finite.
    """
    if not models:
        raise InputError("needs models", where="soup")
    scores = [_measured(metric, model) for model in models]
    order = sorted(range(len(models)), key=lambda i: -scores[i])
    chosen, best = [models[order[0]]], scores[order[0]]
    for i in order[1:]:
        score = _measured(metric, average([*chosen, models[i]]))
        if score >= best:
            chosen, best = [*chosen, models[i]], score
    return average(chosen)


def averaged_cycles(model: nn.Module, example_inputs: Inputs, recipes: Sequence[str | Pipeline], train: Callable[[nn.Module, Hook, int], None], *,
                    particles: int = 3, metric: Callable[[nn.Module], float] | None = None, rewind: Mapping[str, Tensor] | None = None,
                    calibration: Any = None, dynamic: Any = None, seed: int = 0) -> tuple[nn.Module, Hook]:
    """Prune, train several copies, average them, and prune the average: (the last average as a module that trains on, its hook).

        masks = [sc.recipes.magnitude(density=d) for d in (0.5, 0.25, 0.1)]
        module, hook = sc.averaged_cycles(model, batches[0], masks, train)      # train(module, hook, particle): your loop

    recipes    one a cycle, which mask; a cycle's masks are those that its recipe makes of the average before it, zeros and all
    train      trains a module in place, with another order of batches or other settings for each particle: 0, 1, ... (they start the same)
    metric     average those that make it better alone (soup()); by default all
    rewind     a state_dict of the model: particles start with its weights under the masks, as lottery tickets do (SWAMP, arXiv:2305.14852);
               by default they go on with the average (Sparse Model Soups, arXiv:2306.16788)
    calibration, dynamic, seed  as in attach()

    Recipes may not move masks: particles would part; and only the last may add or fold parameters. Raises InputError and their like, as attach()
    and average() do.
    """
    if particles < 1 or not recipes:
        raise InputError(f"needs recipes and at least one particle, got {len(recipes)} and {particles}", where="averaged_cycles")
    batches = None if calibration is None else list(calibration)
    last: tuple[nn.Module, Hook] | None = None
    for recipe in recipes:
        current = copy.deepcopy(model) if last is None else _with_weights(model, *last)
        trained: list[nn.Module] = []
        for particle in range(particles):
            module, hook = attach(current, example_inputs, recipe, calibration=batches, dynamic=dynamic, seed=seed)
            if rewind is not None:
                _rewind(module, rewind)
            train(module, hook, particle)
            trained.append(module)
        made = average(trained) if metric is None else soup(trained, metric)
        module, hook = attach(current, example_inputs, recipe, calibration=batches, dynamic=dynamic, seed=seed)
        module.load_state_dict(made.state_dict())
        last = module, hook
    assert last is not None
    return last


def _same(first: Mapping[str, Tensor], other: Mapping[str, Tensor], number: int) -> None:
    """Raises InputError for the first tensor that is not of the same name and shape, or not the same where it says which weights there are."""
    for name in (*first, *other):
        a, b = first.get(name), other.get(name)
        if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            raise InputError(f"model {number} has other weights than the first: {_about(a)} and {_about(b)}", where=f"average, {name}",
                             hint="average copies of one model that were made by one recipe")
        if not a.is_floating_point() and a.dim() and not torch.equal(a, b):
            kind = "mask" if a.dtype == torch.bool else "kept places"
            raise InputError(f"the {kind} of model {number} and of the first differ", where=f"average, {name}",
                             hint="train them from one mask, by a recipe that does not move it: the mean of different masks is less sparse")


def _same_zeros(each: Sequence[Tensor], name: str) -> None:
    zeros = [one == 0 for one in each]
    if any(not torch.equal(zeros[0], other) for other in zeros[1:]):
        raise InputError("the zeros of its weight are not the same in all models", where=f"average, {name}",
                         hint="train them from one mask, by a recipe that does not move it: the mean of different masks is less sparse")


def _same_ties(first: Mapping[str, Tensor], mean: Mapping[str, Tensor]) -> None:
    """Raises InputError where the first model has one tensor under two names, and others have two whose mean is not the same."""
    held: dict[tuple[Any, ...], str] = {}
    for name, tensor in first.items():
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        other = held.setdefault(key, name) if tensor.numel() and name in mean else name
        if other != name and not torch.equal(mean[name], mean[other]):
            raise InputError(f"this is the tensor of {other} in the first model, and another one elsewhere", where=f"average, {name}",
                             hint="tie the weights in all models, or give a model whose weights are not tied first")


def _has_mask(state: Mapping[str, Tensor], name: str) -> bool:
    """Does a mask lie beside a weight?"""
    masks = (tensor for other, tensor in state.items() if other.startswith(f"{name}_mask") and tensor.dtype == torch.bool)
    return any(mask.shape == state[name].shape for mask in masks)


def _about(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def _measured(metric: Callable[[nn.Module], float], model: nn.Module) -> float:
    with torch.no_grad():
        return measure(metric, model)


def _rewind(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set the parameters of a module to those of a state of the model."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name not in state or state[name].shape != parameter.shape:
                raise InputError("the state to rewind to has no such parameter", where=f"averaged_cycles, {name}",
                                 hint="give a state_dict() of the model, and leave out pack() and what adds parameters")
            parameter.copy_(state[name])


def _with_weights(model: nn.Module, module: nn.Module, hook: Hook) -> nn.Module:
    """A copy of the model with what was trained, zeros where the masks are."""
    made, state = copy.deepcopy(model), module.state_dict()
    own = made.state_dict()
    packed = {parameter for one in module.modules() if isinstance(one, Packed) for parameter in one.parameters()}
    for name, parameter in module.named_parameters():
        if parameter not in packed and (name not in own or own[name].shape != parameter.shape):
            raise InputError("a cycle trained what the model has no place for", where=f"averaged_cycles, {name}",
                             hint="use recipes that add, fold and widen nothing, but in the last cycle")
    weights = dict(_named(hook.weights(), own))
    with torch.no_grad():
        for name, tensor in own.items():
            if name in weights or name in state:
                tensor.copy_(weights[name] if name in weights else state[name])
    return made


def _named(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The name of each masked weight in the model."""
    for path, weight in weights.items():
        name = next((one for one in (f"{path}.weight", path) if one in own and own[one].shape == weight.shape), None)
        if name is None:
            raise InputError("a masked layer is not the model's own", where=f"averaged_cycles, {path}", hint="use recipes that add no layers")
        yield name, weight
