"""Least squares: down and the biases are fitted to the dense FFN's output, with the experts that calibration chose."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsify_compiler.passes.moe._evidence import Evidence
from sparsify_compiler.passes.moe._fit import ridge_of
from sparsify_compiler.passes.moe._split import Split
from sparsify_compiler.passes.moe.repairs._base import computed
from sparsify_compiler.passes.moe.repairs.mean import mean

STATISTICS = ("rows",)


def least_squares(evidence: Evidence, split: Split, chosen: Tensor, *, damp: float = 0.1) -> Split:
    """The smallest change from what `mean` gives that fits, with damp times the mean square on the diagonal.

    All experts together are not the dense FFN any more.
    """
    split = mean(evidence, split, chosen)
    assert split.bias is not None
    assert split.base is not None
    neurons, count = computed(evidence, split, chosen)
    shared = evidence.neurons[:, split.always]
    features = torch.cat([(neurons * count[..., None]).flatten(1), shared, count], 1)
    known = torch.cat([split.down.transpose(0, 1).flatten(1), split.shared["down"], split.bias.T], 1).float()
    dense = linear(evidence.neurons, evidence.ffn.down, evidence.ffn.bias)
    change, offset = ridge_of(features, dense - linear(features, known, split.base.float()), damp)
    fitted, width = known + change, neurons.shape[1] * neurons.shape[2]
    down = fitted[:, :width].reshape(-1, *neurons.shape[1:]).transpose(0, 1).contiguous()
    always = fitted[:, width : width + shared.shape[1]].contiguous()
    return replace(split, down=down, shared={**split.shared, "down": always}, bias=fitted[:, -split.experts :].T.contiguous(),
                   base=split.base + offset)
