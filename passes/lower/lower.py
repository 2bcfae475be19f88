"""Bind layers to kernels where that was measured to pay; what does not pay runs in its fastest dense form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.errors import ParseError, TargetError
from sparsify_compiler.far import is_far
from sparsify_compiler.measure import Timing, round_robin
from sparsify_compiler.memory import give_back
from sparsify_compiler.operands import packed_operator
from sparsify_compiler.passes.lower import (
    _attention,
    _conv,
    _experts,
    _far,
    _held,
    _inputs_ffn,
    _layout,
    _linear,
    _numbers,
    _predicted,
    _scored,
    _selected,
    _selected_ffn,
    _tuning,
)
from sparsify_compiler.passes.lower._layer import Layer, chunks
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Region, Stage

SEEN = 5    # rounds in which every form is timed
SLOWER = 1.5    # times the layer's fastest form, then: what takes no part in the other rounds
Found = tuple[Region, fx.Node]
Times = Callable[[Sequence[Layer]], dict[str, dict[str, Timing]]]
# What does not compute all of its weights: is_packed, size_of, layer, choose, make_dense.
SELECTING = (_scored, _selected, _selected_ffn, _predicted, _held, _experts)


@dataclass(frozen=True)
class Lower(Pass):
    """Choose how every linear layer and every convolution runs, by measuring its kernels against the dense forms of the same layer.

    For a machine that is not here what they take is predicted, and kernels are laid out for it; this machine runs them by reference.

    Matches    sparsify.linear_<format>(x, <format tensors>, bias), sparsify.conv2d_<format>(x, <format tensors>, bias, ...);
               sparsify.select_linear(x, ..., weight, bias), sparsify.select_ffn(x, ..., gate, up, down), sparsify.held_ffn(x, ...),
               sparsify.predicted_ffn(x, scores, ..., gate, down, up), sparsify.experts_ffn(x, chosen, weights, gate, up, down, ...);
               linear(x, weight, bias) and conv(x, weight, bias, ...) with a stored weight; attend(query, key, value, ...)
    Rewrites   the same node bound to the fastest kernel, with the activation or addition that follows where the kernel computes it too; a packed
               node becomes dense where no sparse kernel pays, and a layer that selects its inputs then reads them all. An FFN of such layers
               becomes sparsify.select_inputs_ffn(x, gate, up, down, ...) where one kernel for all of it is the fastest. Convolutions run
               channels last, or on planes, where the whole is faster so. Attention that chooses its blocks does from the length on where that
               is faster
    Preserves  values, up to float reassociation: a kernel whose numbers differ by more, on this machine, is not used, and the decision says so
    Paper      none: measurement; the reason for it is "sparse, but not faster", the complaint that every earlier tool met

    margin  part of the fastest dense time that a kernel must save to be taken: below it, noise would decide
    rounds  how often each form is timed; layers take turns in each round, so that caches are met as in the model
    tune    "" for what is known already; "new" searches first for the best cut of the kernels of layers of which nothing is, "again" of all. What is
            found is kept on disk, for later compiles: `sparsify tune`
    prefer  "speed", or "bytes": a packed layer then keeps its fastest sparse kernel even where dense would be faster, and no convolution
            holds its weight a second time

    A NaN that a fused relu, relu6, hardtanh or hardsigmoid meets becomes one of their bounds, as under torch.compile; every other one stays a NaN.
    """

    margin: float = 0.05
    rounds: int = 15
    prefer: Literal["speed", "bytes"] = "speed"
    tune: Literal["", "new", "again"] = ""

    preserves: ClassVar[Preserves] = Preserves.VALUES
    needs_stage: ClassVar[Stage] = Stage.TRACED
    until_stage: ClassVar[Stage] = Stage.PACKED
    gives_stage: ClassVar[Stage | None] = Stage.LOWERED

    def __post_init__(self) -> None:
        if self.prefer not in ("speed", "bytes"):
            raise ParseError(f"prefer is 'speed' or 'bytes', not {self.prefer!r}", where="lower")
        if self.tune not in ("", "new", "again"):
            raise ParseError(f"tune is '', 'new' or 'again', not {self.tune!r}", where="lower")

    def run(self, program: Program, ctx: Context) -> Program:
        if ctx.target is None or ctx.kernels is None:
            raise TargetError("there is no target to lower for", where=self.name(), hint="compile(..., target='cpu') gives one")
        _predicted.drop_unpacked(program)
        linears = [(region, node) for region, node in program.nodes() if _linear.is_packed(node) or _linear.is_linear(node)]
        selecting = [(region, node) for region, node in program.nodes() if any(kind.is_packed(node) for kind in SELECTING)]
        convs = [(region, node) for region, node in program.nodes() if _conv.is_conv(node)]
        far = _far.Elsewhere(ctx.target, _far.weight_bytes(program)) if is_far(ctx.target) else None
        times: Times = self._measured if far is None else far.timings
        selecting = selecting if far is None else _far.leave(selecting, program, ctx.target)
        taken: set[fx.Node] = set()
        total = len(selecting) + len(linears) + len(convs)
        ctx.progress("lower", 0, total)
        with torch.no_grad():
            wholes = [found for found in selecting if far is None and _inputs_ffn.find(found[1]) is not None]
            for chunk, _ in chunks(wholes, _inputs_ffn.size_of):
                whole = self._lower_ffns(chunk, program, ctx)
                selecting = [found for found in selecting if found[1] not in whole]
                give_back()
            for chunk, done in chunks(selecting, _size_of):
                linears += self._lower_selecting(chunk, program, ctx, times)
                give_back()
                ctx.progress("lower", done, total)
            linears = [found for found in linears if not found[1]._erased]  # a predictor goes with its selection
            if self.tune:
                _tuning.search(linears, program, ctx, self.tune == "again")
            for chunk, done in chunks(linears, _linear.size_of):
                self._lower(chunk, program, ctx, taken, times)
                give_back()
                ctx.progress("lower", done, total)
            for region in program.regions.values():
                self._lower_convs([found for found in convs if found[0] is region], program, ctx, taken, times)
            ctx.progress("lower", total, total)
            if far is None:
                _attention.lower(program, ctx, self.rounds, self.margin)
            else:
                far.note()
                _far.leave_attentions(program, ctx.target)
        return program

    def _measured(self, layers: Sequence[Layer]) -> dict[str, dict[str, Timing]]:
        """Times of all forms whose numbers are right. What is much slower than another form of the layer is timed a few times only, and so are all
        where tuning has found out already which are the best: it only has to be seen that they pay."""
        for layer in layers:
            _numbers.check(layer)
        times = round_robin({layer.key: layer.runs for layer in layers}, rounds=min(self.rounds, SEEN), warmup=1)
        left = {layer.key: _rivals(layer.runs, times[layer.key]) for layer in layers if layer.record is None and self.rounds > SEEN}
        for key, found in round_robin(left, rounds=self.rounds - SEEN, warmup=0).items():
            times[key] |= found
        return times

    def _lower(self, chunk: Iterable[Found], program: Program, ctx: Context, taken: set[fx.Node], times: Times) -> None:
        """Measure some layers together. The forms that lose are freed on return, before the next layers are laid out."""
        layers = [_linear.linear(region, node, program, ctx, taken) for region, node in chunk]
        timings = times(layers)
        for layer in layers:
            if ctx.spend():
                _linear.choose(layer, timings[layer.key], self.margin, self.prefer)

    def _lower_ffns(self, chunk: Iterable[Found], program: Program, ctx: Context) -> set[fx.Node]:
        """FFNs of which every linear selects its inputs, in one call where that is the fastest. Returns the linears that are done with."""
        layers = [_inputs_ffn.whole(region, node, program, ctx) for region, node in chunk]
        timings = self._measured(layers)
        whole = [layer for layer in layers if ctx.spend() and _inputs_ffn.choose(layer, timings[layer.key], self.margin, program)]
        return {node for layer in whole for node in layer.ffn.linears.values()}

    def _lower_selecting(self, chunk: Iterable[Found], program: Program, ctx: Context, times: Times) -> list[Found]:
        """The same for layers that select their inputs. Those where that does not pay are made dense and handed back."""
        layers = [_kind(node).layer(region, node, program, ctx) for region, node in chunk]
        timings = times(layers)
        refused = [layer for layer in layers if ctx.spend() and not _kind(layer.node).choose(layer, timings[layer.key], self.margin)]
        return [(layer.region, node) for layer in refused for node in _kind(layer.node).make_dense(layer)]

    def _lower_convs(self, found: list[Found], program: Program, ctx: Context, taken: set[fx.Node], times: Times) -> None:
        """The same for the convolutions of a region, which then choose a layout together."""
        picked: list[_conv.Conv] = []
        sparse = any(packed_operator(node) for _, node in found)
        for chunk, _ in chunks(found, partial(_conv.size_of, ctx=ctx)):
            layers = [_conv.conv(region, node, program, ctx, taken, self.prefer == "speed", sparse) for region, node in chunk]
            timings = times(layers)
            for layer in layers:
                layer.pick(timings[layer.key], self.margin, self.prefer)
            picked += layers
        if picked:
            _layout.choose(picked[0].region, picked, ctx, self.margin, self.prefer)
            give_back()


def _rivals(runs: Mapping[str, Callable[[], object]], times: Mapping[str, Timing]) -> dict[str, Callable[[], object]]:
    """The forms of a layer between which a few rounds have not decided."""
    least = min(timing.median for timing in times.values())
    found = {name: run for name, run in runs.items() if times[name].median <= SLOWER * least}
    return found if len(found) > 1 else {}


def _kind(node: fx.Node) -> Any:
    return next(kind for kind in SELECTING if kind.is_packed(node))


def _size_of(region: Region, node: fx.Node) -> int:
    size: int = _kind(node).size_of(region, node)
    return size


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two linear layers; there is something to lower once they are masked and packed."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval(), (torch.randn(8, 64),)
