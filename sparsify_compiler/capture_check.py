"""What a model must be before capture: in eval mode, on one device, with finite weights of a plain floating-point type."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .errors import ModelError

SUPPORTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_model(model: nn.Module) -> None:
    """Raises ModelError, naming the first module or parameter that stands in the way."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model is {type(model).__name__}, not a torch.nn.Module", hint="wrap the function in an nn.Module")
    _check_packed(model)
    _check_mode(model)
    tensors = list(_tensors(model))
    _check_types(tensors)
    _check_devices(tensors)
    _check_finite(tensors)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _check_packed(model: nn.Module) -> None:
    from .compiled import CompiledModel

    for path, module in model.named_modules():
        if any(isinstance(value, torch.ScriptObject) for value in vars(module).values()):
            raise ModelError("its weights are quantised, or packed by another library", where=path, hint="give the dense floating-point model")
        if isinstance(module, CompiledModel) and any(str(node.target).startswith("sparsify.") for _, node in module.program.nodes()):
            raise ModelError("it is compiled already: its weights are packed", where=path,
                             hint="compile the model that it was made of, or what sc.export_dense() writes")


def _check_mode(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if module.training:
            name = f"{path or 'the model'} ({type(module).__name__})"
            raise ModelError(f"{name} is in training mode", where=path, hint="call model.eval() first; compile() keeps eval semantics")


def _check_types(tensors: list[tuple[str, Tensor]]) -> None:
    for name, tensor in tensors:
        if nn.parameter.is_lazy(tensor):
            raise ModelError("this weight of a lazy module has no shape yet", where=name, hint="call the model once, then model.eval()")
        if tensor.is_meta:
            raise ModelError("this weight is on the meta device: it has no values", where=name, hint="load the weights first")
        if tensor.is_quantized or tensor.layout is not torch.strided:
            raise ModelError(f"this weight is quantised or not a dense tensor ({tensor.layout})", where=name,
                             hint="give the dense floating-point model")
        if isinstance(tensor, nn.Parameter) and tensor.dtype not in SUPPORTED:
            raise ModelError(f"this weight has dtype {tensor.dtype}", where=name,
                             hint=f"supported: {', '.join(str(d).removeprefix('torch.') for d in SUPPORTED)}")
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            raise ModelError(f"this weight is a {type(tensor).__name__}, a tensor subclass", where=name, hint="give the plain floating-point model")
        if tensor.is_inference():
            raise ModelError("this weight was made in torch.inference_mode()", where=name, hint="build or load the model outside of inference_mode")


def _check_devices(tensors: list[tuple[str, Tensor]]) -> None:
    first: dict[torch.device, str] = {}
    for name, tensor in tensors:
        first.setdefault(tensor.device, name)
    if len(first) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in first.items())
        raise ModelError(f"the model lies on several devices: {places}", hint="move it to one device with model.to(device)")


def _check_finite(tensors: list[tuple[str, Tensor]]) -> None:
    bad = [name for name, tensor in tensors if isinstance(tensor, nn.Parameter) and not _finite(tensor.detach())]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ModelError(f"these weights hold NaN or infinity: {', '.join(bad[:3])}{more}", where=bad[0], hint="repair or reload the model")


def _finite(tensor: Tensor) -> bool:
    # A sum is not finite if any element is not; only then is it worth looking closer, since large weights may also overflow it.
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())
