"""A key-value cache that keeps, of a prompt, the tokens that its last rows look at; and lets only some of them go on to the later layers.

Three choices: how many tokens stay (a share of them, or as many as hold a share of the attention), whether each group of heads has its own, and from
which layer on only the salient ones are computed. It watches queries, which a model does whose attention is ours (select_blocks, or what lower()
gives): elsewhere it says so. Only the first prompt is thinned; what follows is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d
from transformers.cache_utils import Cache

from .errors import InputError, ModelError
from .library_attention import WATCHED
from .library_cache import AppendingLayer
from .library_cache_streaming import Forgotten


@dataclass(frozen=True)
class Choice:
    """Which tokens of a prompt stay. See evicting_cache."""

    share: float
    mass: float | None
    window: int
    pool: int
    layer: int | None
    passed: float


class Shared:
    """What the layers of one cache tell each other: how many there are, and which tokens of this prompt go on to the later ones."""

    def __init__(self) -> None:
        self.layers = 0
        self.going: Tensor | None = None  # [B, tokens], ascending
        self.tokens = 0  # of the whole prompt


class EvictingLayer(AppendingLayer):
    """As AppendingLayer; after a prompt, `keys` and `values` are those of the tokens that stay, of each group its own, in their order."""

    def __init__(self, choice: Choice, shared: Shared) -> None:
        super().__init__()
        self.choice, self.shared, self.number = choice, shared, shared.layers
        shared.layers += 1
        self.forgotten, self.watched, self.kept = 0, True, 0
        self.valid: Tensor | None = None  # [B, tokens]: which of the tokens that are held count, once some are forgotten

    def get_seq_length(self) -> int:
        """Tokens that were said, forgotten ones among them."""
        return self.held() + self.forgotten

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.held() + query_length, Forgotten(self.forgotten, 0)

    def begin(self) -> None:
        """Every token of the call is computed until a layer says otherwise."""
        self.shared.going = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.watched:
            raise ModelError("this cache asks which tokens are looked at, and the model's attention does not say", where="evicting_cache",
                             hint="compile the model, for example with the pass select_blocks(always=(Everything(),))")
        self.watched = False
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        setattr(keys, WATCHED, self)
        return keys, values

    @property
    def moved(self) -> bool:
        """Is a token that is held no longer at its place?"""
        return self.forgotten > 0

    def mask(self, given: Tensor | None, queries: int) -> Tensor | None:
        """bool [B, 1, 1, K] of the keys that are held, or None; what is given knows those of this call, its last columns."""
        if given is not None and given.shape[1:3] != (1, 1):
            raise ModelError("this model masks in a way of its own, and its cache forgets", where="evicting_cache",
                             hint="use a cache that keeps everything")
        if self.valid is None:
            return given
        fresh = self.valid.new_ones(len(self.valid), queries) if given is None else given[:, 0, 0, -queries:].expand(len(self.valid), -1)
        self.valid = torch.cat((self.valid, fresh), 1)
        return None if bool(self.valid.all()) else self.valid[:, None, None]

    def observe(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> None:
        """Queries [B, H, Q, D] and keys [B, G, K, D] of an attention that was computed: of the first one, choose what stays."""
        self.watched = True
        tokens, queries = key.shape[2], query.shape[2]
        if queries < 2 or queries != tokens:  # tokens were held before
            return
        total = tokens if self.shared.going is None else self.shared.tokens  # of the prompt, of which this layer may see some
        if tokens < total:
            self._hold(mask, tokens, total)
        recent = min(self.choice.window, tokens)
        found = _looked_at(query[:, :, -recent:], key, mask, scale)  # [B, G, H / G, K]
        if self.choice.layer == self.number:
            count = max(round(self.choice.passed * tokens), recent)
            self.shared.going = _stay(_pooled(found.mean((1, 2)), mask, self.choice.pool), count, recent) if count < tokens else None
            self.shared.tokens = tokens
        count = max(self._count(found.mean((1, 2)), total), recent)
        if count < tokens:
            self._keep(self._chosen(found.mean(2), mask, count, recent), mask, total)

    def _count(self, found: Tensor, total: int) -> int:
        """How many tokens stay of a prompt, of what all heads look at [B, K]."""
        if self.choice.mass is None:
            return round(self.choice.share * total)
        if self.choice.mass >= 1:
            return found.shape[1]
        held = found.sort(1, descending=True).values.cumsum(1)
        return int((held < self.choice.mass * held[:, -1:]).sum(1).max()) + 1

    def _chosen(self, found: Tensor, mask: Tensor | None, count: int, recent: int) -> Tensor:
        """The tokens that stay [B, G, count], of what each group looks at [B, G, K]."""
        return _stay(_pooled(found, mask, self.choice.pool), count, recent)

    def _keep(self, places: Tensor, mask: Tensor | None, total: int) -> None:
        """Hold only the tokens [B, G, count]."""
        tokens = self.held()
        self.keys, self.values = (held.gather(2, places[..., None].expand(-1, -1, -1, held.shape[3])) for held in (self.keys, self.values))
        self._room = None
        self._hold(mask, tokens, total)
        assert self.valid is not None
        self.valid = self.valid.gather(1, places[:, 0])

    def _hold(self, mask: Tensor | None, tokens: int, total: int) -> None:
        """Note how much is held of a prompt, and which of the `tokens` that this layer saw count."""
        self.kept, batch = self.held(), len(self.keys)
        self.forgotten = total - self.kept
        self.valid = torch.ones(batch, tokens, dtype=torch.bool) if mask is None else mask[:, 0, 0].expand(batch, tokens)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens. Raises ModelError where some of the prompt would go of which others are forgotten."""
        if self.forgotten and self.held() + tokens_to_remove < self.kept:
            raise ModelError(f"{-tokens_to_remove} tokens cannot be taken back: of the prompt before them some are forgotten", where="evicting_cache")
        super().crop(tokens_to_remove)
        if self.valid is not None:
            self.valid = self.valid[:, :self.held()]

    def reset(self) -> None:
        self.forgotten, self.watched, self.kept, self.valid = 0, True, 0, None
        super().reset()

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self.valid = None if self.valid is None else change(self.valid)


