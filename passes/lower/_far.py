"""Lowering for a machine that is not here: what it takes there is predicted, nothing is run. The rules are those of layers that are timed.

A kernel that no formula knows is taken for a roofline of its operations and bytes. What cannot be laid out for another machine keeps its op, which
runs there by its reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from sparsify_compiler import catalog, machines
from sparsify_compiler.cost import Cost, conv_cost, elementwise_cost
from sparsify_compiler.decision import Decision
from sparsify_compiler.errors import InputError
from sparsify_compiler.measure import Timing
from sparsify_compiler.operands import input_of, operands, operator_of, packed_operator
from sparsify_compiler.ops import attend
from sparsify_compiler.passes.lower import _experts, _held
from sparsify_compiler.passes.lower._layer import EAGER, Form, Layer, say
from sparsify_compiler.passes.lower._linear import REFERENCE, Linear
from sparsify_compiler.program import Program, Region
from sparsify_compiler.target import Target
from sparsify_compiler.work import Work, predict

Found = tuple[Region, fx.Node]
FFN, SIZES = "_ffn", ("r", "c", "n", "m")
WIDE = "avx512f"    # the feature that formulas of kernels for any vectors ask for


class Elsewhere:
    """A machine that is not here, and what is known of its speed. Raises TargetError where nothing is."""

    def __init__(self, target: Target, between: int) -> None:
        self.target, self.between = target, between
        self.machine, own = machines.nearest_machine(target)
        self.source = f"predicted for {target.name}" + ("" if own else f", by what is known of {self.machine.name}")
        self._sources: dict[int, tuple[Decision, str]] = {}

    def timings(self, layers: Sequence[Layer]) -> dict[str, dict[str, Timing]]:
        """Layer -> form -> its time: as it was measured there, else as it is predicted."""
        return {layer.key: self._timings(layer) for layer in layers}

    def note(self) -> None:
        """Say of every layer that was lowered where its times come from."""
        for row, source in self._sources.values():
            row.source = source
            say(row, source)

    def _timings(self, layer: Layer) -> dict[str, Timing]:
        tensors, attributes, _ = operands(layer.region, layer.node)
        known, made = self._predicted(layer, tensors, attributes), {}
        measured = {} if layer.record is None else layer.record.times
        self._sources.setdefault(id(layer.decision), (layer.decision, self.source))
        if measured:
            self._sources[id(layer.decision)] = layer.decision, f"{layer.record.source}; {self.source} where nothing was"
        for name in layer.runs:
            form = layer.forms[name]
            if name in measured:
                made[name] = _exactly(measured[name] + 1e3 * self._after(layer, form))
                continue
            seconds = known.get(name.removesuffix(form.epilogue.label))
            seconds = self._guessed(layer, name, form, tensors, known) if seconds is None else seconds
            made[name] = _exactly(1e3 * (seconds + self._after(layer, form)))
        return made

    def _predicted(self, layer: Layer, tensors: Mapping[str, Any], attributes: Mapping[str, Any]) -> dict[str, float]:
        """What formulas say of the layer's forms, by their names without epilogues."""
        op, (outputs, inputs) = operator_of(layer.node), (int(size) for size in layer.weight.reshape(len(layer.weight), -1).shape)
        if not isinstance(layer, Linear):
            return {}
        sizes: dict[str, float] = {"M": layer.rows, "N": outputs, "K": inputs}
        if op.endswith(FFN):
            op, sizes = "select_ffn", {**sizes, "K": int(input_of(layer.node).meta["val"].shape[-1]), "hidden": inputs}
        if op != "linear":
            stored = tensors["values"].numel() / max(layer.weight.numel(), 1) if packed_operator(layer.node) else layer.decision.density
            sizes |= {"density": stored} | {name: int(attributes[name]) for name in SIZES if name in attributes}
        dtype = str(layer.weight.dtype).removeprefix("torch.")
        # Formulas count steps in the machine's own times. Those of kernels that another instruction set got first hold for it too.
        wider = replace(self.machine, features=(*self.machine.features, WIDE))
        try:
            work = Work.make(op, "float32" if dtype == "float16" else dtype, self.between, **sizes)
            return {**predict(work, wider), **predict(work, self.machine)}
        except InputError:  # a dtype or an op that no formula knows
            return {}

    def _guessed(self, layer: Layer, name: str, form: Form, tensors: Mapping[str, Any], known: Mapping[str, float]) -> float:
        """By a roofline, over all operations and bytes of a dense form, or what is kept of a sparse one, which is no more efficient than dense."""
        weights = [tensor for key, tensor in tensors.items() if operator_of(layer.node).endswith(FFN) and tensor.dim() == 2 and key in ("gate", "up")]
        cost = conv_cost(input_of(layer.node).meta["val"], layer.weight, layer.node.meta["val"])
        held = layer.weight.numel() * layer.weight.element_size()
        for weight in weights:
            cost = cost + Cost(2 * weight.numel() * max(getattr(layer, "rows", 1), 1), weight.numel() * weight.element_size())
        if name == REFERENCE:
            return known.get(EAGER, self._roofline(cost)) + self._roofline(Cost(0, 2 * held))
        kept = 1.0 if form.dense else layer.decision.density
        return max(self._roofline(Cost(cost.flops * kept, cost.bytes - held * (1 - kept))), kept * known.get(EAGER, 0.0))

    def _after(self, layer: Layer, form: Form) -> float:
        """Seconds of what follows the layer and its kernel does not compute."""
        value = layer.node.meta["val"]
        rest = layer.chain.after(form.epilogue).nodes
        size = getattr(layer, "rows", 0) * int(layer.weight.shape[0]) or value.numel()
        return len(rest) * self._roofline(elementwise_cost(2 * size, size, value.element_size())) if rest else 0.0

    def _roofline(self, cost: Cost) -> float:
        seconds: float = catalog.get("cost model", "predict").rough(cost.flops, cost.bytes, self.machine).total
        return seconds


def _exactly(ms: float) -> Timing:
    return Timing(ms, ms, ms)


def weight_bytes(program: Program) -> int:
    """Bytes of weights that a model reads between two calls of a layer."""
    held = {(region.path, node.target): node.meta["val"] for region, node in program.nodes() if node.op == "get_attr" and "val" in node.meta}
    return int(sum(value.numel() * value.element_size() for value in held.values()))


def leave(selecting: Iterable[Found], program: Program, target: Target) -> list[Found]:
    """Those of the selecting layers that are chosen for; the others keep what they are, and their rows say so."""
    kept = []
    for region, node in selecting:
        if _experts.is_packed(node) or _held.is_packed(node):
            stay(str(node.meta.get("site") or node.meta.get("path") or region.qualified(node.name)), program, target)
        else:
            kept.append((region, node))
    return kept


def leave_attentions(program: Program, target: Target) -> None:
    """Attentions by blocks read them at every length: from where on that is faster shows only where it runs."""
    sites = [str(node.meta.get("site", node.name)) for _, node in program.nodes() if node.target is attend.op]
    for site in [*sites, *program.attentions]:
        stay(site, program, target)


def stay(site: str, program: Program, target: Target) -> None:
    """Say of a site that nothing was chosen for it."""
    row = program.decisions.get(site)
    if row is not None:
        row.source = f"nothing is known of it on {target.name}"
        say(row, f"as the model has it, by its reference: its kernels are made and timed where they run, not for {target.name} from here")
