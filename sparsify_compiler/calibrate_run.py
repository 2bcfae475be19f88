"""One run of the batches through the model, with taps on the inputs of sites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .call import instantiate
from .errors import CalibrationError, InputError
from .program import Program
from .statistic import STATISTICS

Inputs = tuple[Any, ...] | Mapping[str, Any]
Entry = tuple[tuple[str, str, int], str]  # (key of a source, name of a statistic)


@dataclass(frozen=True)
class Source:
    """A value that one or more sites read as their input.

    region, node  where it is computed; op is the first node that reads it
    channel       which dimension holds the channels, counted from the end
    """

    site: str
    region: str
    node: str
    op: str
    channel: int
    width: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.region, self.node, self.channel


def find_sources(program: Program, needs: Mapping[str, frozenset[str]]) -> dict[str, Source]:
    """Site path -> where its input comes from, in the order of execution. Sites that read the same value have equal keys.

    Raises CalibrationError for a path that is no linear or convolution site.
    """
    from .sites import find_sites

    nodes = {(region.path, node.name): node for region, node in program.nodes()}
    found: dict[str, Source] = {}
    for site in find_sites(program, ("linear", "conv")):
        if not needs.get(site.path) or site.path in found:
            continue
        op = nodes[site.region, site.roles["op"]]
        value, weight = op.kwargs["input"], op.kwargs["weight"]
        assert isinstance(value, fx.Node)
        assert isinstance(weight, fx.Node)
        channel = -1 if site.kind == "linear" else 1 - weight.meta["val"].dim()
        found[site.path] = Source(site.path, site.region, value.name, op.name, channel, int(value.meta["val"].shape[channel]))
    for path, names in needs.items():
        if names and path not in found:
            raise CalibrationError("there is no linear or convolution site of this path to gather statistics at", where=path)
        if "gram" in names and found[path].channel != -1:
            raise CalibrationError("the statistic gram is gathered for linear layers only", where=path)
    return found


def collect(program: Program, batches: Iterable[Inputs], sources: Sequence[Source], entries: Sequence[Entry],
            progress: Callable[[str, int, int], None]) -> dict[Entry, Tensor]:
    """Run all batches once; the statistics of `entries`, except of sources that no input reached.

    Raises CalibrationError when there is no batch or an activation is not finite, InputError for a batch that is no call of the model.
    """
    tapped = program.clone()
    taps: dict[tuple[str, str, int], Tap] = {}
    for source in sources:
        names = [name for key, name in entries if key == source.key]
        if names and source.key not in taps:
            taps[source.key] = _insert(tapped, source, names, f"sparsify_tap_{len(taps)}")
    for region in tapped.regions.values():
        region.module.recompile()
    model, done = instantiate(tapped), 0
    total = len(batches) if isinstance(batches, Sized) else 0
    for batch in batches:
        _call(model, batch, done)
        done += 1
        progress("calibrate", done, total)
    if not done:
        raise CalibrationError("calibration holds no batch", where="calibration", hint="give at least one, like example_inputs")
    return {(key, name): value for key, tap in taps.items() for name, value in tap.results().items()}


class Tap(nn.Module):
    """Takes a value on its way through the graph and adds it up."""

    _is_impure = True  # so that fx does not drop it as dead code

    def __init__(self, site: str, names: Sequence[str], channel: int) -> None:
        super().__init__()
        self.site, self.channel, self.names = site, channel, tuple(names)
        self.sums: dict[str, Tensor] = {}
        self.rows = 0

    def forward(self, x: Tensor) -> None:
        """Add the rows of x. Raises CalibrationError where it is not finite."""
        rows = x.detach().movedim(self.channel, -1)
        rows = rows.reshape(-1, rows.shape[-1])
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if not bool(rows.sum(dtype=torch.float64).isfinite()):
            raise CalibrationError("the input of this site is NaN or infinite on a calibration batch", where=self.site,
                                   hint="check the batches, and that the model runs in a dtype that holds its activations")
        for name in self.names:
            if name not in self.sums:
                self.sums[name] = STATISTICS[name].start(rows.shape[1])
            STATISTICS[name].add(self.sums[name], rows)
        self.rows += rows.shape[0]

    def results(self) -> dict[str, Tensor]:
        """The statistics; none when no row came by."""
        return {name: STATISTICS[name].finish(total, self.rows) for name, total in self.sums.items()} if self.rows else {}


def _insert(program: Program, source: Source, names: Sequence[str], name: str) -> Tap:
    region = program.regions[source.region]
    tap = Tap(source.site, names, source.channel)
    region.module.add_module(name, tap)
    op = region.node(source.op)
    with region.graph.inserting_before(op):
        region.graph.call_module(name, (region.node(source.node),))
    return tap


def _call(model: nn.Module, batch: Inputs, number: int) -> None:
    """One call. The user's mistake in a batch is told with the batch's number."""
    try:
        if isinstance(batch, tuple):
            model(*batch)
        elif isinstance(batch, Mapping):
            model(**batch)
        else:
            raise InputError(f"is a {type(batch).__name__}; a batch is a tuple of positional or a dict of named arguments",
                             hint="put a single tensor into a tuple: (x,)")
    except InputError as error:
        where = f"calibration batch {number}" + (f", {error.where}" if error.where else "")
        raise InputError(error.what, where=where, hint=error.hint) from error
