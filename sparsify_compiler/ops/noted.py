"""noted: a value that parts of a model hand each other beside their arguments, for one call of the model (session.py)."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from sparsify_compiler import session

from ._linear import LIBRARY


def reference(value: Tensor, key: str, new: bool = False) -> Tensor:
    """new: note the value under the key, and give it on. Otherwise what this call of the model noted there last, in the value's shape and dtype;
    the value where there is none of as many elements: in a model that is not watched, and in graphs that are traced.
    """
    call = None if session.traced(value) else session.current()
    if call is None:
        return value.clone()
    if new:
        call.notes[key] = value
        return value
    found = call.read(key)
    if found is None or found.numel() != value.numel():
        return value
    return found.to(value.device, value.dtype).reshape(value.shape)


LIBRARY.define("noted(Tensor value, str key, bool new=False) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("noted", reference, "CompositeImplicitAutograd")
op = torch.ops.sparsify.noted.default
fx.node.has_side_effect(op)
