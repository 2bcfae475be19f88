"""predicted_ffn: an FFN whose neurons were chosen before any of them is computed: of all its weights it reads those of the chosen ones only."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import select
from ._linear import LIBRARY, compute_dtype
from .select_ffn import ACTIVATIONS
from .select_ffn import hidden as neurons_of


def reference(x: Tensor, scores: Tensor, limit: Tensor, gate: Tensor, down: Tensor, up: Tensor | None = None, gate_bias: Tensor | None = None,
              up_bias: Tensor | None = None, bias: Tensor | None = None, *, activation: str) -> Tensor:
    """y = down^T (activation(gate x + gate_bias) * (up x + up_bias) where scores reach the limit, else 0) + bias; without up no factor.

    x [..., K] any float dtype -> y [..., N] of the same dtype; scores float32 [..., H], limit [] or [..., 1]; gate and up [H, K], down [H, N].
    Sums in at least float32. A NaN among the scores chooses; one in a neuron that is not chosen is never met. "drelu" is an activation of up, too.
    """
    dtype = compute_dtype(x, gate)
    wide = [None if vector is None else vector.to(dtype) for vector in (gate_bias, up_bias, bias)]
    gates = linear(x.to(dtype), gate.to(dtype), wide[0])
    ups = None if up is None else linear(x.to(dtype), up.to(dtype), wide[1])
    hidden = select.reference(neurons_of(activation, gates, ups), limit, scores=scores)
    return linear(hidden, down.to(dtype).t(), wide[2]).to(x.dtype)


def _check(x: Tensor, scores: Tensor, gate: Tensor, down: Tensor, up: Tensor | None, activation: str) -> None:
    fits = x.dim() >= 1 and gate.dim() == down.dim() == 2 and x.shape[-1] == gate.shape[1] and down.shape[0] == gate.shape[0]
    fits = fits and (up is None or up.shape == gate.shape) and scores.shape == (*x.shape[:-1], gate.shape[0])
    shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (x, scores, gate, up, down)]
    needs = "[..., K], [..., H], [H, K], [H, K] or None, [H, N]"
    torch._check(fits, lambda: f"predicted_ffn: x, scores, gate, up, down have shapes {shapes}, needs {needs}")  # type: ignore[no-untyped-call]
    torch._check(activation in ACTIVATIONS, lambda: f"predicted_ffn: no activation {activation!r}")  # type: ignore[no-untyped-call]


def _everywhere(x: Tensor, scores: Tensor, limit: Tensor, gate: Tensor, down: Tensor, up: Tensor | None = None, gate_bias: Tensor | None = None,
                up_bias: Tensor | None = None, bias: Tensor | None = None, *, activation: str) -> Tensor:
    _check(x, scores, gate, down, up, activation)
    if x.dtype is not gate.dtype:
        return reference(x, scores, limit, gate, down, up, gate_bias, up_bias, bias, activation=activation)
    ups = None if up is None else linear(x, up, up_bias)
    hidden = select.op(neurons_of(activation, linear(x, gate, gate_bias), ups), limit, scores=scores)
    return linear(hidden, down.t(), bias)


def _fake(x: Tensor, scores: Tensor, limit: Tensor, gate: Tensor, down: Tensor, up: Tensor | None = None, gate_bias: Tensor | None = None,
          up_bias: Tensor | None = None, bias: Tensor | None = None, *, activation: str) -> Tensor:
    _check(x, scores, gate, down, up, activation)
    return x.new_empty((*x.shape[:-1], down.shape[1]))


LIBRARY.define("predicted_ffn(Tensor x, Tensor scores, Tensor limit, Tensor gate, Tensor down, Tensor? up=None, Tensor? gate_bias=None, "
               "Tensor? up_bias=None, Tensor? bias=None, *, str activation) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("predicted_ffn", _everywhere, "CompositeExplicitAutograd")
torch.library.register_fake("sparsify::predicted_ffn", _fake, lib=LIBRARY)
op = torch.ops.sparsify.predicted_ffn.default
