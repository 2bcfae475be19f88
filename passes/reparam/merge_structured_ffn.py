"""The structured layers of an FFN as dense ones ahead of time, where few rows make launches dearer than arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import linear

from sparsify_compiler.cost import VIEWS, Cost, conv_cost, elementwise_cost, quantity, size
from sparsify_compiler.fold import is_constant
from sparsify_compiler.normal_form_edit import same_shape
from sparsify_compiler.passes.reparam._weights import tied_in
from sparsify_compiler.passes.reparam.merge_linear_chain import after
from sparsify_compiler.passes_api import Miss
from sparsify_compiler.pattern import op_name
from sparsify_compiler.rule import Match, Rule, RulePass


@dataclass(frozen=True)
class MergeStructuredFfn(RulePass):
    """Merge the factors of a structured linear (LowRank, BlockShuffle, BlockDense) into one dense weight, for the rows of the example.

    The paper keeps both forms and takes the dense one for the small batches of decoding, where its one product is faster although it has more
    operations. A Program has one form: it is chosen by cost at the example's rows.

    when    "cheaper": where the dense form costs less; "always": everywhere
    launch  what one op costs before it does anything, in operations that the machine could do meanwhile

    Matches    linear(linear(x, v), u, c); x in blocks times a [k, q, p] (bmm), then linear(., u, c) or, after a shuffle, blocks times b [l, s, r]
    Rewrites   linear(x, u v, c); linear(x, u D(a), c) with D(a) block-diagonal; linear(x, D(b) P D(a)) with P the shuffle
    Preserves  values, up to float reassociation
    Paper      Wei et al., Building on Efficient Foundations, arXiv:2406.16450, section 3 (pre-merge)
    """

    about: ClassVar[frozenset[str]] = frozenset({"bmm"})
    when: Literal["cheaper", "always"] = "cheaper"
    launch: int = 400_000  # 5 microseconds of an op in torch, at 80 G operations a second of a core

    def rules(self) -> Sequence[Rule]:
        return tuple(rule(None if self.when == "always" else self.launch) for rule in (MergeLowRank, MergeBlockShuffle, MergeBlockDense))


class _Structured(Rule):
    """What all have in common: the cost of the factors against that of the dense weight."""

    params = ("a", "b", "c", "v", "u", "e")

    def __init__(self, launch: int | None) -> None:
        self.launch = launch

    def worth(self, m: Match, outputs: int) -> Miss | None:
        if self.launch is None:
            return None
        run = [node for node in m.nodes if not is_constant(node)]
        kept = sum((_cost(node) for node in run), Cost()).work + self.launch * sum(map(_launches, run))
        dense = torch.empty(outputs, m.x.shape[-1], dtype=m.x.dtype, device="meta")
        merged = conv_cost(m.x, dense, m.output.meta["val"]).work + self.launch
        if merged < kept:
            return None
        return Miss(f"dense would cost {quantity(merged)} operations and bytes, its factors {quantity(kept)}: it pays for fewer rows")


def _cost(node: fx.Node) -> Cost:
    """Of one node; a batched product counts as what it multiplies, a view that has to be copied as what it moves."""
    out = node.meta["val"]
    if op_name(node) == "bmm":
        left, right = (node.kwargs[k].meta["val"] for k in ("self", "mat2"))  # type: ignore[union-attr]
        moved = (size(left) + size(right) + size(out)) * out.element_size()
        return Cost(2.0 * size(out) * int(left.shape[-1]), moved)
    if op_name(node) == "linear":
        return conv_cost(node.kwargs["input"].meta["val"], node.kwargs["weight"].meta["val"], out)  # type: ignore[union-attr]
    return elementwise_cost(size(out), size(out), out.element_size()) if _launches(node) else Cost()


def _launches(node: fx.Node) -> int:
    """1 for an op that runs a kernel: views do not, but a reshape of what was transposed copies."""
    source = node.kwargs.get("self")
    copies = op_name(node) == "reshape" and isinstance(source, fx.Node) and op_name(source) in ("transpose", "permute")
    return int(copies or op_name(node) not in VIEWS)


class MergeLowRank(_Structured):
    """LowRank: u v."""

    @staticmethod
    def pattern(x: Any, v: Any, e: Any, u: Any, c: Any) -> Any:
        return linear(linear(x, v, e), u, c)

    def check(self, m: Match) -> Miss | None:
        return tied_in(m, "v", "u") or self.worth(m, m.u.shape[0])

    @staticmethod
    def rewrite(x: Tensor, v: Tensor, e: Tensor | None, u: Tensor, c: Tensor | None) -> Tensor:
        return linear(x, u @ v, after(e, u, c))


def _in_blocks(x: Any, a: Any, split: Any) -> Any:
    """x [rows, k * p] times a [k, q, p], block by block: [rows, k, q]."""
    return torch.bmm(torch.reshape(x, split).transpose(0, 1), a.transpose(-1, -2)).transpose(0, 1)


def block_diagonal(a: Tensor) -> Tensor:
    """D(a) [k * q, k * p] of blocks a [k, q, p]."""
    k, q, p = a.shape
    eye = torch.eye(k, dtype=a.dtype, device=a.device)
    return (eye[:, None, :, None] * a[:, :, None, :]).reshape(k * q, k * p)


class MergeBlockDense(_Structured):
    """BlockDense: blocks, then a dense matrix."""

    def patterns(self) -> tuple[Callable[..., Any], ...]:
        def plain(x: Any, a: Any, u: Any, c: Any, split: Any, flat: Any) -> Any:
            return linear(torch.reshape(_in_blocks(x, a, split), flat), u, c)

        def leading(x: Any, a: Any, u: Any, c: Any, split: Any, flat: Any, back: Any) -> Any:
            return torch.reshape(linear(torch.reshape(_in_blocks(x, a, split), flat), u, c), back)

        return leading, plain

    def check(self, m: Match) -> Miss | None:
        return _blocks(m) or _rows(m, m.source("linear")) or _whole(m, m.u.shape[0]) or tied_in(m, "a", "u") or self.worth(m, m.u.shape[0])

    @staticmethod
    def rewrite(x: Tensor, a: Tensor, u: Tensor, c: Tensor | None) -> Tensor:
        return linear(x, u @ block_diagonal(a), c)


class MergeBlockShuffle(_Structured):
    """BlockShuffle (Monarch): blocks, a transposition of what they give, and blocks again."""

    def patterns(self) -> tuple[Callable[..., Any], ...]:
        def again(mixed: Any, b: Any, back: Any) -> Any:
            return torch.reshape(torch.bmm(mixed, b.transpose(-1, -2)).permute(1, 2, 0), back)

        def separate(x: Any, a: Any, b: Any, split: Any, rl: Any, back: Any) -> Any:
            return again(torch.reshape(_in_blocks(x, a, split), rl).transpose(-1, -2).transpose(0, 1), b, back)

        def at_once(x: Any, a: Any, b: Any, split: Any, rl: Any, back: Any) -> Any:
            return again(torch.reshape(_in_blocks(x, a, split), rl).permute(2, 0, 1), b, back)

        def square(x: Any, a: Any, b: Any, split: Any, back: Any) -> Any:  # k = r and q = l: the blocks are as they have to be
            return again(_in_blocks(x, a, split).transpose(-1, -2).transpose(0, 1), b, back)

        return separate, at_once, square

    def check(self, m: Match) -> Miss | None:
        l, s, r = m.b.shape  # noqa: E741  the paper's letters
        given = [node for node in m.nodes if op_name(node) == "reshape"][1] if "rl" in m.binding.variables else None
        if (_dims(given)[1:] if given is not None else tuple(m.a.shape[:2])) != (r, l):
            return Miss(f"what the first blocks give is not shuffled into {r} x {l}")
        return _blocks(m) or _whole(m, l * s) or tied_in(m, "a", "b") or self.worth(m, l * s)

    @staticmethod
    def rewrite(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        l, s, r = b.shape  # noqa: E741
        first = block_diagonal(a).reshape(r, l, -1)
        dense = torch.matmul(b, first.transpose(0, 1))  # [l, s, r] times [l, r, in]
        return linear(x, dense.transpose(0, 1).reshape(s * l, -1))


def _dims(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _blocks(m: Match) -> Miss | None:
    """x is split into the k blocks of p features that a multiplies."""
    k, _, p = m.a.shape
    split = next(node for node in m.nodes if op_name(node) == "reshape")
    return None if _dims(split)[1:] == (k, p) and m.x.shape[-1] == k * p else Miss(f"the input is not split into {k} blocks of {p} features")


def _rows(m: Match, product: fx.Node) -> Miss | None:
    """Between blocks and product, a row stays a row."""
    flat = product.kwargs["input"].meta["val"]  # type: ignore[union-attr]
    return None if flat.ndim == 2 and flat.shape[-1] == math.prod(m.a.shape[:2]) else Miss("what the blocks give is not laid side by side")


def _whole(m: Match, outputs: int) -> Miss | None:
    """The result has the rows of x."""
    after_all = _dims(m.output)
    return None if same_shape(after_all, (*m.x.shape[:-1], outputs)) else Miss("the result does not have the rows of the input")


class _BlockShuffle(nn.Module):
    """The paper's BlockShuffle layer."""

    def __init__(self, inputs: int, outputs: int, blocks: int) -> None:
        super().__init__()
        inner = min(inputs, outputs) // blocks
        self.a = nn.Parameter(torch.randn(blocks, inner, inputs // blocks))
        self.b = nn.Parameter(torch.randn(blocks, outputs // blocks, inner))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        rows, (k, _, p), (l, s, r) = x.shape[0], self.a.shape, self.b.shape  # noqa: E741
        mixed = _in_blocks(x, self.a, (rows, k, p)).reshape(rows, r, l).transpose(-1, -2).transpose(0, 1)
        y: Tensor = torch.bmm(mixed, self.b.transpose(-1, -2)).permute(1, 2, 0).reshape(rows, s * l) + self.bias
        return y


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """An FFN of which one layer is BlockShuffle and the other of low rank."""
    torch.manual_seed(0)
    return nn.Sequential(_BlockShuffle(8, 16, 2), nn.GELU(), nn.Linear(16, 2, bias=False), nn.Linear(2, 8)).eval(), (torch.randn(3, 8),)
