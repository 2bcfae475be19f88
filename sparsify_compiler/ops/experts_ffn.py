"""experts_ffn: every row goes through the FFNs that it chose, out of several; what they give is weighted and added."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._linear import LIBRARY, compute_dtype
from .select_ffn import ACTIVATIONS, UP, hidden, raised

aten: Any = torch.ops.aten
Weights = tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]  # gate, up, down, gate_bias, up_bias, bias

# (gradient of the result, what the activation read) -> gradient of what it read
_of_relu = partial(aten.threshold_backward, threshold=0)
SLOPES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": aten.silu_backward, "relu": _of_relu, "drelu": _of_relu, "sigmoid": lambda grad, x: aten.sigmoid_backward(grad, torch.sigmoid(x)),
    "gelu": aten.gelu_backward, "gelu_tanh": partial(aten.gelu_backward, approximate="tanh"), "relu2": lambda grad, x: grad * torch.relu(x) * 2,
}  # fmt: skip


def reference(x: Tensor, chosen: Tensor, weights: Tensor | None, gate: Tensor, up: Tensor | None, down: Tensor, gate_bias: Tensor | None = None,
              up_bias: Tensor | None = None, bias: Tensor | None = None, *, activation: str) -> Tensor:
    """y = sum over a row's places of weights * (down[e] (activation(gate[e] x + gate_bias[e]) * (up[e] x + up_bias[e])) + bias[e]), e = chosen.

    x [..., K] any float dtype -> y [..., N] of the same dtype; chosen int32 or int64 [..., k], the experts of each row, -1 for none; weights [..., k]
    of any float dtype, or None for ones; gate and up [E, H, K], down [E, N, H], biases [E, H], [E, H], [E, N] or None. Without up the gate is the
    one projection, and down reads its activation alone. "drelu" is an activation of up, too.

    Sums in at least float32, one rounding to x's dtype. A row without an expert gives 0, an expert named twice counts twice, and a NaN in an
    expert's weights reaches the rows that chose it only. Raises RuntimeError for shapes that do not fit, and for an expert that there is not.
    """
    return _computed(x, chosen, weights, (gate, up, down, gate_bias, up_bias, bias), activation, compute_dtype(x, gate))


def by_expert(chosen: Tensor, experts: int) -> Iterator[tuple[int, Tensor]]:
    """Each expert that some row chose, and the places [n] of the flattened choice where it stands, ascending. Raises RuntimeError."""
    flat = chosen.reshape(-1)
    ordered, places = flat.sort(stable=True)
    for wrong in [expert for expert in ordered[:: max(1, flat.numel() - 1)].tolist() if not -1 <= expert < experts]:
        raise RuntimeError(f"experts_ffn: expert {wrong} was chosen of {experts}, needs 0 to {experts - 1}, or -1 for none")
    found, counts = torch.unique_consecutive(ordered, return_counts=True)
    at = 0
    for expert, count in zip(found.tolist(), counts.tolist(), strict=True):
        if expert >= 0:
            yield expert, places[at : at + count]
        at += count


def _computed(x: Tensor, chosen: Tensor, weights: Tensor | None, experts: Weights, activation: str, dtype: torch.dtype) -> Tensor:
    """Multiplied in this dtype, one expert at a time; summed over the experts in at least float32."""
    rows, wide = x.reshape(-1, x.shape[-1]), compute_dtype(x, experts[0])
    y = rows.new_zeros((rows.shape[0], experts[2].shape[1]), dtype=wide)
    flat = None if weights is None else weights.reshape(-1, 1)
    for expert, places in by_expert(chosen, experts[0].shape[0]):
        gate, up, down, gate_bias, up_bias, bias = _of(experts, expert, dtype)
        own = places // chosen.shape[-1]
        part = rows[own].to(dtype)
        neurons = hidden(activation, linear(part, gate, gate_bias), None if up is None else linear(part, up, up_bias))  # type: ignore[arg-type]
        given = linear(neurons, down, bias).to(wide)  # type: ignore[arg-type]
        y.index_add_(0, own, given if flat is None else given * flat[places].to(wide))
    return y.to(x.dtype).reshape(*x.shape[:-1], -1) if y.numel() else x.new_zeros((*x.shape[:-1], y.shape[-1]))


def _of(experts: Weights, expert: int, dtype: torch.dtype) -> list[Tensor | None]:
    return [None if weight is None else weight[expert].to(dtype) for weight in experts]


def _check(x: Tensor, chosen: Tensor, weights: Tensor | None, gate: Tensor, up: Tensor | None, down: Tensor, gate_bias: Tensor | None,
           up_bias: Tensor | None, bias: Tensor | None, activation: str) -> None:
    fits = x.dim() >= 1 and gate.dim() == down.dim() == 3 and chosen.dim() == x.dim() and chosen.shape[:-1] == x.shape[:-1]
    fits = fits and (weights is None or weights.shape == chosen.shape) and (up is None or up.shape == gate.shape)
    fits = fits and x.shape[-1] == gate.shape[2] and down.shape[0] == gate.shape[0] and down.shape[2] == gate.shape[1]
    fits = fits and all(vector is None or tuple(vector.shape) == like for vector, like in (
        (gate_bias, gate.shape[:2]), (up_bias, gate.shape[:2]), (bias, down.shape[:2]))) and (up is not None or up_bias is None)
    given = (x, chosen, weights, gate, up, down, gate_bias, up_bias, bias)
    shapes = [None if tensor is None else tuple(tensor.shape) for tensor in given]
    needs = "[..., K], [..., k], [..., k] or None, [E, H, K], [E, H, K] or None, [E, N, H] and biases [E, H], [E, H] beside up, [E, N] or None"
    torch._check(fits, lambda: f"experts_ffn: x, chosen, weights, gate, up, down and biases have shapes {shapes}, needs {needs}")  # type: ignore[no-untyped-call]
    torch._check(chosen.dtype in (torch.int32, torch.int64), lambda: f"experts_ffn: chosen is {chosen.dtype}, needs int32 or int64")  # type: ignore[no-untyped-call]
    torch._check(activation in ACTIVATIONS, lambda: f"experts_ffn: no activation {activation!r}")  # type: ignore[no-untyped-call]


def _everywhere(x: Tensor, chosen: Tensor, weights: Tensor | None, gate: Tensor, up: Tensor | None, down: Tensor, gate_bias: Tensor | None = None,
                up_bias: Tensor | None = None, bias: Tensor | None = None, *, activation: str) -> Tensor:
    """Multiplied in x's own dtype where all weights have it: then every expert's hidden values and outputs are rounded to it, too."""
    _check(x, chosen, weights, gate, up, down, gate_bias, up_bias, bias, activation)
    experts = (gate, up, down, gate_bias, up_bias, bias)
    return _computed(x, chosen, weights, experts, activation, _shared_dtype(x, experts))


def _shared_dtype(x: Tensor, experts: Weights) -> torch.dtype:
    same = all(tensor is None or tensor.dtype is x.dtype for tensor in experts)
    return x.dtype if same else compute_dtype(x, experts[0])


def _fake(x: Tensor, chosen: Tensor, weights: Tensor | None, gate: Tensor, up: Tensor | None, down: Tensor, gate_bias: Tensor | None = None,
          up_bias: Tensor | None = None, bias: Tensor | None = None, *, activation: str) -> Tensor:
    _check(x, chosen, weights, gate, up, down, gate_bias, up_bias, bias, activation)
    return x.new_empty((*x.shape[:-1], down.shape[1]))


DIFFERENTIABLE = (0, 2, 3, 4, 5, 6, 7, 8)  # of the arguments: all but the choice


def _gradients(grad: Tensor, x: Tensor, chosen: Tensor, weights: Tensor | None, gate: Tensor, up: Tensor | None, down: Tensor,
               gate_bias: Tensor | None, up_bias: Tensor | None, bias: Tensor | None, activation: str, needed: Sequence[bool]) -> list[Tensor]:
    """Of the DIFFERENTIABLE arguments that are needed, in their order. What an expert computed is computed again."""
    experts = (gate, up, down, gate_bias, up_bias, bias)
    found = [tensor.zero_() for tensor in _fake_gradients(grad, x, chosen, weights, *experts, activation, needed)]
    whole = dict(zip([at for at, wanted in zip(DIFFERENTIABLE, needed, strict=True) if wanted], found, strict=True))
    dtype, wide = _shared_dtype(x, experts), compute_dtype(x, gate)
    rows, coming = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    flat = None if weights is None else weights.reshape(-1, 1)
    for_x = rows.new_zeros(rows.shape, dtype=wide) if 0 in whole else None
    for expert, places in by_expert(chosen, gate.shape[0]):
        own = places // chosen.shape[-1]
        part, above = rows[own].to(dtype), coming[own].to(dtype)
        scaled = above if flat is None else (above * flat[places].to(wide)).to(dtype)
        of_part, of_weights, of_own = _one(part, above, scaled, _of(experts, expert, dtype), activation, 2 in whole)
        if for_x is not None:
            for_x.index_add_(0, own, of_part.to(wide))
        if of_weights is not None:
            whole[2].reshape(-1)[places] = of_weights.to(whole[2].dtype)
        for at, value in zip(DIFFERENTIABLE[2:], of_own, strict=True):
            if at in whole and value is not None:
                whole[at][expert] = value()
    if for_x is not None:
        whole[0].copy_(for_x.reshape(x.shape))
    return found


def _one(part: Tensor, above: Tensor, scaled: Tensor, own: list[Any], activation: str,
         weighted: bool) -> tuple[Tensor, Tensor | None, list[Callable[[], Tensor] | None]]:
    """Gradients of one expert's rows, of their weights, and, to be called for those that are needed, of its weights."""
    gate, up, down, gate_bias, up_bias, bias = own
    gates, ups = linear(part, gate, gate_bias), None if up is None else linear(part, up, up_bias)
    neurons = hidden(activation, gates, ups)
    of_neurons, of_ups = scaled @ down, None
    of_gates = SLOPES[activation](of_neurons if ups is None else of_neurons * raised(activation, ups), gates)
    of_part = of_gates @ gate
    if ups is not None:
        of_ups = of_neurons * ACTIVATIONS[activation](gates)
        of_ups = SLOPES[UP[activation]](of_ups, ups) if activation in UP else of_ups
        of_part = of_part + of_ups @ up
    of_weights = (above * linear(neurons, down, bias)).sum(-1, dtype=torch.promote_types(above.dtype, torch.float32)) if weighted else None
    summed = partial(torch.sum, dim=0)
    return of_part, of_weights, [
        lambda: of_gates.t() @ part, None if of_ups is None else lambda: of_ups.t() @ part, lambda: scaled.t() @ neurons,
        lambda: summed(of_gates), None if of_ups is None else lambda: summed(of_ups), lambda: summed(scaled)]


