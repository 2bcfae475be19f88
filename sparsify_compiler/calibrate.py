"""Calibration: run the user's batches through the Program as it is now, and gather statistics of the inputs of its sites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .calibrate_cache import Cache, default_folder, fingerprint
from .calibrate_loss import Loss, self_supervised
from .calibrate_run import Entry, Inputs, Source, collect, find_sources, weight_names
from .errors import CalibrationError, InputError, unknown
from .program import Program
from .statistic import STATISTICS, quantile

__all__ = ["STATISTICS", "Calibration", "calibrate", "quantile"]

MAX_BYTES = 1 << 30
SMALL = 1 << 20  # statistics below this many bytes are all gathered in the first run, and stay

Progress = Callable[[str, int, int], None]
Known = Mapping[str, Mapping[str, Tensor]]


def calibrate(program: Program, batches: Iterable[Inputs], needs: Mapping[str, frozenset[str]], *, max_bytes: int = MAX_BYTES,
              cache: Path | bool | None = True, progress: Progress = lambda what, done, total: None,
              warn: Callable[[str], object] = lambda text: None, loss: Loss | None = None, known: Known | None = None) -> Calibration:
    """Statistics of sites, over all batches. Padded tokens count like all others (see statistic.py).

    batches    tuples of positional or dicts of named arguments, like example_inputs. Walked once a run, in order; an iterator that can be
               walked only once is drawn into memory
    needs      site path -> names of STATISTICS
    max_bytes  bound on the memory that the sums take at one time. What does not fit is gathered on demand in further runs, group by group
               in the order of execution, so a pass that goes through the sites in order causes as few runs as possible
    cache      True for the user's cache folder ($SPARSIFY_CACHE), a folder, or False. Results are found again by content: graph, weights,
               batches, statistics. A cache that cannot be used never fails the run; `warn` hears why
    progress   called with (what, batches done, batches in total or 0)
    loss       loss(the model's output, the batch) -> one number, for statistics of gradients; by default next-token cross entropy for a language
               model's logits, else the mean square of the outputs. With a loss of one's own nothing is cached: code has no fingerprint
    known      statistic -> name of a parameter -> its value, which is taken instead of gathering it (movement.Movement.known())

    Raises CalibrationError for empty batches, activations that are not finite, or a statistic that does not fit into max_bytes;
    InputError for a batch that is no call of the model; UnknownNameError for an unknown statistic, or a known one of no parameter.
    """
    given = _given(program, known or {})
    needs = {site: frozenset(name for name in names if (site, name) not in given) for site, names in needs.items()}
    for name in sorted({name for names in needs.values() for name in names}):
        if name not in STATISTICS:
            raise unknown("statistic", name, STATISTICS, where="calibrate")
    walkable = _walkable(batches, max_bytes)
    folder = default_folder() if cache is True else Path(cache) if isinstance(cache, str | Path) else None
    return Calibration(program, walkable, needs, max_bytes, folder if loss is None else None, progress, warn, loss or self_supervised, given)


class Calibration:
    """Statistics by site and name; what is large is gathered when it is asked for.

    runs    how many times the batches went through the model
    """

    def __init__(self, program: Program, batches: Iterable[Inputs], needs: Mapping[str, frozenset[str]], max_bytes: int, folder: Path | None,
                 progress: Progress, warn: Callable[[str], object], loss: Loss = self_supervised,
                 given: Mapping[tuple[str, str], Tensor] | None = None) -> None:
        self.runs = 0
        self._program, self._batches, self._progress, self._loss, self._given = program, batches, progress, loss, given or {}
        self._sources = find_sources(program, needs)
        self._groups = _group(self._sources, max_bytes)
        self._cache = Cache(folder, fingerprint(program, batches), warn) if folder is not None and self._groups else None
        self._results: dict[int, dict[Entry, Tensor]] = {}
        if self._groups:
            self._results[0] = self._gather(0)

    def get(self, site: str, statistic: str) -> Tensor:
        """The statistic of a site, as STATISTICS describes it. Raises CalibrationError when it was not asked for or has no data."""
        if (site, statistic) in self._given:
            return self._given[site, statistic]
        source = self._sources.get((site, statistic))
        if source is None and (site, statistic) in self._sources:
            return STATISTICS[statistic].finish(STATISTICS[statistic].start(0), 0)
        entry = None if source is None else (source.key, statistic)
        number = next((i for i, group in enumerate(self._groups) if any(e == entry for e, _ in group)), None)
        if entry is None or number is None:
            raise CalibrationError(f"the statistic {statistic} was not gathered", where=site, hint="the pass must name it in needs()")
        if number not in self._results:
            self._results = {i: r for i, r in self._results.items() if i == 0 and self._stays()}  # room for the new group
            self._results[number] = self._gather(number)
        if entry not in self._results[number]:
            raise CalibrationError("no input reached this site", where=site, hint="give calibration batches that use this part of the model")
        return self._results[number][entry]

    def _stays(self) -> bool:
        """Does the first group hold only small statistics, which are never dropped?"""
        return all(size < SMALL for _, size in self._groups[0])

    def _gather(self, number: int) -> dict[Entry, Tensor]:
        entries = [entry for entry, _ in self._groups[number]]
        found = self._cache.read(entries) if self._cache is not None else None
        if found is None:
            self.runs += 1
            with torch.no_grad():
                sources = [source for source in self._sources.values() if source is not None]
                found = collect(self._program, self._batches, sources, entries, self._progress, self._loss)
            if self._cache is not None:
                self._cache.write(entries, found)
        return found


def _given(program: Program, known: Known) -> dict[tuple[str, str], Tensor]:
    """(site, statistic) -> what the user knows of the site's weight. Raises UnknownNameError, and InputError for a wrong shape."""
    weights = weight_names(program) if known else {}
    found: dict[tuple[str, str], Tensor] = {}
    for statistic, values in known.items():
        if statistic not in STATISTICS or STATISTICS[statistic].of != "gradient":
            raise unknown("statistic of weights", statistic, [name for name in STATISTICS if STATISTICS[name].of == "gradient"], where="known")
        if values and not set(values) & {name for name, _ in weights.values()}:
            raise unknown("parameter", next(iter(values)), {name for name, _ in weights.values()}, where=f"known, {statistic}")
        for site, (name, shape) in weights.items():
            if name in values and tuple(values[name].shape) != shape:
                raise InputError(f"shape {list(values[name].shape)} for a weight of shape {list(shape)}", where=f"known, {statistic}, {name}")
            if name in values:
                found[site, statistic] = values[name]
    return found


def _group(sources: Mapping[tuple[str, str], Source | None], max_bytes: int) -> list[list[tuple[Entry, int]]]:
    """Entries with their bytes, cut into groups that fit into memory: the small ones first, then by the order of execution."""
    entries: dict[Entry, int] = {}
    for (site, name), source in sources.items():
        if source is None:
            continue
        entries[source.key, name] = STATISTICS[name].size(source.width)
        if entries[source.key, name] > max_bytes:
            raise CalibrationError(f"the statistic {name} takes {entries[source.key, name]:,} bytes, and {max_bytes:,} are allowed", where=site,
                                   hint="raise max_bytes, or leave this site out")
    groups: list[list[tuple[Entry, int]]] = []
    used = max_bytes
    for entry, size in sorted(entries.items(), key=lambda item: item[1] >= SMALL):
        starts_large = bool(groups) and size >= SMALL and groups[-1][-1][1] < SMALL and sum(entries.values()) > max_bytes
        if used + size > max_bytes or starts_large:
            groups.append([])
            used = 0
        groups[-1].append((entry, size))
        used += size
    return groups


def _walkable(batches: Iterable[Inputs], max_bytes: int) -> Iterable[Inputs]:
    """Batches that can be walked many times."""
    if isinstance(batches, Tensor | str | bytes | Mapping) or not isinstance(batches, Iterable):
        raise InputError(f"calibration is an iterable of batches, not {type(batches).__name__}", where="calibration",
                         hint="give a list of tuples or dicts, each like example_inputs")
    if not isinstance(batches, Iterator):
        return batches
    drawn: list[Inputs] = []
    held = 0
    for batch in batches:
        drawn.append(batch)
        values: Iterable[Any] = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple) else ()
        held += sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
        if held > max_bytes:
            raise CalibrationError(f"the batches of this iterator take more than {max_bytes:,} bytes, and it can be walked only once",
                                   where="calibration", hint="give a list or a DataLoader, which can be walked again")
    return drawn
