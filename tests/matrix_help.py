"""The cases of test_matrix.py: every kernel of every family against what it means, in one dtype, on whatever machine is `host()`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import test_attend_kernels
import test_experts_kernels
import test_planes
import test_predicted_ffn
import test_select_inputs_ffn
import test_select_neurons
import test_top_pages
import test_whole_graph_kernels as graph
import test_whole_graph_scores
import test_whole_graph_selections
import torch
from test_kernels import mask_of
from torch import Tensor
from torch.nn.functional import conv2d, linear

from sparsify_compiler import catalog, key_sums
from sparsify_compiler.block_grid import Grid
from sparsify_compiler.block_layout import from_blocks
from sparsify_compiler.codegen import build, runtime
from sparsify_compiler.codegen.bound import as_arguments
from sparsify_compiler.codegen.laid import elsewhere
from sparsify_compiler.codegen.trained import TrainedLinear
from sparsify_compiler.codegen.vectors import vectors_of
from sparsify_compiler.ops import predicted_ffn, select, select_ffn, select_inputs_ffn, top_pages
from sparsify_compiler.target import Target, host

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {FLOAT: 2e-6, BFLOAT: 8e-3, HALF: 1e-3}     # of the sum of |w||x|: float32 sums, and one rounding to the dtype of y
LOOSE = {FLOAT: 2e-5, BFLOAT: 3e-2}                     # of the largest y: hidden numbers are rounded too
STRUCTURES: tuple[tuple[str, dict[str, int]], ...] = (("csr", {}), ("nm", {"n": 2, "m": 4}), *(("bsr", {"r": r, "c": 1}) for r in (2, 4, 8, 16)))
GEOMETRY = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}


def random(*shape: int, dtype: torch.dtype = FLOAT) -> Tensor:
    return torch.randn(*shape, dtype=FLOAT).to(dtype)


def packed(structure: str, sizes: dict[str, int], n: int, k: int, dtype: torch.dtype) -> tuple[Any, Tensor]:
    """A stored weight, and the same in float64."""
    mask, weight = mask_of(structure, n, k, 0.3, **sizes), random(n, k, dtype=dtype)
    return catalog.get("format", structure).encode(weight, mask, **sizes), weight.double() * mask


def ours(op: str, tensors: dict[str, Tensor], attributes: dict[str, Any], dtype: torch.dtype, *rows: int) -> list[Any]:
    """Candidates that are no form of torch."""
    theirs = ("linear", "mkl", "conv2d", "repeated", "experts_torch")
    return [one for one in runtime.candidates(op, tensors, attributes, dtype, rows, host()) if one.options["family"] not in theirs]


def right(y: Tensor, exact: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    assert y.dtype is dtype
    assert y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= TOLERANCE[dtype] * (scale + 1)).all())


def near(y: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert y.dtype is dtype
    assert y.shape == exact.shape
    assert float((y.double() - exact).abs().max()) <= LOOSE[dtype] * max(float(exact.abs().max()), 1.0)


def library(op: str, tensors: dict[str, Tensor], bias: Tensor | None, dtype: torch.dtype, *given: Tensor, outputs: int,
            **attributes: Any) -> Iterator[Tensor]:
    """y of the kernels for many rows that only libraries without PyTorch have."""
    with elsewhere():
        for candidate in ours(op, tensors, attributes, dtype, 1):
            candidate = replace(candidate, target=replace(candidate.target, cores=2))   # threads of the emulated machine
            laid, y = candidate.lay(bias), torch.full((len(given[0]), outputs), torch.nan, dtype=FLOAT).to(dtype)
            build.load(laid.variants.schedules["many"], host()).function(*given, *as_arguments(laid.prepared), y)
            yield y


def _layers(dtype: torch.dtype) -> Iterator[None]:
    """Sparse layers, one row and many, whatever is offered for either."""
    for structure, sizes in STRUCTURES:
        stored, weight = packed(structure, sizes, 37, 60, dtype)
        bias = random(37, dtype=dtype)
        for rows in ((1,), (1, 70), (70,)):
            for candidate in ours(f"linear_{structure}", stored.tensors(), stored.attributes(), dtype, *rows):
                kernel = candidate.bind(bias)
                for count in (1, 3, 70):
                    x = random(count, 60, dtype=dtype)
                    right(kernel(x), linear(x.double(), weight, bias.double()), linear(x.double().abs(), weight.abs()), dtype)
                yield


def _dense(dtype: torch.dtype) -> Iterator[None]:
    """The last layer of a language model, whole."""
    weight, bias = random(70, 64, dtype=dtype), random(70, dtype=dtype)
    for candidate in ours("linear", {"weight": weight}, {"any_rows": True}, dtype, 1):
        kernel = candidate.bind(bias)
        for rows in (1, 3):
            x = random(rows, 64, dtype=dtype)
            right(kernel(x), linear(x.double(), weight.double(), bias.double()), linear(x.double().abs(), weight.double().abs()), dtype)
        yield


def _inputs(dtype: torch.dtype) -> Iterator[None]:
    tensors, bias = {"weight": random(60, 37, dtype=dtype), "limit": torch.tensor(0.5)}, random(37, dtype=dtype)
    for candidate in ours("select_linear", tensors, {}, dtype, 1):
        kernel = candidate.bind(bias)
        for rows in (1, 9):
            x, weight = random(rows, 60, dtype=dtype), tensors["weight"].double().t()
            taken = select.reference(x, tensors["limit"], None, None).double()
            for y in (kernel(x), *library("select_linear", tensors, bias, dtype, x, outputs=37)):
                right(y, linear(taken, weight, bias.double()), linear(taken.abs(), weight.abs()), dtype)
        yield


def _doubles(tensors: dict[str, Tensor], bias: Tensor | None) -> dict[str, Any]:
    return {**{name: tensor.double() for name, tensor in tensors.items()}, "bias": None if bias is None else bias.double()}


def _neurons(dtype: torch.dtype) -> Iterator[None]:
    tensors, bias = test_select_neurons.made(64, 96, 37, dtype, True, True)
    for limit in (0.0, 100.0):      # all, and none: a neuron on a limit between may fall on either side of it
        yield from _selecting_ffn("select_ffn", select_ffn.reference, tensors | {"limit": torch.tensor(limit)}, bias, dtype)


def _inputs_ffn(dtype: torch.dtype) -> Iterator[None]:
    for limits in ((0.0, 0.0, 0.0), (0.5, 0.5, 0.0)):
        tensors, bias = test_select_inputs_ffn.made(64, 96, 37, dtype, limits, True, False, False, True, True)
        yield from _selecting_ffn("select_inputs_ffn", select_inputs_ffn.reference, tensors, bias, dtype)


def _selecting_ffn(op: str, reference: Callable[..., Tensor], tensors: dict[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> Iterator[None]:
    """An FFN that selects by what it computes itself."""
    for candidate in ours(op, tensors, {"activation": "silu"}, dtype, 1):
        kernel = candidate.bind(bias)
        for rows in (1, 9):
            x = random(rows, 64, dtype=dtype)
            for y in (kernel(x), *library(op, tensors, bias, dtype, x, outputs=37, activation="silu")):
                near(y, reference(x.double(), **_doubles(tensors, bias), activation="silu"), dtype)
        yield


def _predicted(dtype: torch.dtype) -> Iterator[None]:
    tensors, bias = test_predicted_ffn.made(64, 96, 37, dtype, True, True)
    limit = torch.tensor(0.5)
    for candidate in ours("predicted_ffn", tensors | {"limit": limit}, {"activation": "silu"}, dtype, 1):
        kernel = candidate.bind(bias)
        for rows in (1, 9):
            x, scores = random(rows, 64, dtype=dtype), torch.rand(rows, 96)
            whole = tensors | {"limit": limit}
            for y in (kernel(x, scores), *library("predicted_ffn", whole, bias, dtype, x, scores, outputs=37, activation="silu")):
                near(y, predicted_ffn.reference(x.double(), scores, limit, **_doubles(tensors, bias), activation="silu"), dtype)
        yield


def _experts(dtype: torch.dtype) -> Iterator[None]:
    tensors = test_experts_kernels.made(dtype, True, True, False)
    own = {name: tensor for name, tensor in tensors.items() if name != "bias"}
    for candidate in ours("experts_ffn", own, {"activation": "silu"}, dtype, 1, 64):
        kernel = candidate.bind(tensors["bias"])
        for rows in (1, 33):
            x, chosen, weights = random(rows, test_experts_kernels.K, dtype=dtype), torch.randint(-1, 5, (rows, 2)), torch.rand(rows, 2)
            exact = test_experts_kernels.expected(x.double(), chosen, weights.double(), _doubles(tensors, tensors["bias"]), "silu")
            near(kernel(x, chosen, weights), exact, dtype)
        yield


def _convolutions(dtype: torch.dtype) -> Iterator[None]:
    """Sparse ones over planes, or over pixels; in float32 also those that have a plane for each kernel."""
    for size, (structure, sizes) in ((3, ("csr", {})), (1, ("csr", {})), (1, ("bsr", {"r": 16, "c": 1}))):
        stored, weight = packed(structure, sizes, 32, 20 * size * size, dtype)
        geometry = {**GEOMETRY, "padding": [size // 2] * 2, "kernel_size": [size, size]}
        whole, bias = weight.view(32, 20, size, size), random(32, dtype=dtype)
        for candidate in ours(f"conv2d_{structure}", stored.tensors(), {**stored.attributes(), **geometry}, dtype, 2, 20, 9, 11):
            kernel, x = candidate.bind(bias), random(2, 20, 9, 11, dtype=dtype)
            right(kernel(x), conv2d(x.double(), whole, bias.double(), padding=size // 2),
                  conv2d(x.double().abs(), whole.abs(), padding=size // 2), dtype)
            yield
    each, groups = random(20, 1, 3, 3, dtype=dtype), {**GEOMETRY, "groups": 20, **test_planes.PLANES}
    for candidate in ours("conv2d", {"weight": each}, groups, dtype, 2, 20, 9, 11):
        kernel, x = candidate.bind(None), random(2, 20, 9, 11, dtype=dtype)
        right(kernel(x), conv2d(x.double(), each.double(), padding=1, groups=20), conv2d(x.double().abs(), each.double().abs(), padding=1, groups=20),
              dtype)
        yield


def _attention(dtype: torch.dtype) -> Iterator[None]:
    for queries, keys in ((1, 70), (5, 70), (40, 70)):
        query, key, value = (one.to(dtype) for one in test_attend_kernels.tensors(1, 4, 2, queries, keys, 32))
        table = test_attend_kernels.chosen(1, 4, queries, keys, 16, 16, 0.7)
        test_attend_kernels.check(query, key, value, from_blocks(table, Grid(queries, keys, 16, 16, True)))
        yield


def _pages(dtype: torch.dtype) -> Iterator[None]:
    """What a step of decoding finds its blocks by, from what is kept and from keys; numbers of which every sum is exact."""
    for way, kinds in top_pages.KINDS.items():
        for groups in (1, 4):
            query, key = (test_top_pages.whole_numbers(2, number, rows, 32, dtype=dtype) for number, rows in ((4, 1), (groups, 70)))
            if not top_pages.has_kernel(query, key):
                return
            mask = torch.arange(70) >= torch.tensor([[0], [21]])
            kept = tuple(key_sums._reduced(key[:, :, :48], kind, 8, mask[:, :48]) for kind in kinds)
            heads = top_pages.Heads(torch.full((4,), 0.5), torch.ones(4, dtype=torch.int32), torch.zeros(1, 1, 5, dtype=torch.int8), None)
            test_top_pages.check((query, key, kept, mask, None, None, heads),
                                 {"pages": top_pages.Pages(way, 8), "block": 16, "scale": test_top_pages.SCALE})
        yield


def _training(dtype: torch.dtype) -> Iterator[None]:
    """A packed layer, and its gradients by x and by its values."""
    for structure, sizes in (("csr", {}), ("bsr", {"r": 4, "c": 1})):
        stored, weight = packed(structure, sizes, 36, 60, dtype)
        layer, values = TrainedLinear(f"linear_{structure}", stored.tensors(), stored.attributes()), stored.tensors()["values"]
        x, change = random(21, 60), random(21, 36)
        rows, columns = layer.pack(x), layer.pack_gradient(change)
        right(layer.product(rows, 21, values, None), linear(x.double(), weight), linear(x.double().abs(), weight.abs()), dtype)
        right(layer.input_gradient(columns, 21, values), change.double() @ weight, change.double().abs() @ weight.abs(), dtype)
        dense = change.double().T @ x.double()
        kept = catalog.get("format", structure).encode(dense.float(), weight != 0, **sizes).tensors()["values"]
        right(layer.value_gradient(columns, rows, values), kept.double(), kept.double().abs() + 21, dtype)
        yield


def _graphs(dtype: torch.dtype) -> Iterator[None]:
    """What only libraries without PyTorch use."""
    cut_for = vectors_of(host())
    for layout in ("inputs", "outputs") if dtype is BFLOAT else ("panels", "inputs", "outputs"):
        graph.test_dense_products(layout, dtype, cut_for)
    graph.test_one_token_of_texts_that_start_later(dtype)
    if dtype is BFLOAT:
        graph.test_norms_and_activations_in_bfloat16()
    else:
        graph.test_norms(5, 7)
        graph.test_softmax(77)
        graph.test_activations(17)
        graph.test_attention(graph.ATTENTIONS[0])
        test_whole_graph_scores.agrees(test_whole_graph_scores.BOUNDS, "first", (33, 64))
        graph.test_attention_of_one_token((6, 2, 32, 16, cut_for.lanes, 8))
        test_whole_graph_selections.test_the_largest_of_a_row(True)
    yield


@dataclass(frozen=True)
class Case:
    """What runs kernels, these schedules (codegen/kernels), in these dtypes, each by default on every machine.

    only    schedule -> the features that a machine must have for it to be chosen
    narrow  dtype -> the schedules of that dtype, where it is not all of them
    """

    run: Callable[[torch.dtype], Iterator[None]]
    schedules: frozenset[str]
    dtypes: tuple[torch.dtype, ...]
    only: dict[str, tuple[str, ...]]
    narrow: dict[torch.dtype, frozenset[str]]

    def expected(self, dtype: torch.dtype, target: Target) -> set[str]:
        """The schedules that run on a target."""
        if dtype not in self.dtypes:
            return set()
        return {name for name in self.narrow.get(dtype, self.schedules) if all(target.has(one) for one in self.only.get(name, ()))}


def _case(run: Callable[[torch.dtype], Iterator[None]], schedules: str, dtypes: tuple[torch.dtype, ...] = (FLOAT, BFLOAT),
          only: dict[str, tuple[str, ...]] | None = None,
          narrow: dict[torch.dtype, str] | None = None) -> Case:
    return Case(run, frozenset(schedules.split()), dtypes, only or {},
                {dtype: frozenset(names.split()) for dtype, names in (narrow or {}).items()})


MASKS, TILES = ("avx512f",), ("amx-tile",)
CASES = {
    "layers": _case(_layers, "Rows Panel StripPanel Gemv SlicePanel Tiles", (FLOAT, BFLOAT, HALF),
                    only={"Gemv": MASKS, "SlicePanel": MASKS, "Tiles": TILES},
                    narrow={FLOAT: "Rows Panel StripPanel Gemv SlicePanel", HALF: "Rows Panel StripPanel Gemv SlicePanel"}),
    "dense": _case(_dense, "StreamRows"),
    "inputs": _case(_inputs, "GatherRows SelectRows SelectedPanels"),
    "neurons": _case(_neurons, "FfnRows FfnPanels SelectRows"),
    "inputs of ffns": _case(_inputs_ffn, "InputsFfnRows InputsFfnPanels GatherRows SelectRows"),
    "predicted": _case(_predicted, "PredictedFfnRows FfnPanels"),
    "experts": _case(_experts, "ExpertRows ExpertPanels"),
    "convolutions": _case(_convolutions, "Planes Depthwise Rows Panel StripPanel Gemv SlicePanel Tiles", (FLOAT, BFLOAT, HALF),
                          narrow={FLOAT: "Planes Depthwise", HALF: "Planes", BFLOAT: "Rows Panel StripPanel"}),
    "attention": _case(_attention, "AttendFew AttendPanel AttendTiles", (FLOAT, BFLOAT, HALF), only={"AttendTiles": TILES},
                       narrow={FLOAT: "AttendFew AttendPanel", HALF: "AttendFew AttendPanel"}),
    "pages": _case(_pages, "TopPages"),
    "training": _case(_training, "PackColumns PackedProduct SampledProduct", (FLOAT,)),
    "graphs": _case(_graphs, "DensePanel NormRows MeanRows SoftmaxRows PointwiseFlat AttendDense AttendStep ScoreBlocks CacheWrite TopRows",
                    narrow={BFLOAT: "DensePanel NormRows PointwiseFlat AttendStep CacheWrite"}),
}
