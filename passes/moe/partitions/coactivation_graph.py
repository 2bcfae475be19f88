"""Co-activation graph: a cut into equal parts that keeps together what is active together (MoEfication, arXiv:2110.01786, section 3.2).

The paper cuts with METIS. Here the parts begin as balanced clusters of the graph's leading eigenvectors, and neurons move to the part that they share
most edges with for as long as that keeps more of the graph inside the parts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from sparsify_compiler.passes.moe._balance import balanced, clusters, table_of
from sparsify_compiler.passes.moe._evidence import Evidence

STATISTICS = ("rows",)


def coactivation_graph(evidence: Evidence, neurons: Tensor, experts: int, *, share: float = 0.1, rounds: int = 10) -> Tensor:
    """An edge weighs in how many rows both of its neurons are in evidence.active(share), over the root of in how many each of them is."""
    active = evidence.active(share)[:, neurons].float()
    graph = active.T @ active
    degree = graph.diagonal().clamp_min(1).rsqrt()
    graph = (graph * degree[:, None] * degree).fill_diagonal_(0)
    assigned = clusters(normalize(_leading(graph, experts), dim=1), experts, max(rounds, 1), evidence.generator())
    inside = _inside(graph, assigned)
    for _ in range(rounds):
        moved = balanced(-(graph @ one_hot(assigned, experts).float()), experts)
        if (kept := _inside(graph, moved)) <= inside:
            break
        assigned, inside = moved, kept
    return table_of(neurons, assigned, experts)


def _leading(graph: Tensor, count: int) -> Tensor:
    """The eigenvectors [H', count] of the largest eigenvalues; where these are few of all, by Lanczos' method, which begins where it is told."""
    from scipy.sparse.linalg import eigsh

    size = graph.shape[0]
    if 4 * count >= size:
        every: Tensor = torch.linalg.eigh(graph).eigenvectors
        return every[:, -count:]
    _, vectors = eigsh(graph.numpy(), k=count, which="LA", v0=torch.ones(size, dtype=graph.dtype).numpy())
    return torch.as_tensor(vectors, dtype=graph.dtype)


def _inside(graph: Tensor, assigned: Tensor) -> float:
    return float(graph[assigned[:, None] == assigned].sum())
