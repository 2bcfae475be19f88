"""What parts of a model tell each other beside their arguments: notes that hold for one call of the model, and notes on a text.

A captured part sees its own arguments only. It does not see which text its rows belong to, at which place of it they stand, nor the residual stream
around it. What watches the model's outermost call does: a text is known by the cache that is handed from call to call, so that texts do not mix,
whether they take turns, run in two models or in two threads; a call on an empty cache begins a text, one on a cache that was never seen here (filled
by another model, or copied) goes on with a text that nothing is known of.

Nothing is noted while a graph is traced (torch.compile, torch.export), nor in a model that is called without its hooks: whoever reads a note says
what holds without it.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

PLACES = "places"  # the note on how many tokens of its text stand before each row: float32 [batch, tokens], -1 for padding
INPUT = "input of "  # with a module's path: what that module was called on


class Call:
    """One call of a model, while it runs.

    text    notes on the text that it goes on with; None where no later call can
    begins  whether the text begins with it
    real    bool [batch, tokens]: which of its tokens are no padding; None for all of them
    """

    def __init__(self, text: dict[str, Any] | None, before: int, shape: tuple[int, ...], mask: Tensor | None) -> None:
        self.text, self.begins, self.before, self.shape = text, before == 0, before, shape
        self.notes: dict[str, Tensor] = {}
        self._mask = mask

    @property
    def real(self) -> Tensor | None:
        return _real(self._mask, self.before, self.shape)

    def read(self, key: str) -> Tensor | None:
        """The note under a key, if there is one in this call."""
        if key == PLACES and key not in self.notes and len(self.shape) == 2:
            self.notes[key] = _places(self._mask, self.before, self.shape)
        return self.notes.get(key)


class Session:
    """The hooks on one model that keep its Call, and its texts for as long as their caches live."""

    def __init__(self) -> None:
        self._texts: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        return Session()

    def watch(self, model: nn.Module, inputs: Mapping[str, nn.Module]) -> None:
        """Follow the calls of a model, and note what these modules of it, by path, are called on."""
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._end, with_kwargs=True, always_call=True)
        for path, module in inputs.items():
            module.register_forward_pre_hook(_Listener(INPUT + path))

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        named = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs} if args else kwargs
        cache = _cache(named.values())
        before = 0 if cache is None else int(cache.get_seq_length())
        tokens = named.get("input_ids") if named.get("input_ids") is not None else named.get("inputs_embeds")
        shape = tuple(tokens.shape[:2]) if isinstance(tokens, Tensor) else ()
        text: dict[str, Any] | None = self._texts.get(cache) if before else {}
        if cache is not None and text is not None and not before:
            self._texts[cache] = text
        _running().append(Call(text, before, shape, _tensor(named.get("attention_mask"))))

    def _end(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if torch.compiler.is_compiling():
            return
        call = _running().pop()
        cache = _cache(result.values() if isinstance(result, Mapping) else result if isinstance(result, tuple) else ()) if call.begins else None
        if cache is not None and call.text is not None and cache not in self._texts:
            self._texts[cache] = call.text


class _Listener:
    """Notes the first tensor that a module is called on."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        call = None if torch.compiler.is_compiling() else current()
        if call is not None and args and isinstance(args[0], Tensor):
            call.notes[self.key] = args[0]


_calls = threading.local()


@contextmanager
def running(call: Call) -> Iterator[None]:
    """What runs inside belongs to this call."""
    _running().append(call)
    try:
        yield
    finally:
        _running().pop()


def current() -> Call | None:
    """The call that runs in this thread; None outside of one, and in a model that is not watched."""
    running = _running()
    return running[-1] if running else None


def traced(*tensors: Tensor) -> bool:
    """Whether these are stand-ins of a graph that is being traced."""
    return any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors)


def _running() -> list[Call]:
    if not hasattr(_calls, "running"):
        _calls.running = []
    found: list[Call] = _calls.running
    return found


def _cache(values: Iterable[Any]) -> Any:
    """The cache among arguments or results: what knows how many tokens it holds (the class Cache of transformers)."""
    return next((value for value in values if hasattr(value, "get_seq_length")), None)


def _tensor(mask: Any) -> Tensor | None:
    """A mask, or one of several by kind of layer."""
    if isinstance(mask, Mapping):
        mask = next((value for value in mask.values() if isinstance(value, Tensor)), None)
    return mask if isinstance(mask, Tensor) else None


def _seen(mask: Tensor) -> Tensor:
    """A mask as bool: what is seen. One that is added to the scores is 0 there."""
    return mask if mask.dtype == torch.bool else mask >= 0 if mask.is_floating_point() and mask.dim() == 4 else mask > 0


def _real(mask: Tensor | None, before: int, shape: tuple[int, ...]) -> Tensor | None:
    """Of a mask of tokens [batch, all], and of one of pairs [batch, heads, tokens, all], in which padding does not see itself."""
    if mask is None or len(shape) != 2 or mask.shape[-1] < before + shape[1]:
        return None
    if mask.dim() == 2:
        found = _seen(mask[:, before : before + shape[1]])
    elif mask.dim() == 4:
        found = _seen(mask[:, 0, :, before : before + shape[1]].diagonal(dim1=-2, dim2=-1))
    else:
        return None
    return found.expand(shape)


def _places(mask: Tensor | None, before: int, shape: tuple[int, ...]) -> Tensor:
    real = _real(mask, before, shape)
    if real is None or mask is None:
        return torch.arange(before, before + shape[1], dtype=torch.float32).expand(shape)
    earlier = mask[:, :before] if mask.dim() == 2 else mask[:, 0, -1, :before]
    places = _seen(earlier).sum(1, keepdim=True) + real.long().cumsum(1) - 1
    return places.masked_fill(~real, -1).float()
