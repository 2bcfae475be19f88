"""Which of two rewritten models is better, as the whole of them says on the calibration batches, and not the sum of estimates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from sparsify_compiler.calibrate_loss import Loss, next_token_loss, tokens_of
from sparsify_compiler.call import call_arguments, instantiate
from sparsify_compiler.divergence import divergence
from sparsify_compiler.held_out import upper
from sparsify_compiler.program import Program

FEWEST = 3  # batches that can tell chance from a difference


@dataclass(frozen=True)
class Verdict:
    """What a model does on each batch.

    moved   how far its outputs are from the dense model's (see divergence)
    lost    its loss: the user's, or of the next token, in nats; empty where there is none
    counts  of what each of the losses is the mean: tokens, or 1
    """

    moved: tuple[float, ...]
    lost: tuple[float, ...]
    counts: tuple[int, ...]

    def better(self, other: Verdict) -> bool:
        """Does it lose less by more than chance, batch by batch; and where the loss cannot tell, do its outputs stay nearer?

        The loss knows what the divergence does not, that the dense model is not the best there is, and is far noisier: over n tokens it errs by
        sqrt(2 d / n) where the divergence is d. Of one batch nobody knows how much of a difference is chance, so its loss says nothing.
        Batches that only one of them has seen do not count.
        """
        if min(len(self.lost), len(other.lost)) > 1:
            rises = [mine - theirs for mine, theirs in zip(self.lost, other.lost, strict=False)]
            counts = self.counts[: len(rises)]
            if upper(rises, counts) < 0:
                return True
            if upper([-rise for rise in rises], counts) < 0:
                return False
        both = min(len(self.moved), len(other.moved))
        return sum(self.moved[:both]) < sum(other.moved[:both])

    def differs(self, other: Verdict) -> bool:
        """Have FEWEST batches or more said already which of the two stays nearer, by more than chance?"""
        apart = [mine - theirs for mine, theirs in zip(self.moved, other.moved, strict=False)]
        if len(apart) < FEWEST:
            return False
        return upper(apart, [1] * len(apart)) < 0 or upper([-one for one in apart], [1] * len(apart)) < 0


def verdicts(program: Program, rewritten: Sequence[Program], batches: Sequence[Any], loss: Loss | None = None,
             against: Verdict | None = None) -> list[Verdict]:
    """Of rewritten Programs, batch by batch beside the dense one: outputs of a language model are too large to be kept.

    Where there is no loss and the first of them clearly differs from the second, or from `against`, the batches that are left say nothing new.
    """
    dense, others = instantiate(program), [instantiate(one) for one in rewritten]
    moved: list[list[float]] = [[] for _ in others]
    lost: list[list[tuple[float, int]]] = [[] for _ in others]
    found: list[Verdict] = []
    with torch.no_grad():
        for batch in batches:
            args, kwargs = call_arguments(batch)
            old = pytree.tree_leaves(dense(*args, **kwargs))
            for place, other in enumerate(others):
                output = other(*args, **kwargs)
                moved[place].append(divergence(old, pytree.tree_leaves(output), batch))
                lost[place] += _loss(output, batch, loss)
            found = [Verdict(tuple(far), *_known(rows)) for far, rows in zip(moved, lost, strict=True)]
            rival = found[1] if len(found) > 1 else against
            if rival is not None and not found[0].lost and found[0].differs(rival):
                break
    return found


def _loss(output: Any, batch: Any, loss: Loss | None) -> list[tuple[float, int]]:
    """(the mean, of how many), or nothing where the batch has no loss."""
    if loss is not None:
        return [(float(loss(output, batch)), 1)]
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    if all(tokens_of(leaf, batch) is None for leaf in leaves):
        return []
    value, tokens = next_token_loss(output, batch)
    return [(float(value), tokens)] if tokens else []


def _known(rows: Sequence[tuple[float, int]]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    return tuple(value for value, _ in rows), tuple(count for _, count in rows)
