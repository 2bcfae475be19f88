"""held_ffn: an FFN that computes, of a text that goes on, only the neurons that the text's prompt used most."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsify_compiler import session

from ._linear import LIBRARY
from .select_ffn import hidden


@dataclass
class Held:
    """Of one FFN and one text: votes of the prompt's tokens for each neuron, float32 [batch, H]; what follows from them, when it is first needed."""

    votes: Tensor
    cut: tuple[list[Tensor | None], Tensor | None] | None = None


def reference(x: Tensor, up: Tensor, down: Tensor, gate: Tensor | None = None, gate_bias: Tensor | None = None, up_bias: Tensor | None = None,
              bias: Tensor | None = None, *, activation: str, density: float, share: float, prompt: int, key: str) -> Tensor:
    """y = down (activation(gate x + gate_bias) * (up x + up_bias)) + bias, or down activation(up x + up_bias) + bias without a gate.

    x [batch, tokens, K] -> y [batch, tokens, N] of the same dtype; gate and up [H, K], down [N, H].

    A call that begins a text, and one of `prompt` tokens or more, is computed whole, and each of its tokens that is no padding votes: for the `share`
    of its positive neurons that are largest; or, with a share of 0, for every neuron with the square of what it adds to y. Any other call computes
    the density * H neurons of most votes, each row of the batch its own, and 0 for the others; the weights of those that a batch needs are cut
    out once a text. Whole, where nothing is known of the text: see session.py.

    key  names this FFN among those of its model
    """
    weights = [gate, gate_bias, up, up_bias, down]
    call = None if session.traced(x) else session.current()
    if call is None or call.text is None or x.dim() != 3:
        return linear(_hidden(x, weights, activation), down, bias)
    held: Held | None = call.text.get(key)
    fits = held is not None and held.votes.shape[0] == x.shape[0]
    if not call.begins and x.shape[1] < prompt:
        if held is None or not fits:
            return linear(_hidden(x, weights, activation), down, bias)
        held.cut = held.cut or _cut(held.votes, weights, density)
        (*first, last), rows = held.cut
        neurons = _hidden(x, [*first, last], activation)
        return linear(neurons if rows is None else neurons * rows, last, bias)  # type: ignore[arg-type]
    neurons = _hidden(x, weights, activation)
    votes = _votes(neurons.detach(), down, share, call.real)
    call.text[key] = Held(votes + held.votes if held is not None and fits and not call.begins else votes)
    return linear(neurons, down, bias)


def _hidden(x: Tensor, weights: list[Tensor | None], activation: str) -> Tensor:
    gate, gate_bias, up, up_bias, _ = weights
    raw = linear(x, up, up_bias)  # type: ignore[arg-type]
    return hidden(activation, raw) if gate is None else hidden(activation, linear(x, gate, gate_bias), raw)


def _votes(neurons: Tensor, down: Tensor, share: float, real: Tensor | None) -> Tensor:
    neurons = neurons.float()
    if share == 0:
        found = neurons.square() * down.float().square().sum(0)
    else:
        ordered = neurons.sort(-1, descending=True).values
        count = ((neurons > 0).sum(-1, keepdim=True) * share).ceil().long()
        limit = ordered.gather(-1, (count - 1).clamp_min(0))
        found = ((neurons >= limit) & (neurons > 0)).float()
    return found.sum(1) if real is None or real.shape != found.shape[:2] else found.masked_fill(~real[..., None], 0).sum(1)


def _cut(votes: Tensor, weights: list[Tensor | None], density: float) -> tuple[list[Tensor | None], Tensor | None]:
    """The weights of the neurons that some row of the batch holds, and which of those each row does, [batch, 1, held]; None where all hold all."""
    width = votes.shape[1]
    count = min(max(1, math.ceil(density * width - 1e-9)), width)
    mask = torch.zeros(votes.shape, dtype=torch.bool, device=votes.device).scatter_(1, votes.topk(count, 1).indices, True)
    chosen = mask.any(0).nonzero()[:, 0]
    *first, down = weights
    cut = [None if weight is None else weight.index_select(0, chosen) for weight in first]
    assert down is not None
    rows = mask[:, chosen]
    return [*cut, down.index_select(1, chosen)], None if bool(rows.all()) else rows[:, None].to(down.dtype)


LIBRARY.define("held_ffn(Tensor x, Tensor up, Tensor down, Tensor? gate=None, Tensor? gate_bias=None, Tensor? up_bias=None, Tensor? bias=None, *, "
               "str activation, float density, float share, int prompt, str key) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("held_ffn", reference, "CompositeImplicitAutograd")
op: Any = torch.ops.sparsify.held_ffn.default
