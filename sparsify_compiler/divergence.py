"""How far a model's outputs have moved from the dense model's, as one number that adds up over small changes; and its curvature.

Of logits of tokens the Kullback-Leibler divergence, in nats a token; of any other output 1 - cosine, the mean over its vectors. Several outputs are
summed. Vectors of padded positions do not count, where the batch holds a mask of them. Both are 0 for the dense model with slope 0, so a small change
brings half of a quadratic form, that of the Gauss-Newton matrix J^T H J, whose factor J^T u a random cotangent u with E[u u^T] = H gives
(Martens, arXiv:1412.1193, section 9).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.utils import _pytree as pytree

from .calibrate_loss import mask_of, tokens_of
from .errors import CalibrationError

Inputs = tuple[Any, ...] | Mapping[str, Any]
ROWS = 32  # of logits that are looked at together, which caches hold
NATS, COSINE = "nats a token", "1 - cosine"


def divergence(reference: Sequence[Tensor], outputs: Sequence[Tensor], batch: Inputs) -> float:
    """How far `outputs`, flat, are from those of the dense model on the same batch. NaN where one of them is."""
    total = 0.0
    for (old, kept, of_tokens), new in zip(_parts(reference, batch), _floating(outputs), strict=True):
        new = new.reshape(-1, new.shape[-1])[kept]
        if of_tokens:
            each = torch.cat([_nats(*pair) for pair in zip(torch.split(old, ROWS), torch.split(new, ROWS), strict=True)])
        else:
            each = torch.where((old == new).all(1), 0.0, 1 - cosine_similarity(old.double(), new.double(), dim=-1))
        total += float(each.mean()) if len(each) else 0.0
    return total


def _nats(old: Tensor, new: Tensor) -> Tensor:
    """KL(softmax(old) || softmax(new)) of each row, float64 [rows].

    It is log(sum p exp(d)) where d = new - old less its mean under p = softmax(old), and so next to 0 as exact as d is, also in float32, in which
    it takes a sixth of the time.
    """
    old, new = old.float(), new.float()
    p = old.softmax(-1)
    d = new - old
    d -= (p * d).sum(-1, keepdim=True)
    near = (p * d.expm1()).sum(-1).double().log1p()
    if bool(near.isfinite().all()):
        return near.clamp_min(0.0)
    before, after = old.double().log_softmax(-1), new.double().log_softmax(-1)  # exp(d) may be too large for a float, or a word impossible
    return (before.exp() * (before - after)).sum(-1)


class Curvature:
    """A loss whose gradient by anything inside the model is J^T u: squared and averaged, it is the curvature of the divergence there.

    unit  what the divergence is counted in, once the loss was asked for
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.unit = COSINE

    def __call__(self, output: Any, batch: Inputs) -> Tensor:
        """Raises CalibrationError where no output has a gradient."""
        leaves = _floating(pytree.tree_leaves(output))
        terms = []
        for leaf, (old, kept, of_tokens) in zip(leaves, _parts(leaves, batch), strict=True):
            self.unit = NATS if of_tokens else self.unit
            if leaf.requires_grad and len(old):
                cotangent = _of_logits(old, self._generator) if of_tokens else _of_vectors(old, self._generator)
                terms.append((cotangent * leaf.reshape(-1, leaf.shape[-1])[kept].float()).sum() / len(old) ** 0.5)
        if not terms:
            raise CalibrationError("no output of the model depends on its weights in a way that has a gradient", where="calibration",
                                   hint="plan with a model that returns floating-point tensors")
        total: Tensor = torch.stack(terms).sum()
        return total


def _of_logits(logits: Tensor, generator: torch.Generator) -> Tensor:
    """softmax - one-hot of a word drawn by it: the Fisher information's factor."""
    p = logits.float().softmax(-1)
    drawn = torch.multinomial(p, 1, generator=generator)
    return p.scatter_add(1, drawn, torch.full_like(p[:, :1], -1.0))


def _of_vectors(vectors: Tensor, generator: torch.Generator) -> Tensor:
    """Noise at a right angle to each vector, over its length: 1 - cosine is ||what moves it sideways||^2 / (2 ||vector||^2)."""
    noise = torch.randn(vectors.shape, generator=generator, dtype=torch.float32)
    length = vectors.float().norm(dim=1, keepdim=True).clamp_min(1e-30)
    unit = vectors.float() / length
    sideways: Tensor = (noise - (noise * unit).sum(1, keepdim=True) * unit) / length
    return sideways


def _parts(outputs: Sequence[Any], batch: Inputs) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """(its vectors that count, detached [n, width], which those are of all, whether they are logits of tokens) of every floating-point output."""
    for leaf in _floating(outputs):
        flat = leaf.detach().reshape(-1, leaf.shape[-1])
        mask = mask_of(leaf.detach()[..., 0], batch)
        kept = torch.ones(len(flat), dtype=torch.bool) if mask is None else mask.reshape(-1) != 0
        yield flat[kept], kept, tokens_of(leaf, batch) is not None


def _floating(leaves: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 0 and leaf.shape[-1] > 0]
