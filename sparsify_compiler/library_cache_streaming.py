"""A key-value cache of bounded size: the first tokens, which attention gathers on, and a window of the last ones (StreamingLLM, arXiv:2309.17453).

For a model whose attention reads sinks and a window of these sizes it changes nothing but the memory. Any other model it makes one, from the token
on that is first forgotten. Keys keep the positions that they were computed at.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from .errors import InputError, ModelError
from .library_cache import AppendingLayer

SLACK = 256  # tokens that are forgotten together: moving the window costs as much as the window


class Forgotten(int):
    """How many tokens a cache has forgotten; they stood behind the first `after` ones."""

    after: int

    def __new__(cls, tokens: int, after: int) -> Forgotten:
        made = super().__new__(cls, tokens)
        made.after = after
        return made


class StreamingLayer(AppendingLayer):
    """Keys and values of the first `sinks` tokens and of at least the last window - 1, beside those that are being said."""

    def __init__(self, window: int, sinks: int) -> None:
        super().__init__()
        self.window, self.sinks, self.forgotten = window, sinks, 0

    def get_seq_length(self) -> int:
        """Tokens that were said, forgotten ones among them."""
        return self.held() + self.forgotten

    def _too_many(self) -> int:
        """How many tokens the next update forgets: none, or all that are neither sinks nor in the window."""
        surplus = self.held() - self.sinks - (self.window - 1)
        return surplus if surplus >= SLACK else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next attention is given, and how many were forgotten before."""
        going = self._too_many()
        return self.held() - going + query_length, Forgotten(self.forgotten + going, self.sinks)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        going = self._too_many()
        if going:
            for held in (self.keys, self.values):
                held[:, :, self.sinks:-going] = held[:, :, self.sinks + going:].clone()
            self.keys, self.values = (held[:, :, :-going] for held in (self.keys, self.values))
            self.forgotten += going
            self._sums.keep(0)
        return super().update(key_states, value_states, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens. Raises ModelError where the window would then miss some that are forgotten."""
        if self.forgotten and self.held() + tokens_to_remove < self.sinks + self.window - 1:
            raise ModelError(f"{-tokens_to_remove} tokens cannot be taken back: the window before them is forgotten", where="StreamingCache",
                             hint="use a larger window, or a cache that keeps everything")
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        self.forgotten = 0
        super().reset()


def streaming_cache(window: int, sinks: int = 4) -> Cache:
    """A cache for generate(past_key_values=...) of one text, or of a batch without padding, that holds about window + sinks tokens a layer.

    window  as in SlidingWindow: a token reads itself and window - 1 before it. Raises InputError for sizes that cannot be.
    """
    if window < 1 or sinks < 0:
        raise InputError(f"a window of {window} tokens and {sinks} sinks cannot be", where="streaming_cache")
    return Cache(layer_class_to_replicate=partial(StreamingLayer, window, sinks))
