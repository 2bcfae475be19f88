"""Mixtures whose router scales what an expert reads, and which multiply every token with the weights of every expert: Llama 4 of Hugging Face.

Such a module gets rows [T, K]; its router gives scores [T, E], 0 for experts that are not chosen, and what it gives beside them is handed on. Without
biases an expert gives nothing for a row of zeros, so that the chosen ones alone are the whole: one sparsify.experts_ffn of T * k scaled rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .library_activations import activation_name, no_kernel_for
from .library_experts_listed import OTHERWISE, same_numbers
from .ops import experts_ffn


def find_scaled_experts(model: nn.Module) -> dict[str, str | None]:
    """Module path -> None for every such mixture, or why it is no sparsify.experts_ffn."""
    return {path: _unfit(module) for path, module in model.named_modules() if _is_mixture(module)}


def take_scaled_place(module: nn.Module) -> None:
    """Let a mixture of a private copy be computed by sparsify.experts_ffn; it keeps what else its class has."""
    scaled: Any = module
    scaled._sparsify_activation = activation_name(scaled.experts.act_fn)
    scaled.__class__ = type(type(module).__name__, (_Scaled, type(module)), {})


def _is_mixture(module: Any) -> bool:
    """A router, how many experts it chooses, and the experts' weights stacked: gate and up [E, K, 2H], down [E, H, N]."""
    experts = getattr(module, "experts", None)
    both, down = (getattr(experts, name, None) for name in ("gate_up_proj", "down_proj"))
    if not (isinstance(both, Tensor) and isinstance(down, Tensor) and both.dim() == down.dim() == 3 and both.shape[2] == 2 * down.shape[1]):
        return False
    routes = isinstance(getattr(module, "router", None), nn.Module) and isinstance(getattr(module, "top_k", None), int)
    return routes and hasattr(experts, "act_fn") and not hasattr(experts, "is_transposed")  # which has one asks the registry


def _unfit(module: Any) -> str | None:
    if activation_name(module.experts.act_fn) is None:
        return no_kernel_for(module.experts.act_fn)
    return None if _agrees(module) else OTHERWISE


@torch.no_grad()
def _agrees(module: Any) -> bool:
    """By values, on random rows."""
    weight = module.experts.down_proj
    rows = torch.randn(2 * weight.shape[0], module.experts.gate_up_proj.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    try:
        theirs, ours = module(rows.to(weight))[0], _computed(module, rows.to(weight), str(activation_name(module.experts.act_fn)))[0]
    except Exception:  # noqa: BLE001  what somebody else's forward() raises that takes or gives something else
        return False
    return same_numbers(theirs, ours)


def _computed(module: Any, x: Tensor, activation: str) -> tuple[Tensor, Any]:
    """x [..., K] -> ([T, N], what the router gives beside its scores)."""
    rows = x.reshape(-1, x.shape[-1])
    scores, beside = module.router(rows)
    found, experts = scores.topk(module.top_k, -1), module.experts
    both, half = experts.gate_up_proj.transpose(1, 2), experts.down_proj.shape[1]
    read = (rows.unsqueeze(1) * found.values.unsqueeze(-1)).flatten(0, 1)
    y: Tensor = experts_ffn.op(read, found.indices.reshape(-1, 1), None, both[:, :half], both[:, half:], experts.down_proj.transpose(1, 2),
                               None, None, None, activation=activation)
    y = y.reshape(-1, module.top_k, y.shape[-1]).sum(1)
    shared = getattr(module, "shared_expert", None)
    return y if shared is None else y + shared(rows), beside


class _Scaled:
    """Stands before a mixture's own class."""

    _sparsify_activation: str

    def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Any]:
        return _computed(self, hidden_states, self._sparsify_activation)
