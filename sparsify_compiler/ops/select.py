"""select: x where its score reaches a limit, a centre elsewhere. What an activation-sparse layer reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._linear import LIBRARY


def score(x: Tensor, scale: Tensor | None = None, center: Tensor | None = None) -> Tensor:
    """|x - center| * scale, in at least float32; scale and center [K], 1 and 0 where there is none."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    distance = (x.to(dtype) if center is None else x.to(dtype) - center.to(dtype)).abs()
    return distance if scale is None else distance * scale.to(dtype)


def kept(x: Tensor, limit: Tensor, scale: Tensor | None = None, center: Tensor | None = None, scores: Tensor | None = None) -> Tensor:
    """bool, of x's shape: not score < limit, so that a NaN is kept. x [..., K]; limit [] or [..., 1]; scale and center [K] or None.

    scores  of x's shape, where they are known from elsewhere: those of x itself are not computed
    """
    return ~((score(x, scale, center) if scores is None else scores) < limit)


def reference(x: Tensor, limit: Tensor, scale: Tensor | None = None, center: Tensor | None = None, scores: Tensor | None = None, *,
              straight_through: bool = False) -> Tensor:
    """x where |x - center| * scale, or the given score, reaches the limit, the centre elsewhere; a limit of 0 keeps all where scores are not given.

    x [..., K] any float dtype -> y of the same shape and dtype; limit [], or [..., 1] for a limit a row; scale and center [K] or None;
    scores [..., K] or None. straight_through: the gradient of x is that of y, also where x was not selected; else 0 there.
    """
    other = x.new_zeros(()) if center is None else center.to(x.dtype)
    return torch.where(kept(x, limit, scale, center, scores), x, other)


def _check(x: Tensor, limit: Tensor, scale: Tensor | None = None, center: Tensor | None = None, scores: Tensor | None = None) -> None:
    fits = x.dim() >= 1 and (limit.dim() == 0 or (limit.dim() == x.dim() and limit.shape[-1] == 1))
    fits = fits and all(vector is None or tuple(vector.shape) == (x.shape[-1],) for vector in (scale, center))
    fits = fits and (scores is None or (scores.shape == x.shape and scale is None))
    shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (x, limit, scale, center, scores)]
    needs = "[..., K], [] or [..., 1], [K], [K], and [..., K] without a scale"
    torch._check(fits, lambda: f"select: x, limit, scale, center, scores have shapes {shapes}, needs {needs}")  # type: ignore[no-untyped-call]


def _everywhere(x: Tensor, limit: Tensor, scale: Tensor | None = None, center: Tensor | None = None, scores: Tensor | None = None, *,
                straight_through: bool = False) -> Tensor:
    _check(x, limit, scale, center, scores)
    return reference(x, limit, scale, center, scores)


def _fake(x: Tensor, limit: Tensor, scale: Tensor | None = None, center: Tensor | None = None, scores: Tensor | None = None, *,
          straight_through: bool = False) -> Tensor:
    _check(x, limit, scale, center, scores)
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.straight_through = keyword_only_inputs["straight_through"]
    ctx.center_dtype = None if inputs[3] is None else inputs[3].dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """To x where it is kept, or everywhere, straight through; to the centre where it is not kept. The choice itself has no gradient."""
    mask = kept(*ctx.saved_tensors)
    missed = None
    if ctx.center_dtype is not None and ctx.needs_input_grad[3]:
        missed = grad.masked_fill(mask, 0).reshape(-1, grad.shape[-1]).sum(0).to(ctx.center_dtype)
    return grad if ctx.straight_through else grad.masked_fill(~mask, 0), None, None, missed, None


LIBRARY.define("select(Tensor x, Tensor limit, Tensor? scale=None, Tensor? center=None, Tensor? scores=None, *, "
               "bool straight_through=False) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("select", _everywhere, "CompositeExplicitAutograd")
torch.library.register_fake("sparsify::select", _fake, lib=LIBRARY)
torch.library.register_autograd("sparsify::select", _backward, setup_context=_setup, lib=LIBRARY)
op = torch.ops.sparsify.select.default
