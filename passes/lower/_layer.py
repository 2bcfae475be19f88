"""A layer that lowering measures: what computes it now, every form that it can run in, and how it is bound to one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.decision import Decision
from sparsify_compiler.epilogue import META, Epilogue, epilogues
from sparsify_compiler.fakes import fake_like, mode_of
from sparsify_compiler.far import FarKernel, is_far
from sparsify_compiler.operands import input_of, with_dense_weight
from sparsify_compiler.ops import put_part, put_rows, take_part, take_rows
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region, set_tensor
from sparsify_compiler.shapes import example_shape
from sparsify_compiler.site_graph import backwards

EAGER = "dense eager"
DECODE = 1  # rows that a layer with any number of them is measured at: those of a token that is generated
TIE = 1.1  # that a kernel's times with and without what follows it differ by from run to run
NOTHING = Epilogue()
Source = tuple[str, dict[str, Tensor], dict[str, Any]]  # operator, tensors and attributes that compute a layer: ("linear", {"weight": ...}, {})
CHUNK = 1 << 26  # bytes of dense weights that are measured together: more than the caches hold, little beside a large model


@dataclass(frozen=True)
class Form:
    """One way to run a layer. `kernel` is None for torch's own operators, `epilogue` what the kernel computes of what follows the layer."""

    dense: bool = True
    kernel: Any = None
    epilogue: Epilogue = NOTHING


@dataclass(eq=False)
class Layer:
    """One layer. `chain` is what follows it that some form of it could compute: every form is timed with it, so that they can be compared."""

    region: Region
    node: fx.Node
    decision: Decision
    weight: Tensor  # dense, masked where it is masked
    bias: Tensor | None
    packed: bool = False  # its weight is in a sparse format
    chain: Epilogue = NOTHING
    record: Any = None  # what tuning has found out about layers of its kind: its forms are those that were the best then
    forms: dict[str, Form] = field(default_factory=dict)
    runs: dict[str, Callable[[], object]] = field(default_factory=dict)  # what to time, the yardstick first
    expected: dict[str, Callable[[], object]] = field(default_factory=dict)  # what a form has to compute, if not what the yardstick does
    selects: bool = False  # kernels select by what they compute themselves: what rounding does to that may select another neuron

    @property
    def key(self) -> str:
        return f"{self.region.path}:{self.node.name}"

    def add(self, name: str, function: Callable[..., Tensor], x: Tensor, other: Tensor | None, form: Form,
            expected: Callable[[], Tensor] | None = None) -> None:
        """Take a form, which `function` runs on x, and on `other` where it adds; the rest of the chain is computed by torch's operators.

        `expected` gives its numbers by torch, where they are not those of the yardstick.
        """
        self.forms[name], self.runs[name] = form, timed(function, x, other, form.epilogue, self.chain)
        if expected is not None:
            self.expected[name] = expected

    def compared(self, name: str) -> list[tuple[Callable[[], object], Callable[[], object]]]:
        """The runs of a form, each beside what it has to compute."""
        return [(self.runs[name], self.expected.get(name) or next(iter(self.runs.values())))]

    def drop(self, name: str) -> None:
        """Let go of a form."""
        del self.forms[name], self.runs[name]

    def make_dense(self) -> None:
        """Replace the packed node by a dense one with the masked weight."""
        region, node, graph = self.region, self.node, self.region.graph
        first = next(v for k, v in node.kwargs.items() if isinstance(v, fx.Node) and v.op == "get_attr" and k != "bias")
        name = f"{str(first.target).rpartition('_packed.')[0]}_masked"
        set_tensor(region.module, name, nn.Parameter(self.weight, requires_grad=False))
        with graph.inserting_before(node):
            weight = graph.get_attr(name)
            place = {key: node.meta[key] for key in ("path", "module") if key in node.meta}
            weight.meta = {"val": fake_like(self.weight, mode_of(region)), "by": "lower"} | place
            self.node = with_dense_weight(node, weight)
        self.node.meta = {**node.meta, "by": "lower"}
        node.replace_all_uses_with(self.node)
        graph.erase_node(node)
        self.packed = False

    def bind(self, name: str) -> None:
        """Let the node run in this form."""
        form = self.forms[name]
        if form.kernel is not None:
            self.node.meta["kernel"] = form.kernel
            if isinstance(form.kernel, FarKernel):
                form.kernel.laid  # noqa: B018 — now, so that what does not fit is said here
            if form.epilogue.nodes:
                self.node.meta[META] = " ".join(form.epilogue.names)


def timed(function: Callable[..., Tensor], x: Tensor, other: Tensor | None, first: Epilogue, chain: Epilogue) -> Callable[[], Tensor]:
    """A call of the function, which computes the beginning `first` of the chain, and of the chain's rest.

    It holds no layer: the cycle would keep the weights until the garbage collector runs.
    """
    arguments = (x,) if first.other is None else (x, other)
    rest = chain.after(first)
    if not rest.nodes:
        return partial(function, *arguments)
    return lambda: rest(function(*arguments), other)


