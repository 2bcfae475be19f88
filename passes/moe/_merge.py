"""Several experts as one: who goes together with whom, and the weights that stand for all of them (as in M-SMoE, Li et al., arXiv:2310.01334)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.passes.moe._observed import Observed

SAMPLE = 256  # rows on which experts are compared


def alike(evidence: Observed, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(int64 [count], ascending: of each group the expert of highest score; int64 [E]: the place in it of each expert's own).

    Groups are those of average linkage by the distances between outputs on rows of calibration (HC-SMoE, Chen et al., arXiv:2410.08589).
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    step = max(1, evidence.x.shape[0] // SAMPLE)
    x = evidence.x[::step][:SAMPLE]
    outputs = torch.stack([evidence.output(expert, x).flatten() for expert in range(evidence.experts)])
    labels = torch.from_numpy(fcluster(linkage(outputs.double().numpy(), "average"), count, "maxclust")).long()
    members = [(labels == label).nonzero()[:, 0] for label in sorted(set(labels.tolist()))]
    best = torch.stack([own[scores[own].argmax()] for own in members])
    order = best.argsort()
    groups = torch.empty(evidence.experts, dtype=torch.int64)
    for place, number in enumerate(order.tolist()):
        groups[members[number]] = place
    return best[order], groups


def merged(evidence: Observed, kept: Tensor, groups: Tensor) -> dict[str, Tensor]:
    """float32 [E', ...]: the means of each group's experts, weighted with how often they were chosen, neuron by neuron as they fit to the kept one's.

    groups int64 [E]: places in kept. An expert alone in its group stays what it is.
    """
    found = {name: tensor[kept].clone() for name, tensor in evidence.tensors.items()}
    for place, first in enumerate(kept.tolist()):
        members = (groups == place).nonzero()[:, 0].tolist()
        shares = evidence.times[members].double().clamp_min(1)
        if len(members) > 1:
            for name in found:
                parts = torch.stack([_aligned(evidence, first, other)[name].double() for other in members])
                found[name][place] = torch.einsum("e,e...->...", shares / shares.sum(), parts).float()
    return found


def _aligned(evidence: Observed, first: int, other: int) -> dict[str, Tensor]:
    """An expert's tensors with its neurons in the order in which they are the most like those of `first`: it computes what it did."""
    from scipy.optimize import linear_sum_assignment

    if other == first:
        return {name: tensor[first] for name, tensor in evidence.tensors.items()}
    order = torch.from_numpy(linear_sum_assignment((_neurons(evidence, first) @ _neurons(evidence, other).T).numpy(), maximize=True)[1])
    moved = {}
    for name, tensor in evidence.tensors.items():
        own = tensor[other]
        moved[name] = own if name == "bias" else own[:, order] if name == "down" else own[order]
    return moved


def _neurons(evidence: Observed, expert: int) -> Tensor:
    """float64 [H, features]: all weights of each neuron."""
    ffn = evidence.ffn(expert)
    parts = [ffn.gate, *([] if ffn.up is None else [ffn.up]), ffn.down.T]
    return torch.cat(parts, 1).double()
