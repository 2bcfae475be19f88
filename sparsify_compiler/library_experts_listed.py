"""Mixtures whose experts are modules of their own in a list: Switch Transformers of Hugging Face, and whatever computes as it does.

Such a module gets rows [T, K], a one-hot choice [T, k, E] whose rows may be all zeros, and weights [T, k], and runs a loop over its experts. Its
private copy stacks their weights, under their own names, for one sparsify.experts_ffn.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import one_hot

from .library_activations import activation_name, no_kernel_for
from .ops import experts_ffn

OTHERWISE = "it computes what experts give in a way of its own"


def find_listed_experts(model: nn.Module) -> dict[str, str | None]:
    """Module path -> None for every such mixture, or why it is no sparsify.experts_ffn."""
    return {path: _unfit(module) for path, module in model.named_modules() if _is_mixture(module)}


def take_place(parent: nn.Module, module: nn.Module) -> None:
    """Let a mixture of a private copy be computed by sparsify.experts_ffn; it keeps what else its class has. parent: the module that holds it."""
    for part in parent.modules():
        if type(part) is nn.Linear:
            part.__class__ = _Cast
    parts = _parts(_experts(module)[0])
    assert parts is not None
    listed: Any = module
    listed._sparsify_activation = activation_name(parts[1])
    listed.__class__ = type(type(module).__name__, (_Listed, type(module)), {})


def _is_mixture(module: nn.Module) -> bool:
    """A list of alike FFNs whose own forward() takes rows, choice and weights."""
    if not isinstance(module, nn.ModuleDict | nn.ModuleList) or len(module) == 0 or type(module).forward is nn.Module.forward:
        return False
    experts = _experts(module)
    alike = len({type(expert) for expert in experts}) == 1 and all(_parts(expert) for expert in experts)
    return alike and len(inspect.signature(module.forward).parameters) == 3


def _experts(module: Any) -> Sequence[nn.Module]:
    return list(module.values() if isinstance(module, nn.ModuleDict) else module)


def _parts(expert: nn.Module) -> tuple[list[nn.Linear], nn.Module] | None:
    """Its linears, one in and one out, and its activation; None where it has others."""
    kinds = [part for part in expert.children() if not isinstance(part, nn.Dropout)]
    linears = [part for part in kinds if isinstance(part, nn.Linear)]
    others = [part for part in kinds if not isinstance(part, nn.Linear)]
    return (linears, others[0]) if len(linears) == 2 and len(others) == 1 else None


def _unfit(module: nn.Module) -> str | None:
    parts = [found for expert in _experts(module) if (found := _parts(expert))]
    name = activation_name(parts[0][1])
    if name is None or any(activation_name(act) != name for _, act in parts):
        return no_kernel_for(parts[0][1])
    return None if _same(module) else OTHERWISE


def _same(module: nn.Module) -> bool:
    """Does it compute what we would, for one choice a row and for two, and keep no count of it?"""
    try:
        return all(_agrees(module, k) for k in sorted({1, min(2, len(_experts(module)))}))
    except Exception:  # noqa: BLE001  what somebody else's forward() raises that takes something else, and our op for experts that are not alike
        return False


@torch.no_grad()
def _agrees(module: nn.Module, k: int) -> bool:
    """By values, on rows that ask every expert; one asks none, one fewer than k. The module's buffers stay as they are."""
    first = _parts(_experts(module)[0])
    assert first is not None
    weight, experts = first[0][0].weight, len(_experts(module))
    generator = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(experts + 2, width, generator=generator, dtype=torch.float32).to(weight) for width in (weight.shape[1], k))
    chosen = torch.arange(experts + 2, dtype=torch.int64, device=weight.device)[:, None] + torch.arange(k, dtype=torch.int64, device=weight.device)
    asked = one_hot(chosen % experts, experts)
    asked[-1], asked[0, 1:] = 0, 0
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    theirs = functional_call(module, buffers, (x.clone(), asked.clone(), weights.clone()))
    if not all(torch.equal(buffers[name], buffer) for name, buffer in module.named_buffers()):
        return False
    ours = _computed(module, x, asked, weights, str(activation_name(first[1])))
    return isinstance(theirs, Tensor) and same_numbers(theirs, ours)


def same_numbers(theirs: Tensor, ours: Tensor) -> bool:
    """Does a mixture of the library give what we do, up to rounding?"""
    limit = 1e-4 if ours.dtype in (torch.float32, torch.float64) else 3e-2
    return theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=limit, atol=limit * float(ours.abs().max()))


def _computed(module: nn.Module, x: Tensor, asked: Tensor, weights: Tensor, activation: str) -> Tensor:
    """x [T, K], asked [T, k, E] one-hot or zeros, weights [T, k] -> [T, N]."""
    parts = [found for expert in _experts(module) if (found := _parts(expert))]
    asked = asked.to(torch.int64) if asked.dtype is torch.bool else asked  # of which there is no argmax
    chosen = torch.where(asked.sum(-1) > 0, asked.argmax(-1), -1)
    gate, gate_bias = _stacked([linears[0] for linears, _ in parts])
    down, bias = _stacked([linears[1] for linears, _ in parts])
    y: Tensor = experts_ffn.op(x, chosen, weights, gate, None, down, gate_bias, None, bias, activation=activation)
    return y


def _stacked(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    weights: list[Tensor] = [one.weight for one in linears]
    biases: list[Tensor] = [one.bias for one in linears if one.bias is not None]
    return torch.stack(weights), torch.stack(biases) if biases else None


class _Cast(nn.Linear):
    """A router's linear, which Switch casts in each call, also to the dtype that it has: an export takes no cast of parameters."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return self if args == (self.weight.dtype,) and not kwargs else super().to(*args, **kwargs)


class _Listed:
    """Stands before a mixture's own class."""

    _sparsify_activation: str

    def forward(self: Any, x: Tensor, asked: Tensor, weights: Tensor) -> Tensor:
        return _computed(self, x, asked, weights, self._sparsify_activation)