def _fake_gradients(grad: Tensor, x: Tensor, chosen: Tensor, weights: Tensor | None, gate: Tensor, up: Tensor | None, down: Tensor,
                    gate_bias: Tensor | None, up_bias: Tensor | None, bias: Tensor | None, activation: str, needed: Sequence[bool]) -> list[Tensor]:
    arguments = (x, chosen, weights, gate, up, down, gate_bias, up_bias, bias)
    return [arguments[at].new_empty(arguments[at].shape) for at, wanted in zip(DIFFERENTIABLE, needed, strict=True) if wanted]  # type: ignore[union-attr]


def _setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, *[None] * (9 - len(inputs)))  # biases that are left out
    ctx.activation = keyword_only_inputs["activation"]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, weights, the experts' weights and biases; the choice has none."""
    asked = (*ctx.needs_input_grad, *[False] * 9)
    needed = [asked[at] for at in DIFFERENTIABLE]
    found = iter(torch.ops.sparsify.experts_ffn_backward.default(grad, *ctx.saved_tensors, ctx.activation, needed))
    return tuple(next(found) if at in DIFFERENTIABLE and is_needed else None for at, is_needed in enumerate(ctx.needs_input_grad))


ARGUMENTS = ("Tensor x, Tensor chosen, Tensor? weights, Tensor gate, Tensor? up, Tensor down, "
             "Tensor? gate_bias{0}, Tensor? up_bias{0}, Tensor? bias{0}")  # fmt: skip
LIBRARY.define(f"experts_ffn({ARGUMENTS.format('=None')}, *, str activation) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("experts_ffn", _everywhere, "CompositeExplicitAutograd")
torch.library.register_fake("sparsify::experts_ffn", _fake, lib=LIBRARY)
LIBRARY.define(f"experts_ffn_backward(Tensor grad, {ARGUMENTS.format('')}, str activation, bool[] needed) -> Tensor[]",
               tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("experts_ffn_backward", _gradients, "CompositeExplicitAutograd")
torch.library.register_fake("sparsify::experts_ffn_backward", _fake_gradients, lib=LIBRARY)
torch.library.register_autograd("sparsify::experts_ffn", _backward, setup_context=_setup, lib=LIBRARY)
op = torch.ops.sparsify.experts_ffn.default
