"""Several low-rank changes beside the layer, of which a router chooses for every row (LLaVA-MoLE, arXiv:2401.16160; SMoRA, arXiv:2501.15103)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsify_compiler.errors import ParseError
from sparsify_compiler.passes.train.adapters._base import Adapter, factors, uniform


def routed_low_rank(weight: Tensor, seed: int, mask: Tensor | None = None, *, experts: int = 4, rank: int = 8, chosen: int = 1,
                    scale: float = 1.0) -> Adapter:
    """scale * linear(gate * linear(x, reads), writes), reads [experts * rank, in]; a row's gate is the softmax of its scores at the highest of them.

    chosen  how many experts a row uses. rank=1 makes an expert of each rank
    """
    if not 1 <= chosen <= experts:
        raise ParseError(f"chosen lies between 1 and the experts, got {chosen} of {experts}", where="adapter routed_low_rank")
    tensors = factors(weight, experts * rank, seed) if rank >= 1 else factors(weight, rank, seed)
    route = uniform((experts, weight.shape[1]), seed + 1).to(weight)
    return Adapter("beside", partial(_change, rank=rank, chosen=chosen, scale=scale), {**tensors, "route": route})


def _change(x: Tensor, reads: Tensor, writes: Tensor, route: Tensor, *, rank: int, chosen: int, scale: float) -> Tensor:
    odds = linear(x, route).softmax(-1)
    best = odds.topk(chosen, -1)  # of scores that are alike some, never more than were asked for
    gate = torch.zeros_like(odds).scatter(-1, best.indices, best.values).repeat_interleave(rank, -1)
    y = linear(linear(x, reads) * gate, writes)
    return y if scale == 1 else y * scale
