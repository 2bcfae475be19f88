"""One run of the batches through the model, with taps on the inputs of sites."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .calibrate_loss import Loss, differentiate, self_supervised
from .calibrate_taps import GradientTap, InputGradientTap, Tap
from .call import instantiate
from .errors import CalibrationError, InputError
from .program import Program, Region, Site
from .site_ffn import neurons_of, partner_of
from .statistic import STATISTICS

Inputs = tuple[Any, ...] | Mapping[str, Any]
Entry = tuple[tuple[str, str, int], str]  # (key of a source, name of a statistic)


@dataclass(frozen=True)
class Source:
    """A value to be watched on behalf of one or more sites.

    region, node  where it is computed; op is the node that reads it. For a gradient, node is the op itself
    channel       which dimension holds the channels, counted from the end
    width         how many channels there are; for a gradient, the number of weights
    other         of a block, the node of the residual stream after it
    shape         of a gradient, the weight's shape
    through       the gradient by what `op` reads, as far as it comes through this op
    after         the gradient by what `op` gives
    """

    site: str
    region: str
    node: str
    op: str
    channel: int
    width: int
    other: str = ""
    shape: tuple[int, ...] | None = None
    through: bool = False
    after: bool = False

    @property
    def key(self) -> tuple[str, str, int]:
        if self.through or self.after:
            return self.region, f"{self.op}{'<' if self.through else '>'}", self.channel
        return self.region, f"{self.node}>{self.other}" if self.other else f"{self.node}'" if self.shape is not None else self.node, self.channel


def find_sources(program: Program, needs: Mapping[str, frozenset[str]]) -> dict[tuple[str, str], Source | None]:
    """(site path, statistic) -> what to watch for it, in the order of execution; None where such a site has nothing of the kind.

    Sources of equal key are one value. Raises CalibrationError for a path that is no linear or convolution site.
    """
    from .sites import find_sites

    nodes = {(region.path, node.name): node for region, node in program.nodes()}
    found: dict[tuple[str, str], Source | None] = {}
    seen: set[str] = set()
    wanted = {STATISTICS[name].of for names in needs.values() for name in names}
    makers: dict[str, Any] = {"hidden": _hidden, "block": _around, "neurons": partial(_of_ffn, neurons_of), "partner": partial(_of_ffn, partner_of)}
    elsewhere = {of: make(program, nodes) if of in wanted else {} for of, make in makers.items()}
    for site in find_sites(program, ("linear", "conv")):
        if not needs.get(site.path) or site.path in seen:
            continue
        seen.add(site.path)
        op = nodes[site.region, site.roles["op"]]
        channel = -1 if site.kind == "linear" else 1 - op.kwargs["weight"].meta["val"].dim()  # type: ignore[union-attr]
        for name in sorted(needs[site.path]):
            of = STATISTICS[name].of
            if name == "gram" and channel != -1:
                raise CalibrationError("the statistic gram is gathered for linear layers only", where=site.path)
            if of in elsewhere:
                found[site.path, name] = elsewhere[of].get((site.region, op.name))
            else:
                read = _input(site, op, channel)
                given = replace(read, after=True, width=int(op.meta["val"].shape[channel]))
                watched = {"input": read, "input gradient": replace(read, through=True), "output gradient": given}
                found[site.path, name] = watched.get(of) or _gradient(site, op)
    for path, names in needs.items():
        if names and path not in seen:
            raise CalibrationError("there is no linear or convolution site of this path to gather statistics at", where=path)
    return found


def weight_names(program: Program) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Site path -> the name in the whole model and the shape of its weight, where it is a parameter."""
    from .sites import find_sites

    nodes = {(region.path, node.name): (region, node) for region, node in program.nodes()}
    found = {}
    for site in find_sites(program, ("linear", "conv")):
        region, op = nodes[site.region, site.roles["op"]]
        weight = op.kwargs["weight"]
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            found[site.path] = (region.qualified(str(weight.target)), tuple(int(size) for size in weight.meta["val"].shape))
    return found


def _input(site: Site, op: fx.Node, channel: int) -> Source:
    value = op.kwargs["input"]
    assert isinstance(value, fx.Node)
    return Source(site.path, site.region, value.name, op.name, channel, int(value.meta["val"].shape[channel]))


def _gradient(site: Site, op: fx.Node) -> Source:
    weight = op.kwargs["weight"]
    assert isinstance(weight, fx.Node)
    shape = tuple(int(size) for size in weight.meta["val"].shape)
    return Source(site.path, site.region, op.name, op.name, -1, math.prod(shape), shape=shape)


def _hidden(program: Program, nodes: Mapping[tuple[str, str], fx.Node]) -> dict[tuple[str, str], Source]:
    """(region, up or gate op) -> the input of their FFN's down projection."""
    from .sites import find_sites

    found: dict[tuple[str, str], Source] = {}
    for ffn in find_sites(program, ("ffn",)):
        down = nodes[ffn.region, ffn.roles["down"]]
        source = _input(replace(ffn, path=f"{ffn.path}, down"), down, -1)
        found |= {(ffn.region, ffn.roles[role]): source for role in ("up", "gate") if role in ffn.roles}
    return found


