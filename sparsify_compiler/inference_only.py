"""What a compiled model cannot do as the model could, it refuses: its kernels know no gradients, and hold weights in layouts of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .errors import ModelError
from .ops._linear import LIBRARY

_ANCHOR = torch.empty(0, dtype=torch.float32, requires_grad=True)   # so that results ask for gradients, whatever the inputs do


def _refuse(*_: Any) -> NoReturn:
    raise ModelError("no gradients go through a compiled model: its kernels are for inference",
                     hint="train the module that sc.attach() gives, then finalize() it; where no gradients are wanted from here, call the "
                          "compiled model under torch.no_grad(), or freeze it by requires_grad_(False)")


class _Refusing(torch.autograd.Function):
    """Results of inference that stand in a graph of autograd: whoever differentiates them is told, where nothing would be silent."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, run: Callable[..., Any], found: list[Any], *inputs: Any) -> tuple[Tensor, ...]:
        found += run(*inputs)
        # Without detach() a view would be one that may not be written into.
        return tuple(one.detach() for one in found if isinstance(one, Tensor))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        _refuse()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _refuse()


def inference_only(run: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
    """A flat function that computes without gradients: run(*inputs) -> flat outputs, of a module. They require gradients where torch's would."""
    read = tuple(module.parameters())

    def forward(*inputs: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            raise ModelError("transforms of torch.func cannot look into a compiled model's kernels", hint="apply them to the model itself")
        if forward_ad._current_level < 0 and (not torch.is_grad_enabled() or _asking(inputs, read) is None):
            return run(*inputs)
        found: list[Any] = []
        tensors = iter(_Refusing.apply(_ANCHOR, run, found, *inputs))  # type: ignore[no-untyped-call]
        return tuple(next(tensors) if isinstance(one, Tensor) else one for one in found)

    return forward


def traced_inference(run: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
    """The same for torch.compile, in whose graphs only an op can raise when it is run."""

    def forward(*inputs: Any) -> Any:
        asking = _asking(inputs, module.parameters()) if torch.is_grad_enabled() else None
        if asking is None:
            return run(*inputs)
        with torch.no_grad():
            found = run(*inputs)
        return tuple(result(one, asking) if isinstance(one, Tensor) and one.is_floating_point() else one for one in found)

    return forward


def _asking(inputs: Iterable[Any], parameters: Iterable[nn.Parameter]) -> Tensor | None:
    """A tensor that requires gradients, where there is one."""
    for one in parameters:
        if one.requires_grad:
            return one
    return next((one for one in inputs if isinstance(one, Tensor) and one.requires_grad), None)


class FixedTensors(dict[str, Any]):
    """A module's parameters or buffers, of which none can be replaced: kernels would go on with the old one."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        super().__init__(tensors)
        self._first = dict(tensors)

    def __setitem__(self, name: str, value: Any) -> None:
        # While torch.export traces, tensors of its own kind that hold nothing are in these places.
        if value is not self._first.get(name, self) and (value is None or type(value) in (Tensor, nn.Parameter, nn.Buffer)):
            raise _fixed(name)
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        raise _fixed(name)

    def __reduce__(self) -> Any:    # a copy is bound to no kernel
        return dict, (dict(self),)


def _fixed(name: str) -> ModelError:
    return ModelError("a tensor of a compiled model cannot be replaced: kernels have laid it out", where=name,
                      hint="replace it in the model, and compile that; functional_call() likewise takes the model")


def fix_tensors(module: nn.Module) -> None:
    """From here on no tensor of this module, and of those inside, can be replaced."""
    for one in module.modules():
        one._parameters, one._buffers = FixedTensors(one._parameters), FixedTensors(one._buffers)


def _define(name: str, schema: str, call: Callable[..., Tensor]) -> Any:
    LIBRARY.define(f"{name}({schema}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsify::{name}", lambda *given: torch.empty_like(given[0]), lib=LIBRARY)
    return getattr(torch.ops.sparsify, name).default


result = _define("inference_result", "Tensor computed, Tensor asking", lambda computed, asking: computed.clone())
no_gradient = _define("no_gradient", "Tensor asking, Tensor gradient", _refuse)
torch.library.register_autograd("sparsify::inference_result", lambda ctx, gradient: (None, no_gradient(*ctx.saved_tensors, gradient)),
                                setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]), lib=LIBRARY)
