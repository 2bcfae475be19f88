"""Mixtures of experts of Hugging Face's models: an experts function in the library's own registry, which computes them by one op.

Such a module finds its function by the name in its configuration, of which the private copy of a model has one of its own: nothing of the user's
model, nor of other models in the process, changes. In a graph the mixture is then a router in plain nodes and one sparsify.experts_ffn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .library_activations import activation_name, no_kernel_for
from .library_experts_listed import find_listed_experts, take_place
from .library_experts_scaled import find_scaled_experts, take_scaled_place
from .ops import experts_ffn

NAME = "sparsify"
_SETTING = "_experts_implementation_internal"  # behind the configuration's own setter, which hands it on to parts that have no experts
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")  # what the library's decorator sets


def find_library_experts(model: nn.Module) -> dict[str, str | None]:
    """Module path -> None for every mixture that asks the registry, or why it is no sparsify.experts_ffn."""
    return {path: _unfit(module) for path, module in model.named_modules() if _asks_registry(module)}


def unfit_experts(model: nn.Module) -> dict[str, str]:
    """Module path -> why, for every mixture that is no sparsify.experts_ffn."""
    found = find_library_experts(model) | find_listed_experts(model) | find_scaled_experts(model)
    return {path: why for path, why in found.items() if why is not None}


def give_experts(model: nn.Module, copy: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A copy of the model whose mixtures are computed by sparsify.experts_ffn; the model itself where none fits.

    Those that ask the registry share their configuration: all of them fit, or none is taken.
    """
    asking = find_library_experts(model)
    asking = {} if any(asking.values()) else asking
    listed = [path for path, why in find_listed_experts(model).items() if why is None]
    scaled = [path for path, why in find_scaled_experts(model).items() if why is None]
    if not (asking or listed or scaled):
        return model
    private = copy(model)
    if asking:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
    for path in asking:
        module: Any = private.get_submodule(path)
        module._sparsify_activation = activation_name(module.act_fn)
        setattr(module.config, _SETTING, NAME)
    for path in listed:
        take_place(private.get_submodule(path.rpartition(".")[0]), private.get_submodule(path))
    for path in scaled:
        take_scaled_place(private.get_submodule(path))
    return private


def _asks_registry(module: nn.Module) -> bool:
    return all(hasattr(module, flag) for flag in _FLAGS) and hasattr(getattr(module, "config", None), _SETTING)


def _unfit(module: Any) -> str | None:
    from transformers.integrations import moe

    if module.has_gate and type(module)._apply_gate is not moe._default_apply_gate:
        return "its gate is computed in a way of its own"
    if module.has_post_expert_norm:
        return "it normalises what an expert gives"
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over several processes"
    return None if activation_name(module.act_fn) else no_kernel_for(module.act_fn)


def _experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the registry hands out: hidden_states [T, K], top_k_index [T, k], top_k_weights [T, k] -> [T, N]."""
    gate, up = _projections(module, "gate_up_proj" if module.has_gate else "up_proj", module.is_transposed)
    gate_bias, up_bias, bias = None, None, None
    if module.has_bias:
        gate_bias, up_bias = _projections(module, "gate_up_proj_bias" if module.has_gate else "up_proj_bias", False)
        bias = module.down_proj_bias
    down = module.down_proj.transpose(1, 2) if module.is_transposed else module.down_proj
    y: Tensor = experts_ffn.op(hidden_states, top_k_index, top_k_weights, gate, up, down, gate_bias, up_bias, bias,
                               activation=module._sparsify_activation)
    return y


def _projections(module: Any, name: str, transposed: bool) -> tuple[Tensor, Tensor | None]:
    """Gate and up, or the one projection: views of the module's tensor [E, 2H, ...]."""
    both = getattr(module, name)
    both = both.transpose(1, 2) if transposed else both
    if not module.has_gate:
        return both, None
    half = both.shape[1] // 2
    return (both[:, :half], both[:, half:]) if module.is_concatenated else (both[:, ::2], both[:, 1::2])