def _of_ffn(watched: Callable[[Region, Site], fx.Node | None], program: Program,
            nodes: Mapping[tuple[str, str], fx.Node]) -> dict[tuple[str, str], Source]:
    """(region, down op) -> a value of its FFN: its neurons, or what they are multiplied with."""
    from .sites import find_sites

    found: dict[tuple[str, str], Source] = {}
    for ffn in find_sites(program, ("ffn",)):
        value = watched(program.regions[ffn.region], ffn)
        if value is not None:
            width = int(value.meta["val"].shape[-1])
            found[ffn.region, ffn.roles["down"]] = Source(f"{ffn.path}, {value.name}", ffn.region, value.name, ffn.roles["down"], -1, width)
    return found


def _around(program: Program, nodes: Mapping[tuple[str, str], fx.Node]) -> dict[tuple[str, str], Source]:
    """(region, op) -> the residual stream before and after the block that it lies in."""
    from .site_block import find_blocks
    from .site_graph import CONVOLUTIONS

    found: dict[tuple[str, str], Source] = {}
    for block in find_blocks(program):
        sizes = nodes[block.region, block.input].meta["val"].shape
        channel = 1 - len(sizes) if any(nodes[block.region, op].target in CONVOLUTIONS for op in block.ops) else -1
        source = Source(block.path, block.region, block.input, block.output, channel, int(sizes[channel]), other=block.output)
        found |= {(block.region, op): source for op in block.ops}
    return found


def collect(program: Program, batches: Iterable[Inputs], sources: Sequence[Source], entries: Sequence[Entry],
            progress: Callable[[str, int, int], None], loss: Loss = self_supervised) -> dict[Entry, Tensor]:
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
    gradients = [tap for tap in taps.values() if isinstance(tap, GradientTap)]
    for batch in batches:
        if gradients:
            with torch.inference_mode(False), torch.enable_grad():
                _backward(model, loss, recordable(batch), done, gradients)
        else:
            call_on(model, batch, done)
        done += 1
        progress("calibrate", done, total)
    if not done:
        raise CalibrationError("calibration holds no batch", where="calibration", hint="give at least one, like example_inputs")
    return {(key, name): value for key, tap in taps.items() for name, value in tap.results().items()}


def recordable(batch: Inputs) -> Inputs:
    """The batch with tensors that autograd may save: those made in inference mode are copied."""
    copied: Inputs = pytree.tree_map_only(Tensor, lambda x: x.clone() if x.is_inference() else x, batch)
    return copied


def _backward(model: nn.Module, loss: Loss, batch: Inputs, number: int, taps: Sequence[GradientTap]) -> None:
    """Call the model and differentiate the loss by the weights that this batch reached."""
    output = call_on(model, batch, number)
    weights = [weight for tap in taps for weight in tap.seen]
    gradients = iter(differentiate(loss, output, batch, weights) if weights else [])
    for tap in taps:
        tap.take([next(gradients) for _ in tap.seen])


def _insert(program: Program, source: Source, names: Sequence[str], name: str) -> Tap:
    region = program.regions[source.region]
    op = region.node(source.op)
    if source.after:
        after = InputGradientTap(source.site, names, source.channel)
        region.module.add_module(name, after)
        with region.graph.inserting_after(op):
            seen = region.graph.call_module(name, (op,))
        op.replace_all_uses_with(seen, delete_user_cb=lambda user: user is not seen)
        return after
    if source.through or source.shape is not None:
        argument = "input" if source.through else "weight"
        made = InputGradientTap(source.site, names, source.channel) if source.through else GradientTap(source.site, names, source.shape or ())
        region.module.add_module(name, made)
        with region.graph.inserting_before(op):
            op.kwargs = {**op.kwargs, argument: region.graph.call_module(name, (op.kwargs[argument],))}
        return made
    tap = Tap(source.site, names, source.channel)
    region.module.add_module(name, tap)
    values = tuple(region.node(node) for node in (source.node, source.other) if node)
    with region.graph.inserting_after(op) if source.other else region.graph.inserting_before(op):
        region.graph.call_module(name, values)
    return tap


def call_on(model: nn.Module, batch: Inputs, number: int) -> Any:
    """One call. The user's mistake in a batch is told with the batch's number."""
    try:
        if isinstance(batch, tuple):
            return model(*batch)
        if isinstance(batch, Mapping):
            return model(**batch)
        raise InputError(f"is a {type(batch).__name__}; a batch is a tuple of positional or a dict of named arguments",
                         hint="put a single tensor into a tuple: (x,)")
    except InputError as error:
        where = f"calibration batch {number}" + (f", {error.where}" if error.where else "")
        raise InputError(error.what, where=where, hint=error.hint) from error
