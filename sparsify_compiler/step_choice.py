"""Whether a language model decodes by one library: built, compared with the model itself, timed against it, and kept where it is faster."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import ModelError, SparsifyError
from .measure import interleave
from .nearness import distance
from .program import Program
from .step import Step
from .step_graph import step_graph
from .step_library import build_step
from .target import Target

TEXTS = ((1, 5), (2, 9))        # (texts, tokens) that both ways are compared on, those of the second padded on the left
BATCHES = (1, 2, 4, 8, 16)      # texts that decode together, as they are timed
TOKENS = 32                     # before the token that is timed
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2}    # distance of logits, by their norm, that is always allowed
# What selects inputs or experts moves further, where one that is near a limit falls on its other side: as far as the model itself, so many times,
# when what is in its cache is rounded otherwise, in so many ways; never as far as a library that says nothing. One input in a hundred thousand is so
# near a limit that it moves whatever follows: what one text says is held against two others.
ROUNDED, WAYS, FURTHEST, AGAIN = 2.0, 3, 0.9, 2
USUAL, LIBRARY = "part by part", "one library"
LINE = 120          # characters of an error of which the report tells
DECODING = ("auto", "library", "parts")
WORTH = 1 << 26     # bytes of weights from which a library is made without being asked for


def is_wanted(decoding: str, program: Program, size: int) -> bool:
    """Is a library to be tried for a program with weights of so many bytes? `decoding` is one of DECODING."""
    generates = program.skeleton is not None and callable(getattr(program.skeleton, "generate", None))
    return generates and (decoding == "library" or (decoding == "auto" and size >= WORTH))


def why_not(program: Program) -> str:
    """What to say of a program for which a library was asked and none is tried."""
    return f"{USUAL}: " + ("it has no generate()" if program.skeleton is not None else "it was captured whole, and does not generate")


@dataclass(frozen=True)
class Choice:
    """A Step where it is faster, and what to say of it in the report."""

    step: Step | None
    told: str


def choose_step(program: Program, model: nn.Module, target: Target) -> Choice:
    """Build the step of a model, whose own copy `model` is, and keep it where it says the same in less time."""
    started = time.perf_counter()
    try:
        step = Step(build_step(program, step_graph(program), target), max(BATCHES))
        built = time.perf_counter() - started
        with torch.no_grad():
            _compare(step, model)
            times = _times(step, model)
    except Exception as error:  # noqa: BLE001 — few have asked for it, and whatever goes wrong, of whatever model, it decodes without
        return Choice(None, refused(USUAL, "step", error))
    return _chosen(step, times, built)


def refused(usual: str, what: str, error: Exception) -> str:
    """What a report says where a model stays as `usual`, since `what` of it cannot be made."""
    if isinstance(error, SparsifyError):
        return one_line(f"{usual}: {f'{error.where}: ' if error.where else ''}{error.what}")
    first = next(iter(str(error).splitlines()), "")[:LINE]
    return f"{usual}: its {what} cannot be made: {type(error).__name__} {first}".rstrip()


def one_line(text: str) -> str:
    """Of what torch or TVM say over several lines a report tells the beginning, in one."""
    line = " ".join(text.split())
    return line if len(line) <= 2 * LINE else f"{line[: 2 * LINE - 1]}…"


def _chosen(step: Step, times: list[tuple[int, float, float]], built: float) -> Choice:
    faster = [batch for batch, usual, library in times if library < usual]
    _, usual, library = times[0]
    if not faster or faster[0] != times[0][0]:
        return Choice(None, f"{USUAL}: a token takes {usual:.1f} ms, and would take {library:.1f} ms by one library")
    step.most = max(faster)
    own = sum(one.numel() * one.element_size() for one in step.library.own) / 2**20
    return Choice(step, f"{LIBRARY} for batches up to {step.most}: a token takes {library:.2f} ms, and {usual:.2f} ms {USUAL}; "
                        f"built in {built:.0f} s, {own:.1f} MB of weights of its own")


def _compare(step: Step, model: nn.Module) -> None:
    """Raises ModelError where the library says something else than the model, of most texts."""
    for batch, tokens in TEXTS:
        wrong = _wrong(step, _Text(model, batch, tokens))
        if wrong and any(_wrong(step, _Text(model, batch, tokens, 1 + again)) for again in range(AGAIN)):
            raise ModelError(wrong)


def _wrong(step: Step, text: _Text) -> str:
    """What the library says otherwise of a text; "" where it says the same."""
    usual, library = text.usual(deepcopy(text.cache)), text.library(step, deepcopy(text.cache))
    if library is None:
        raise ModelError(f"its cache is {type(text.cache).__name__}, which no library takes")
    far, tolerance = distance(library, usual, slices=False), TOLERANCES.get(usual.dtype, min(TOLERANCES.values()))
    if tolerance < far < math.inf:
        moved = max(distance(text.usual(_rounded(text.cache, way)), usual, slices=False) for way in range(WAYS))
        tolerance = max(tolerance, min(ROUNDED * moved, FURTHEST))
    return "" if far <= tolerance else f"its step by one library is {far:.1e} from the model's own, more than {tolerance:.0e}"


def _rounded(cache: Any, way: int) -> Any:
    """A copy in which about half of the numbers are larger by the last bit."""
    copied, generator = deepcopy(cache), torch.Generator().manual_seed(way)
    for layer in copied.layers:
        for held in (layer.keys, layer.values):
            held.mul_(1 + torch.finfo(held.dtype).eps * torch.randint(2, held.shape, generator=generator).to(held.dtype))
    return copied


def _times(step: Step, model: nn.Module) -> list[tuple[int, float, float]]:
    """(texts, milliseconds of the usual way, of the library), for more and more texts until the library is no faster."""
    found: list[tuple[int, float, float]] = []
    for batch in BATCHES:
        text = _Text(model, batch, TOKENS)
        forms: dict[str, Callable[[], object]] = {USUAL: partial(text.usual, text.cache), LIBRARY: partial(text.library, step, deepcopy(text.cache))}
        times = interleave(forms, rounds=7, at_most=1.0, repeats=2)
        found.append((batch, times[USUAL].median, times[LIBRARY].median))
        if times[LIBRARY].median >= times[USUAL].median:
            break
    return found


class _Text:
    """Texts that a model has read, and one token more."""

    def __init__(self, model: nn.Module, batch: int, tokens: int, seed: int = 0) -> None:
        self._model, anyhow = model, cast(Any, model)
        words = int(anyhow.get_input_embeddings().num_embeddings)
        ids = torch.randint(0, words, (batch, tokens + 1), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones(batch, tokens + 1, dtype=torch.int64)
        mask[1:, : tokens // 3] = 0
        places = (mask.cumsum(1) - 1).clamp(min=0)
        read = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=places[:, :-1], use_cache=True)
        found = [(name, value) for name, value in read.items() if hasattr(value, "get_seq_length")]
        if not found:
            raise ModelError("its calls return no cache")
        self._name, self.cache = found[0]
        self._last, self._mask, self._places = ids[:, -1:].contiguous(), mask, places[:, -1:].contiguous()

    def usual(self, cache: Any) -> Tensor:
        """What the model itself says of the last token."""
        given = {"attention_mask": self._seen(cache), "position_ids": self._places, self._name: cache}
        logits: Tensor = self._model(input_ids=self._last, use_cache=True, **given).logits
        return logits

    def library(self, step: Step, cache: Any) -> Tensor | None:
        """What the library says of it."""
        return step.decode(self._last, self._places, self._seen(cache), cache)

    def _seen(self, cache: Any) -> Tensor:
        """The mask of what is in the cache and the last token."""
        return torch.nn.functional.pad(self._mask, (0, int(cache.get_seq_length()) + 1 - self._mask.shape[1]), value=1)
