"""Search for an order of input channels under which n of every m keep more score."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.passes.prune.structures._base import keep_top

GAIN = 1e-6  # of the score: less is rounding


def kept_score(score: Tensor, n: int, m: int) -> float:
    """The sum of the n highest of every m consecutive columns of `score` [rows, columns]; m divides the columns."""
    groups = score.reshape(-1, m)
    return float(groups[keep_top(groups, n)].sum(dtype=torch.float64))


def search(score: Tensor, n: int, m: int, rounds: int, rows: int, seed: int) -> Tensor:
    """An order int64 [columns] such that score[:, order] keeps no less than `score` in the order that it has.

    Starts from the given order, or from dealing the columns to the groups by their sum (the heuristic of Plug-and-Play, ICLR 2024), whichever
    keeps more. Then, slot by slot, one column of every group is taken out and they are assigned anew, by swaps of two that keep more, until
    nothing moves or `rounds` are over. Among more than `rows` rows the search looks at that many, drawn with the seed. float [rows, columns] >= 0.
    """
    columns = score.shape[1]
    rand = torch.Generator().manual_seed(seed)
    seen = score if score.shape[0] <= rows else score[torch.randperm(score.shape[0], generator=rand)[:rows].to(score.device)]
    orders = [torch.arange(columns, device=score.device), _dealt(seen, m)]
    order = max(orders, key=lambda one: kept_score(seen[:, one], n, m))
    for _ in range(rounds):
        before = order
        for slot in torch.randperm(m, generator=rand).tolist():
            order = _assign(seen, order, slot, n, m)
        if torch.equal(order, before):
            break
    better = kept_score(score[:, order], n, m) > kept_score(score, n, m) * (1 + GAIN)
    return order if better else orders[0]


def _dealt(score: Tensor, m: int) -> Tensor:
    """Columns by their sum, dealt to the groups back and forth, so that every group gets large and small ones."""
    ranked = score.sum(0).argsort(descending=True, stable=True).view(m, -1)
    ranked[1::2] = ranked[1::2].flip(1)
    return ranked.T.reshape(-1)


def _assign(score: Tensor, order: Tensor, slot: int, n: int, m: int) -> Tensor:
    """The order with the columns in one slot of each group assigned anew."""
    groups = order.view(-1, m)
    rest = torch.cat([groups[:, :slot], groups[:, slot + 1:]], 1)
    moving = groups[:, slot]
    # A column c adds to a group what it has more than the group's n-th highest, which it pushes out: sum over rows of max(0, c - limit).
    limit = score[:, rest.reshape(-1)].view(score.shape[0], *rest.shape).topk(n, 2).values[..., -1]
    candidates = score[:, moving]
    gain = (torch.cdist(limit.T, candidates.T, p=1) + candidates.sum(0) - limit.sum(0)[:, None]) / 2  # max(0, x) is (|x| + x) / 2
    return torch.cat([groups[:, :slot], moving[_swapped(gain)][:, None], groups[:, slot + 1:]], 1).view(-1)


def _swapped(gain: Tensor) -> Tensor:
    """Which column each group takes, from gain [groups, columns]: the diagonal, improved by swaps of two until none gains."""
    size = gain.shape[0]
    taken = torch.arange(size, device=gain.device)
    least = GAIN * float(gain.diagonal().sum()) / max(size, 1)
    for _ in range(4 * size):
        now = gain[:, taken]  # [group, the column that another group has]
        own = now.diagonal()
        change = now + now.T - own[:, None] - own
        best, partner = change.max(1)
        every = torch.arange(size, device=gain.device)
        pairs = (best > least) & (partner[partner] == every) & (every < partner)  # both want each other: no two swaps meet
        if not bool(pairs.any()):
            flat = int(change.argmax())
            if float(change.reshape(-1)[flat]) <= least:
                break
            one, other = torch.tensor([flat // size]), torch.tensor([flat % size])
        else:
            one, other = every[pairs], partner[pairs]
        taken[one], taken[other] = taken[other], taken[one]
    return taken