def fused(node: fx.Node, sources: Sequence[Source], dtype: torch.dtype, rows: tuple[int, ...], ctx: Context,
          taken: set[fx.Node]) -> list[tuple[Epilogue, Any]]:
    """The kernels for a layer, each with the epilogue that it computes, shortest first. The longest one's nodes are taken from then on."""
    assert ctx.kernels is not None
    assert ctx.target is not None
    shared: list[dict[str, list[Any]]] = [{} for _ in sources]  # one packed weight for all kernels of a source
    found: list[tuple[Epilogue, Any]] = []
    for epilogue in epilogues(node, taken):
        for (operator, tensors, attributes), made in zip(sources, shared, strict=True):
            given = attributes | epilogue.attributes()
            found += [(epilogue, one) for one in usable(ctx.kernels.candidates(operator, tensors, given, dtype, rows, ctx.target, made), ctx)]
    if found:
        taken.update(found[-1][0].nodes)
    return found


def fastest(times: Mapping[str, float], forms: Mapping[str, Form]) -> str:
    """The form of the least time; of those that are its kernel with more of what follows the layer, the longest that takes as long within TIE.

    Otherwise chance decides, for each of many like layers anew, and a library of the whole is another one at every compile.
    """
    best = min(times, key=lambda name: times[name])
    kernel = best.removesuffix(forms[best].epilogue.label)
    alike = [name for name, time in times.items() if name.removesuffix(forms[name].epilogue.label) == kernel and time <= times[best] * TIE]
    return max(alike, key=lambda name: len(forms[name].epilogue.nodes))


def usable(candidates: Iterable[Any], ctx: Context) -> list[Any]:
    """The candidates that the target can be given: for a machine that is not here those whose weight can be laid out for it."""
    return [one for one in candidates if one.portable or not is_far(ctx.target)]


def bound(candidate: Any, bias: Tensor | None, ctx: Context) -> Any:
    """A candidate's kernel with its weight: built and ready to run, or for a machine that is not here to be laid out once it is chosen."""
    if ctx.target is not None and is_far(ctx.target):
        return FarKernel(candidate.name, candidate.options, ctx.target, partial(candidate.lay, bias))
    return candidate.bind(bias)


def row_of(region: Region, node: fx.Node, kind: str, weight: Tensor, program: Program) -> Decision:
    """The decision of the site that a node belongs to; a new one where no pass has said anything yet."""
    site = str(node.meta.get("site") or node.meta.get("path") or region.qualified(node.name))
    return program.decisions.setdefault(site, replace(Decision.of(site, kind, weight), bytes=None))  # bytes are of what is chosen


def say(row: Decision, reason: str) -> None:
    """Add why; what an earlier pass said of the site stands."""
    row.reason = f"{row.reason}; {reason}" if row.reason else reason


def noise(region: Region, node: fx.Node, ctx: Context) -> Tensor:
    """Random numbers of the shape and dtype that a node's value has on the example inputs."""
    generator = torch.Generator().manual_seed(ctx.seed)
    return torch.randn(example_shape(region, node, ctx.example_inputs), generator=generator, dtype=torch.float32).to(node.meta["val"].dtype)


def rows_of(region: Region, node: fx.Node, ctx: Context) -> Tensor:
    """The rows [rows, K] that a layer of any number of them is measured with: where that number varies, those of a token that is generated."""
    x = noise(region, input_of(node), ctx)
    x = x.reshape(-1, x.shape[-1])
    return x[:DECODE] if any(not isinstance(size, int) for size in node.meta["val"].shape) else x


def on_taken_rows(node: fx.Node) -> bool:
    """Whether a layer lies in a block that runs on a part of the rows: how many there are is known at each call only, whatever the graph says."""
    back = (put_rows.op, put_part.op)
    taken = backwards(node, _takes, lambda one: one.op == "call_function" and one.target not in back)
    return bool(taken)


def _takes(node: fx.Node) -> bool:
    """Does it take as many rows as the data say? Of tokens there are as many in every text."""
    if node.target is take_part.op:
        return len(node.kwargs["index"].meta["val"].shape) == 1  # type: ignore[union-attr]
    return node.target is take_rows.op


def chunks(found: Iterable[tuple[Region, fx.Node]], size_of: Callable[[Region, fx.Node], int]) -> Iterator[tuple[list[tuple[Region, fx.Node]], int]]:
    """The layers in groups of about CHUNK bytes, and how many layers are done after each.

    What would be less than half of a group at the end goes with the one before: it would be timed with its weights in the caches, where they are not
    when the model runs.
    """
    sizes = [(one, size_of(*one)) for one in found]
    left = sum(size for _, size in sizes)
    chunk: list[tuple[Region, fx.Node]] = []
    size = 0
    for done, (one, own) in enumerate(sizes, 1):
        chunk.append(one)
        size, left = size + own, left - own
        if (size >= CHUNK and left >= CHUNK // 2) or done == len(sizes):
            yield chunk, done
            chunk, size = [], 0


