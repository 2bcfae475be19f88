"""Branches: one attention as several — some over chosen blocks, some over summaries of the keys — that gates add up; for models trained with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from .block_layout import merge_branches
from .block_tables import PARSED
from .errors import ParseError
from .indexer import UNLEARNED, Indexer

GATE = ("gate_weight", "gate_bias")
MERGES = ("gates", "lse")


class Branch(Protocol):
    """An Indexer, or a frozen dataclass of passes/attention/branches. Its learned tensors come by name; equal names are one tensor."""

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of the tensors that it needs."""

    def branch(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, bias: Tensor | None, causal: bool, scale: float,
               weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(out [B, H, Q, E], lse [B, H, Q]) of query [B, H, Q, D], key and value [B, G, K, ...], of which key_mask [B, K] count."""


@dataclass(frozen=True)
class Branches:
    """The branches of one attention, as plain options; str() and parse() are inverses.

    parts   Indexers and branches of passes/attention/branches
    merge   "gates": the sum of each branch's output times a sigmoid of the query, which is learned for each head; or "lse": exactly what one softmax
            over the keys of all branches, which are then disjoint, gives

    It never runs densely: dense attention is another function.
    """

    parts: tuple[Any, ...] = ()
    merge: str = "gates"

    dense_below = dense_below_decoding = 0
    dense_kernel_from = None

    def __post_init__(self) -> None:
        if not self.parts or not all(callable(getattr(part, "branch", None)) for part in self.parts):
            raise ParseError(f"branches are indexers and their like, got {self.parts}", where="Branches",
                             hint="for example parts=(Indexer(always=(SlidingWindow(window=512),)), Compressed(length=32, stride=16))")
        if self.merge not in MERGES:
            raise ParseError(f"branches are merged by {' or '.join(MERGES)}, not by {self.merge!r}", where="Branches")
        if any(getattr(part, "dense_below", 0) or getattr(part, "dense_below_decoding", 0) for part in self.parts):
            raise ParseError("a branch that runs densely below some length would be another function there", where="Branches")

    def __str__(self) -> str:
        from .pipeline_text import print_value

        return print_value(self)

    @cached_property
    def learned(self) -> tuple[str, ...]:
        """Names of the tensors that it needs, in the order in which ops are given them."""
        names = [name for part in self.parts for name in part.learned]
        return tuple(dict.fromkeys([*names, *(GATE if self.merge == "gates" else ())]))

    def is_dense(self, queries: int, keys: int) -> bool:
        """Never."""
        return False

    def branch(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, bias: Tensor | None, causal: bool, scale: float,
               weights: Mapping[str, Tensor] = UNLEARNED) -> tuple[Tensor, Tensor]:
        """Attention [B, H, Q, E] of query [B, H, Q, D] to key and value [B, G, K, ...], with the tensors of `learned`; and the lse of all keys read.

        gate_weight [H, D, parts] and gate_bias [H, parts], where there are gates.
        """
        found = [part.branch(query, key, value, key_mask, bias, causal, scale, weights) for part in self.parts]
        merged, total = merge_branches(found)
        if self.merge == "lse":
            return merged, total
        dtype = torch.promote_types(query.dtype, torch.float32)
        gates = torch.sigmoid(query.to(dtype) @ weights["gate_weight"].to(dtype) + weights["gate_bias"].to(dtype)[:, None])
        out = (torch.stack([part.to(dtype) for part, _ in found], -1) * gates[..., None, :]).sum(-1)
        return out.to(query.dtype), total


@lru_cache(PARSED)
def parse(text: str) -> Indexer | Branches:
    """The Indexer or the Branches of a text. Raises ParseError."""
    from .pipeline_text import build, parse_call

    name, options = parse_call(text)
    if name != "Branches":
        return Indexer.parse(text)
    found: Branches = build(Branches, options, name)
    return found
