"""select_ffn: a gated FFN that computes its gate, selects neurons by it, and reads the weights of those only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import linear

from . import select as chosen
from ._linear import LIBRARY, compute_dtype

# Of the gate. "drelu" is ReLU on the gate and on up; "relu2" is squared.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu, "relu": functional.relu, "sigmoid": torch.sigmoid, "gelu": functional.gelu, "drelu": functional.relu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"), "relu2": lambda x: functional.relu(x).square(),
}  # fmt: skip
UP = {"drelu": "relu"}  # what up has an activation of its own in: its name


def raised(activation: str, up: Tensor) -> Tensor:
    """What the gate is multiplied with, of the products of up."""
    return ACTIVATIONS[UP[activation]](up) if activation in UP else up


def hidden(activation: str, first: Tensor, up: Tensor | None = None) -> Tensor:
    """What down reads, of the products of gate and up, or of the one projection that there is."""
    found = ACTIVATIONS[activation](first)
    return found if up is None else found * raised(activation, up)


def reference(x: Tensor, limit: Tensor, gate: Tensor, up: Tensor, down: Tensor, scale: Tensor | None = None, gate_bias: Tensor | None = None,
              up_bias: Tensor | None = None, bias: Tensor | None = None, *, activation: str) -> Tensor:
    """y = down^T (select(activation(gate x + gate_bias)) * (up x + up_bias)) + bias; "drelu" is an activation of up, too.

    x [..., K] any float dtype -> y [..., N] of the same dtype; gate and up [H, K], down [H, N]; limit [] or [..., 1], scale [H] or None, as in
    select. Sums in at least float32. A NaN of the gate is always selected.
    """
    dtype = compute_dtype(x, gate)
    wide = [None if vector is None else vector.to(dtype) for vector in (gate_bias, up_bias, bias)]
    gates = ACTIVATIONS[activation](linear(x.to(dtype), gate.to(dtype), wide[0]))
    hidden = chosen.reference(gates, limit, scale) * raised(activation, linear(x.to(dtype), up.to(dtype), wide[1]))
    return linear(hidden, down.to(dtype).t(), wide[2]).to(x.dtype)


def _check(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation: str) -> None:
    fits = x.dim() >= 1 and gate.dim() == 2 and gate.shape == up.shape and x.shape[-1] == gate.shape[1] and down.shape[0] == gate.shape[0]
    shapes = [tuple(tensor.shape) for tensor in (x, gate, up, down)]
    torch._check(fits, lambda: f"select_ffn: x, gate, up, down have shapes {shapes}, needs [..., K], [H, K], [H, K], [H, N]")  # type: ignore[no-untyped-call]
    torch._check(activation in ACTIVATIONS, lambda: f"select_ffn: no activation {activation!r}")  # type: ignore[no-untyped-call]


def _everywhere(x: Tensor, limit: Tensor, gate: Tensor, up: Tensor, down: Tensor, scale: Tensor | None = None, gate_bias: Tensor | None = None,
                up_bias: Tensor | None = None, bias: Tensor | None = None, *, activation: str) -> Tensor:
    _check(x, gate, up, down, activation)
    if x.dtype is not gate.dtype:
        return reference(x, limit, gate, up, down, scale, gate_bias, up_bias, bias, activation=activation)
    gates = chosen.op(ACTIVATIONS[activation](linear(x, gate, gate_bias)), limit, scale)
    return linear(gates * raised(activation, linear(x, up, up_bias)), down.t(), bias)


def _fake(x: Tensor, limit: Tensor, gate: Tensor, up: Tensor, down: Tensor, scale: Tensor | None = None, gate_bias: Tensor | None = None,
          up_bias: Tensor | None = None, bias: Tensor | None = None, *, activation: str) -> Tensor:
    _check(x, gate, up, down, activation)
    return x.new_empty((*x.shape[:-1], down.shape[1]))


LIBRARY.define("select_ffn(Tensor x, Tensor limit, Tensor gate, Tensor up, Tensor down, Tensor? scale=None, Tensor? gate_bias=None, "
               "Tensor? up_bias=None, Tensor? bias=None, *, str activation) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("select_ffn", _everywhere, "CompositeExplicitAutograd")
torch.library.register_fake("sparsify::select_ffn", _fake, lib=LIBRARY)
op = torch.ops.sparsify.select_ffn.default
