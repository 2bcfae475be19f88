"""Does a captured graph do what the module does? On the example inputs, and where each dynamic dimension is 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .call import CapturedModule
from .capture_inputs import ExampleCall
from .errors import CaptureError, InputError
from .program import Region

# How far the captured graph may be from the model, relative to the largest magnitude of an output: reassociation of sums, no more.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def run(model: nn.Module, call: ExampleCall, where: str) -> Any:
    """The model's result of one call. Raises InputError with the model's own message when it fails."""
    args, kwargs = call.arguments()
    try:
        with torch.no_grad(), unchanged(model):
            return model(*args, **kwargs)
    except Exception as problem:  # the model's own code may raise anything
        raise InputError(f"the model fails on its example inputs: {type(problem).__name__}: {problem}", where=where,
                         hint="a plain call of the model with them must work before it can be compiled") from problem


def compare(captured: nn.Module, call: ExampleCall, expected: Any) -> None:
    """Raises CaptureError, naming the output, where the captured module does not reproduce the model."""
    args, kwargs = call.arguments()
    with torch.no_grad(), unchanged(captured):
        actual = captured(*args, **kwargs)
    wanted, _ = pytree.tree_flatten_with_path(expected)
    got = pytree.tree_leaves(actual)
    if len(got) != len(wanted):
        raise CaptureError(f"the captured graph returns {len(got)} values, the model {len(wanted)}")
    for (path, a), b in zip(wanted, got, strict=True):
        if isinstance(a, Tensor) and not close(a, b):
            raise CaptureError(f"the captured graph does not reproduce the model: output{pytree.keystr(path)} differs by {_distance(a, b)}",
                               hint="does the model draw random numbers in eval mode, or keep state between calls?")


def close(a: Tensor, b: Any) -> bool:
    """Whether two outputs are the same up to float reassociation; exactly the same for integers."""
    if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    finite = a.detach()[a.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=0, atol=TOLERANCE.get(a.dtype, 1e-4) * max(scale, 1e-6), equal_nan=True)


def _distance(a: Tensor, b: Any) -> str:
    if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return f"its kind ({a.dtype} {tuple(a.shape)} against {getattr(b, 'dtype', type(b).__name__)} {tuple(getattr(b, 'shape', ()))})"
    return f"up to {float((a.double() - b.double()).abs().max()):.3g}"


def agree(captured: nn.Module, module: nn.Module, call: ExampleCall) -> bool:
    """Whether both give the same on a call; no when either fails."""
    try:
        compare(captured, call, run(module, call, ""))
    except Exception:  # noqa: BLE001  whatever fails here, in the module or in the graph: it is not supported
        return False
    return True


def allow_ones(region: Region, module: nn.Module, call: ExampleCall) -> None:
    """Let dynamic dimensions be 1 as well, where the graph then still agrees with the module: export traces with sizes of 2 and more."""
    names = [name for name in call.sizes() if region.spec.ranges[name][0] == 2]
    if names and not _allow(region, module, call, names) and len(names) > 1:
        for name in names:
            _allow(region, module, call, [name])


def _allow(region: Region, module: nn.Module, call: ExampleCall, names: list[str]) -> bool:
    tight = region.spec
    region.spec = replace(tight, ranges={**tight.ranges, **{name: (1, tight.ranges[name][1]) for name in names}})
    if agree(CapturedModule(region), module, call.resized(dict.fromkeys(names, 1))):
        return True
    region.spec = tight
    return False


@contextmanager
def unchanged(model: nn.Module) -> Iterator[Callable[[], list[tuple[nn.Module, str, Tensor]]]]:
    """Puts the model's buffers back as they were: running a model that counts its calls must not leave a trace in it.

    Gives a function that says which buffers were written into so far: module, name, buffer.
    """
    before = [(module, name, buffer, buffer.clone(), _version(buffer))
              for module in model.modules() for name, buffer in module._buffers.items() if buffer is not None]

    def written() -> list[tuple[nn.Module, str, Tensor]]:
        return [(module, name, buffer) for module, name, buffer, values, version in before if _is_written(buffer, values, version)]

    try:
        yield written
    finally:
        with torch.no_grad():
            for module, name, buffer, values, version in before:
                if _is_written(buffer, values, version):
                    buffer.copy_(values)
                module._buffers[name] = buffer


def _version(buffer: Tensor) -> int | None:
    """How often a tensor was written into; None where torch does not count that."""
    return None if buffer.is_inference() else buffer._version


def _is_written(buffer: Tensor, values: Tensor, version: int | None) -> bool:
    return not torch.equal(buffer, values) if version is None else buffer._version != version
