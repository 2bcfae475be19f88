"""generate_corrected(): a sparse language model writes, and the dense one corrects its last tokens every few of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError, ModelError


@dataclass(frozen=True)
class Corrected:
    """What generate_corrected() returns.

    tokens    int64 [batch, prompt + new], filled up with the padding token behind an end
    proposed  tokens of the sparse model that the dense one looked at, and how many of them it let stand; the rest of the new ones are its own
    """

    tokens: Tensor
    proposed: int
    accepted: int


def generate_corrected(sparse: nn.Module, dense: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, *, max_new_tokens: int = 20,
                       period: int = 8, accept: float = 1.0, eos_token_id: int | Iterable[int] | None = None, pad_token_id: int | None = None
                       ) -> Corrected:
    """Greedy decoding by a sparse model, corrected by the dense one (Sirius, Zhou et al., arXiv:2409.03856).

    After `period` - 1 tokens of the sparse model the dense one reads them in one call, which takes the place of their keys and values in the cache;
    the first that it does not accept, and all behind it, go, and its own token stands there instead. The prompt is read by the dense model.

    sparse, dense   causal language models of transformers' kind, with the same cache: called with input_ids and past_key_values, they return logits
                    and past_key_values. sc.compile(lm, ...) is one
    input_ids       int64 [batch, tokens], padded on the left where attention_mask [batch, tokens] has zeros
    period          tokens between two corrections; 1 is the dense model alone
    accept          a token stands if the dense model gives it at least this share of the probability of its likeliest. At 1 the result is the dense
                    model's own, up to rounding, and the sparse one only saves time; below 1 the sparse model's choice stands where it is as good
    eos_token_id    token, or tokens, that end a row; by default the dense model's own
    pad_token_id    what follows an end; by default the dense model's own, else the end itself

    Rows of a batch are kept in step: what one row rejects, all write again. Raises InputError, and ModelError for a model without such a cache.
    """
    if input_ids.dim() != 2 or not input_ids.numel():
        raise InputError(f"input_ids has shape {list(input_ids.shape)}, needs [batch, tokens], neither of them 0", where="input_ids")
    for name, value, low in (("period", period, 1), ("max_new_tokens", max_new_tokens, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise InputError(f"must be an int of {low} or more, got {value!r}", where=name)
    if not 0 <= accept <= 1:
        raise InputError(f"must lie between 0 and 1, got {accept!r}", where="accept")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
    if mask.shape != input_ids.shape:
        raise InputError(f"has shape {list(mask.shape)}, input_ids {list(input_ids.shape)}", where="attention_mask")
    ends = _ends(dense, eos_token_id)
    with torch.no_grad():
        return _Run(sparse, dense, input_ids, mask, period, accept, ends, _padding(dense, pad_token_id, ends)).run(max_new_tokens)


class _Run:
    """One call. `tokens` are the prompt and what stands; the cache holds all of them but the last."""

    def __init__(self, sparse: nn.Module, dense: nn.Module, tokens: Tensor, mask: Tensor, period: int, accept: float, ends: Tensor,
                 padding: int) -> None:
        self.sparse, self.dense, self.tokens, self.mask = sparse, dense, tokens, mask
        self.period, self.accept, self.ends, self.padding = period, accept, ends.to(tokens.device), padding
        self.prompt, self.padded = tokens.shape[1], not bool(mask.all())
        self.cache: Any = None
        self.proposed = self.accepted = 0

    def run(self, count: int) -> Corrected:
        if count:
            logits = self._call(self.dense, self.tokens, 0)
            if not hasattr(self.cache, "crop"):
                raise ModelError(f"its cache, a {type(self.cache).__name__}, cannot be cut back", where="generate_corrected",
                                 hint="take a causal language model whose cache is transformers' DynamicCache")
            self._append(logits[:, -1:].argmax(-1))
        while self.tokens.shape[1] < self.prompt + count and not bool(self._ended().all()):
            self._round(min(self.period, self.prompt + count - self.tokens.shape[1]))
        return Corrected(self._finished(count), self.proposed, self.accepted)

    def _round(self, period: int) -> None:
        """Up to `period` further tokens: what stands of period - 1 proposals, and one of the dense model."""
        before = self.tokens.shape[1] - 1
        written = self.tokens[:, -1:]
        for _ in range(period - 1):
            written = torch.cat([written, self._call(self.sparse, written[:, -1:], before + written.shape[1] - 1)[:, -1:].argmax(-1)], 1)
        if period > 1:
            self.cache.crop(1 - period)  # so many of its last tokens go
        logits = self._call(self.dense, written, before)
        best, stands = logits.argmax(-1), int(self._stands(logits[:, :-1], written[:, 1:]))
        self.proposed += period - 1
        self.accepted += stands
        if stands < period - 1:
            self.cache.crop(stands + 1 - period)
        self._append(torch.cat([written[:, 1 : stands + 1], best[:, stands : stands + 1]], 1))

    def _stands(self, logits: Tensor, proposed: Tensor) -> Tensor:
        """How many of the proposals stand, in every row that has not ended."""
        chances = logits.float().log_softmax(-1)
        own = chances.gather(-1, proposed[..., None])[..., 0]
        fine = proposed == logits.argmax(-1)
        if self.accept < 1:
            limit = chances.amax(-1) + torch.tensor(self.accept, dtype=torch.float32).log().to(own.device)
            fine |= own >= limit
        return (fine | self._ended()[:, None]).all(0).long().cumprod(0).sum()

    def _call(self, model: nn.Module, tokens: Tensor, before: int) -> Tensor:
        """The model's logits [batch, tokens, words] of tokens that stand behind `before` others."""
        end = before + tokens.shape[1]
        mask = torch.nn.functional.pad(self.mask, (0, max(0, end - self.mask.shape[1])), value=1)[:, :end]
        places = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)[:, before:]} if self.padded else {}
        output: Any = model(input_ids=tokens, attention_mask=mask, past_key_values=self.cache, use_cache=True, **places)
        self.cache = getattr(output, "past_key_values", None)
        logits: Tensor = output.logits
        return logits

    def _append(self, tokens: Tensor) -> None:
        self.tokens = torch.cat([self.tokens, tokens], 1)

    def _ended(self) -> Tensor:
        return torch.isin(self.tokens[:, self.prompt :], self.ends).any(1)

    def _finished(self, count: int) -> Tensor:
        """The tokens, padding behind the first end of each row, and nothing behind the last row's end."""
        new = self.tokens[:, self.prompt : self.prompt + count]
        over = torch.isin(new, self.ends).long().cumsum(1)
        behind = torch.nn.functional.pad(over, (1, 0))[:, :-1] > 0
        kept = int((~behind).any(0).sum())
        return torch.cat([self.tokens[:, : self.prompt], new.masked_fill(behind, self.padding)[:, :kept]], 1)


def _ends(model: nn.Module, given: int | Iterable[int] | None) -> Tensor:
    if given is None:
        given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return torch.tensor([] if given is None else [given] if isinstance(given, int) else list(given), dtype=torch.long)


def _padding(model: nn.Module, given: int | None, ends: Tensor) -> int:
    if given is None:
        given = getattr(getattr(model, "generation_config", None), "pad_token_id", None)
    return int(given) if given is not None else int(ends[0]) if ends.numel() else 0
