"""Decoding by one library: the calls of a language model that go on with one token run as one graph, all others as before.

It stands in the place of the model's forward(), so that generate() and loops of users' own find it without being told. A call that it does not take
for whatever reason goes the usual way, in which nothing has changed; what the library wrote by then is in the user's own cache.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from .step_cache import filled
from .step_graph import IDS, PLACES
from .step_library import StepLibrary

MASK = "attention_mask"
HIDDEN = -6e4   # what a mask of floats adds to hide a token, at least: float16 has no more
COLLECTING = "transformers.utils.output_capturing"     # its hooks stay, and see what a call asks for: such a call is not taken
HARMLESS: Mapping[str, tuple[Any, ...]] = {     # values of arguments that change nothing; of others None and False
    "use_cache": (True, None), "return_dict": (True, None), "logits_to_keep": (0, 1, None)}


class Step:
    """The library of a model, and how its calls become the model's.

    library  what decodes one token
    most     texts in a batch at most: up to there it is faster than the usual way
    calls    that the library has taken
    """

    def __init__(self, library: StepLibrary, most: int) -> None:
        self.library, self.most, self.calls = library, most, 0
        self._words = self._places = math.inf   # rows of the tables that a model looks up, as far as it tells
        self._lock = Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Step:
        return self

    def attach(self, model: nn.Module) -> None:
        """Take the calls of a private copy of a model."""
        usual, hooks = model.forward, _hooks(model)
        self._words, self._places = _rows(model)
        names = tuple(inspect.signature(usual).parameters)
        returned: list[type] = []   # the class of what the model returns of a text: its logits and the cache, and nothing else

        @functools.wraps(usual)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or torch.is_grad_enabled():
                return usual(*args, **kwargs)
            kinds = returned[:1]    # another thread may take it away
            if kinds:
                call = self._call({**dict(zip(names, args, strict=False)), **kwargs} if args else kwargs)
                logits = None if call is None else self.decode(*call[1:])
                if call is not None and logits is not None:
                    return kinds[0](**{"logits": logits, call[0]: call[-1]})
            result = usual(*args, **kwargs)
            returned[:] = [type(result)] if _is_plain(result) and _hooks(model) == hooks else []
            return result

        model.__dict__["forward"] = forward

    def _call(self, named: Mapping[str, Any]) -> tuple[str, Tensor, Any, Any, Any] | None:
        """(name of the cache, ids, places, mask, cache) of a call that asks for nothing but the logits of one token; else None."""
        ids, key = named.get(IDS), next((name for name, value in named.items() if hasattr(value, "get_seq_length")), None)
        if key is None or not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] != 1 or ids.dtype is not torch.int64:
            return None
        for name, value in named.items():
            if name in (IDS, PLACES, MASK, key):
                continue
            if isinstance(value, Tensor) or not (value in HARMLESS[name] if name in HARMLESS else value is None or value is False):
                return None
        return key, ids, named.get(PLACES), named.get(MASK), named[key]

    def decode(self, ids: Tensor, places: Any, mask: Any, cache: Any) -> Tensor | None:
        """Logits [B, 1, vocabulary] of ids [B, 1], and a token more in the cache; None where the library does not take them."""
        if not 0 < ids.shape[0] <= self.most:
            return None
        with self._lock:
            return self._decoded(ids, places, mask, cache)

    def _decoded(self, ids: Tensor, places: Any, mask: Any, cache: Any) -> Tensor | None:
        """Logits [B, 1, vocabulary], and a token more in the cache."""
        batch = ids.shape[0]
        found = filled(cache, batch, self.library.caches, self.library.dtype)
        if found is None:
            return None
        starts = _starts(mask, batch, found.past + 1)
        if starts is None:
            return None
        places = _placed(places, batch, found.past, starts)
        if places is None or not _within(ids, self._words) or not _within(places, self._places):
            return None
        past = torch.full((1,), found.past, dtype=torch.int64)
        self.library.make_room((batch, found.buffers[0].shape[2]))
        logits: Tensor
        (logits,) = self.library.run(ids.contiguous(), places, past, starts, *found.buffers)
        found.done()
        self.calls += 1
        return logits


def _placed(places: Any, batch: int, past: int, starts: Tensor) -> Tensor | None:
    """position_ids as the library reads them, [B, 1] int64; None where they are of another shape, or are for the model to find from a mask."""
    if places is None:
        return None if bool(starts.any()) else torch.full((batch, 1), past, dtype=torch.int64)
    if not isinstance(places, Tensor) or places.dim() != 2 or places.shape[1] != 1 or places.shape[0] not in (1, batch):
        return None
    return places.to(torch.int64).expand(batch, 1).contiguous()


def _within(numbers: Tensor, rows: float) -> bool:
    """Are they rows of a table? A library takes the nearest for others, where the model itself raises an error."""
    return int(numbers.min()) >= 0 and int(numbers.max()) < rows


def _rows(model: Any) -> tuple[float, float]:
    """Words and positions that a model has; a model that computes positions goes on the usual way behind the last that its config speaks of."""
    words = getattr(model.get_input_embeddings(), "num_embeddings", None) if hasattr(model, "get_input_embeddings") else None
    places = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return words or math.inf, places or math.inf


def _starts(mask: Any, batch: int, tokens: int) -> Tensor | None:
    """At which token each text begins, [B] int64, where a mask hides the tokens before it and nothing else; else None."""
    if mask is None:
        return torch.zeros(batch, dtype=torch.int64)
    if not isinstance(mask, Tensor) or mask.shape[0] not in (1, batch) or mask.shape[-1] < tokens:
        return None
    if mask.dim() == 4:
        if mask.shape[1] != 1 or mask.shape[2] != 1:
            return None
        line = mask[:, 0, 0]
        seen = line if mask.dtype is torch.bool else line == 0
        if mask.dtype is not torch.bool and not (mask.is_floating_point() and bool((seen | (line <= HIDDEN)).all())):
            return None     # it weighs tokens
        if seen.shape[1] > tokens and bool(seen[:, tokens:].any()):
            return None
    elif mask.dim() == 2:
        seen = mask != 0
    else:
        return None
    seen = seen[:, :tokens]
    starts = tokens - seen.sum(1)
    if not bool((seen.int().argmax(1) == starts).all()) or not bool(seen[:, -1].all()):
        return None
    return starts.expand(batch).contiguous()


def _is_plain(result: Any) -> bool:
    """Logits and a cache, and nothing else?"""
    return isinstance(result, Mapping) and len(result) == 2 and "logits" in result and any(hasattr(one, "get_seq_length") for one in result.values())


def _hooks(model: nn.Module) -> int:
    """How many look into a model from outside: they would see nothing of a library."""
    hooks = (hook for one in model.modules() if one is not model for kind in (one._forward_hooks, one._forward_pre_hooks) for hook in kind.values())
    return sum(getattr(hook, "__module__", None) != COLLECTING for hook in hooks)
