"""select_inputs_ffn: an FFN of which every linear selects its inputs, and reads the weights of those only: W lies input by input in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from . import select_linear
from ._linear import LIBRARY, compute_dtype
from .select_ffn import ACTIVATIONS, hidden


def reference(x: Tensor, gate: Tensor, gate_limit: Tensor, down: Tensor, down_limit: Tensor, up: Tensor | None = None, up_limit: Tensor | None = None,
              gate_scale: Tensor | None = None, gate_center: Tensor | None = None, gate_bias: Tensor | None = None, up_scale: Tensor | None = None,
              up_center: Tensor | None = None, up_bias: Tensor | None = None, down_scale: Tensor | None = None, down_center: Tensor | None = None,
              bias: Tensor | None = None, *, activation: str) -> Tensor:
    """y = down(activation(gate(x)) * up(x)), or down(activation(gate(x))) without up; every linear a select_linear with its own limit.

    x [..., K] any float dtype -> y [..., N] of the same dtype; gate and up [K, H], down [H, N], limits [], scales, centers and biases of a linear's
    inputs and outputs, or None; "drelu" is an activation of up, too. Sums and the product in at least float32. A NaN is always selected.
    """
    rows = x.to(compute_dtype(x, gate))
    gates, ups = select_linear.reference(rows, gate_limit, gate, gate_scale, gate_center, gate_bias), None
    if up is not None and up_limit is not None:
        ups = select_linear.reference(rows, up_limit, up, up_scale, up_center, up_bias)
    return select_linear.reference(hidden(activation, gates, ups), down_limit, down, down_scale, down_center, bias).to(x.dtype)


def _check(x: Tensor, gate: Tensor, down: Tensor, up: Tensor | None, up_limit: Tensor | None, activation: str) -> None:
    fits = x.dim() >= 1 and gate.dim() == down.dim() == 2 and x.shape[-1] == gate.shape[0] and down.shape[0] == gate.shape[1]
    fits = fits and (up is None or up.shape == gate.shape)
    shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (x, gate, up, down)]
    torch._check(fits, lambda: f"select_inputs_ffn: x, gate, up, down have shapes {shapes}, needs [..., K], [K, H], [K, H] or None, [H, N]")  # type: ignore[no-untyped-call]
    torch._check((up is None) == (up_limit is None), lambda: "select_inputs_ffn: up and up_limit come together")  # type: ignore[no-untyped-call]
    torch._check(activation in ACTIVATIONS, lambda: f"select_inputs_ffn: no activation {activation!r}")  # type: ignore[no-untyped-call]


def _everywhere(x: Tensor, gate: Tensor, gate_limit: Tensor, down: Tensor, down_limit: Tensor, up: Tensor | None = None,
                up_limit: Tensor | None = None, gate_scale: Tensor | None = None, gate_center: Tensor | None = None, gate_bias: Tensor | None = None,
                up_scale: Tensor | None = None, up_center: Tensor | None = None, up_bias: Tensor | None = None, down_scale: Tensor | None = None,
                down_center: Tensor | None = None, bias: Tensor | None = None, *, activation: str) -> Tensor:
    _check(x, gate, down, up, up_limit, activation)
    gates, ups = select_linear.op(x, gate_limit, gate, gate_scale, gate_center, gate_bias), None
    if up is not None and up_limit is not None:
        ups = select_linear.op(x, up_limit, up, up_scale, up_center, up_bias)
    y: Tensor = select_linear.op(hidden(activation, gates, ups), down_limit, down, down_scale, down_center, bias)
    return y


def _fake(x: Tensor, gate: Tensor, gate_limit: Tensor, down: Tensor, down_limit: Tensor, up: Tensor | None = None, up_limit: Tensor | None = None,
          gate_scale: Tensor | None = None, gate_center: Tensor | None = None, gate_bias: Tensor | None = None, up_scale: Tensor | None = None,
          up_center: Tensor | None = None, up_bias: Tensor | None = None, down_scale: Tensor | None = None, down_center: Tensor | None = None,
          bias: Tensor | None = None, *, activation: str) -> Tensor:
    _check(x, gate, down, up, up_limit, activation)
    return x.new_empty((*x.shape[:-1], down.shape[1]))


LIBRARY.define("select_inputs_ffn(Tensor x, Tensor gate, Tensor gate_limit, Tensor down, Tensor down_limit, Tensor? up=None, Tensor? up_limit=None, "
               "Tensor? gate_scale=None, Tensor? gate_center=None, Tensor? gate_bias=None, Tensor? up_scale=None, Tensor? up_center=None, "
               "Tensor? up_bias=None, Tensor? down_scale=None, Tensor? down_center=None, Tensor? bias=None, *, str activation) -> Tensor",
               tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("select_inputs_ffn", _everywhere, "CompositeExplicitAutograd")
torch.library.register_fake("sparsify::select_inputs_ffn", _fake, lib=LIBRARY)
op = torch.ops.sparsify.select_inputs_ffn.default