def _looked_at(rows: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """float32 [B, G, H / G, K]: the attention that the last query rows give to each key, over the number of rows that see it."""
    (batch, groups, tokens, _), count = key.shape, rows.shape[2]
    grouped = rows.float().reshape(batch, groups, -1, count, rows.shape[3]) * scale
    below = torch.arange(tokens) <= torch.arange(tokens - count, tokens)[:, None]
    seen = below if mask is None else below & mask[:, :, None]
    scores = (grouped @ key.float()[:, :, None].mT).masked_fill(~seen, -torch.inf)
    found: Tensor = scores.softmax(-1).nan_to_num(0.0).sum(3) / below.sum(0)
    return found


def _pooled(found: Tensor, mask: Tensor | None, width: int) -> Tensor:
    """[..., K]: each key's share as the mean of those around it; of keys that do not count, less than of any other, in an order of their own."""
    flat = found.reshape(-1, 1, found.shape[-1])
    made = avg_pool1d(flat, width, 1, width // 2, count_include_pad=False).view(found.shape)
    if mask is None:
        return made
    absent = -1.0 - torch.arange(found.shape[-1]) / found.shape[-1]
    return torch.where(mask[:, 0] if found.dim() == 3 else mask[:, 0, 0], made, absent)


def _stay(found: Tensor, count: int, recent: int) -> Tensor:
    """The places of the last `recent` keys and of the best others, `count` in all, ascending."""
    tokens = found.shape[-1]
    best = found[..., :tokens - recent].topk(count - recent).indices
    last = torch.arange(tokens - recent, tokens).expand(*found.shape[:-1], recent)
    return torch.cat((best, last), -1).sort(-1).values


def pass_on(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A forward pre-hook of a decoder layer: where a cache says so, only some tokens of a prompt are computed in this layer."""
    layers = next((getattr(value, "layers", None) for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
    if not layers or not isinstance(layers[0], EvictingLayer) or layers[0].shared.going is None:
        return None
    shared = layers[0].shared
    return tuple(_cut(value, shared) for value in args), {name: _cut(value, shared) for name, value in kwargs.items()}


def _cut(value: Any, shared: Shared) -> Any:
    """The same of the tokens that go on, in a tensor [B or 1, tokens, ...] or a tuple of such."""
    going = shared.going
    if isinstance(value, tuple):
        return tuple(_cut(part, shared) for part in value)
    if going is None or not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] != shared.tokens or value.shape[0] not in (1, len(going)):
        return value
    places = going.view(*going.shape, *(1,) * (value.dim() - 2)).expand(-1, -1, *value.shape[2:])
    return value.expand(len(going), *value.shape[1:]).gather(1, places)


def evicting_cache(share: float = 1.0, mass: float | None = None, window: int = 8, pool: int = 7, layer: int | None = None,
                   passed: float = 1.0) -> Cache:
    """A cache for generate(past_key_values=...) that keeps of a prompt what its last rows look at, and may let only some of it go on.

    share   of the prompt's tokens that stay, for each group of heads its own (FastKV, arXiv:2502.01068, section 4.2; SnapKV)
    mass    or: as many as hold this share of what is looked at, so that each layer has a ratio of its own (ZipVL, arXiv:2410.08584, section 4.1)
    window  the last rows, which say what is looked at, and whose own keys stay
    pool    neighbours, an odd number, that a key's score is the mean of
    layer   after this one (the first is 0) only `passed` of the tokens are computed further (FastKV's token-selective propagation, section 4.1);
            a model called directly then returns the logits of those alone
    The model must be compiled, so that its attention is ours. Nothing is dropped at share=1, passed=1. Raises InputError.
    """
    if not 0 < share <= 1 or not 0 < passed <= 1 or (mass is not None and not 0 < mass <= 1) or window < 1 or pool < 1 or not pool % 2:
        raise InputError(f"a share of {share}, a mass of {mass}, {passed} passed on, a window of {window} rows, {pool} neighbours: shares lie above "
                         "0 and at most at 1, and neighbours are an odd number", where="evicting_cache")
    choice = Choice(share, mass, window, pool, layer, passed)
    return Cache(layer_class_to_replicate=partial(EvictingLayer, choice, Shared()))
