"""Layers that choose what they read, as parts of a library: by the kernels of the PyTorch runtime, or as formulas, which the manifest names."""

from __future__ import annotations

import math
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from whole_graph_help import runner

from sparsify_compiler.capture import capture
from sparsify_compiler.codegen import build
from sparsify_compiler.codegen.kernels.top_rows import TopRows
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.export_library_limits import limits_of
from sparsify_compiler.export_library_products import Products
from sparsify_compiler.export_library_selections import FORMULAS, every_expert, spell
from sparsify_compiler.ops import experts_ffn
from sparsify_compiler.target import host, resolve

OPS = torch.ops.sparsify
KINDS = {"inputs": "select_linear", "largest": "select_linear", "neurons": "select_ffn", "every_input": "select_inputs_ffn",
         "predicted": "predicted_ffn", "experts": "experts_ffn"}


class Choosing(nn.Module):
    """Inputs by a stored limit with scale and centre, and by one for each row; neurons by the gate, and by scores; experts."""

    def __init__(self, size: int, hidden: int, kinds: tuple[str, ...]) -> None:
        super().__init__()
        self.kinds = kinds
        sizes = {"wide": (size, size), "across": (size, hidden), "gate": (hidden, size), "up": (hidden, size), "down": (hidden, size),
                 "router": (4, size),
                 "experts_gate": (4, hidden, size), "experts_up": (4, hidden, size), "experts_down": (4, size, hidden), "scale": (size,)}
        for name, shape in sizes.items():
            self.register_buffer(name, torch.randn(shape, dtype=torch.float32) / size**0.5)
        self.register_buffer("limit", torch.tensor(0.3, dtype=torch.float32))
        self.register_buffer("bias", torch.randn(size, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        for kind in self.kinds:
            x = F.normalize(x + getattr(self, kind)(x), dim=-1) * 4
        return x

    def inputs(self, x: Tensor) -> Tensor:
        return OPS.select_linear(x, self.limit, self.wide, self.scale, self.scale, self.bias)

    def scaled(self, x: Tensor) -> Tensor:
        """By what no kernel is given."""
        return OPS.select_linear(x, self.limit, self.wide, self.scale.abs())

    def largest(self, x: Tensor) -> Tensor:
        return OPS.select_linear(x, x.abs().topk(8, -1).values[..., -1:], self.wide)

    def neurons(self, x: Tensor) -> Tensor:
        return OPS.select_ffn(x, self.limit, self.gate, self.up, self.down, activation="silu")

    def every_input(self, x: Tensor) -> Tensor:
        return OPS.select_inputs_ffn(x, self.across, self.limit, self.down, self.limit, activation="relu")

    def predicted(self, x: Tensor) -> Tensor:
        return OPS.predicted_ffn(x, F.linear(x, self.up), self.limit, self.gate, self.down, self.up, bias=self.bias, activation="gelu")

    def experts(self, x: Tensor) -> Tensor:
        weights, chosen = F.linear(x, self.router).softmax(-1).topk(2, -1)
        return OPS.experts_ffn(x, chosen, weights, self.experts_gate, self.experts_up, self.experts_down, activation="silu")


def exported(model: nn.Module, x: Tensor, folder: Path) -> tuple[CompiledModel, object]:
    compiled = CompiledModel(capture(model.eval(), {"x": x}, {"x": {0: "batch", 1: "tokens"}}))
    compiled.export(folder)
    return compiled, runner(folder).Model(folder)


@pytest.mark.parametrize(("size", "hidden", "kinds"), [
    (32, 48, ("inputs",)), (20, 24, ("neurons", "scaled")), pytest.param(20, 24, ("experts",), marks=pytest.mark.slow),
    *(pytest.param(32, 48, (kind,), marks=pytest.mark.slow) for kind in list(KINDS)[1:])])
def test_what_it_computes(tmp_path: Path, size: int, hidden: int, kinds: tuple[str, ...]) -> None:
    """One row, the few that kernels read the union of, and many; of sizes that are no whole vectors by formulas."""
    torch.manual_seed(0)
    compiled, model = exported(Choosing(size, hidden, kinds), torch.randn(2, 3, size, dtype=torch.float32), tmp_path / "out")
    without = {KINDS.get(kind, "select_linear") for kind in kinds if size % 16}
    assert set(model.manifest["reference"]) & set(KINDS.values()) == without  # type: ignore[attr-defined]
    for shape in ((1, 1), (1, 3), (3, 25)):
        x = torch.randn(*shape, size, dtype=torch.float32)
        with torch.no_grad():
            expected = compiled(x)
        found = torch.from_numpy(numpy.array(model.run(x=x.numpy())["output"]))  # type: ignore[attr-defined]
        assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("target", ["cortex-a76", "x86-avx2"])
def test_kernels_of_other_machines(target: str) -> None:
    """They are laid out for any of them; what is computed there `make test-arm` holds."""
    region = capture(Choosing(32, 48, tuple(KINDS)).eval(), {"x": torch.randn(2, 3, 32, dtype=torch.float32)}).regions[""]
    spell(region)
    products = Products(region, resolve(target))
    assert not products.reference
    assert sum(node.target in FORMULAS for node in products.found) == len(KINDS)


def test_what_kernels_hold_is_counted_too() -> None:
    """Of each row the neurons of the two experts that it chose are more than any tensor of the graph."""
    program = capture(Choosing(32, 80, ("experts",)).eval(), {"x": torch.randn(2, 3, 32, dtype=torch.float32)}, {"x": {0: "batch", 1: "tokens"}})
    assert limits_of(program.regions[""]) == [{"symbols": ["batch", "tokens"], "product": (2**31 - 1) // 160}]


@pytest.mark.parametrize("weighted", [True, False])
def test_kernels_get_choices_in_the_dtypes_that_they_take(weighted: bool) -> None:
    class Half(Choosing):
        def experts(self, x: Tensor) -> Tensor:
            weights, chosen = F.linear(x, self.router).softmax(-1).topk(2, -1)
            given = weights.half() if weighted else None
            return OPS.experts_ffn(x, chosen, given, self.experts_gate, self.experts_up, self.experts_down, activation="silu")

    region = capture(Half(32, 48, ("experts",)).eval(), {"x": torch.randn(2, 3, 32, dtype=torch.float32)}).regions[""]
    spell(region)
    (op,) = [node for node in region.graph.nodes if node.target is experts_ffn.op]
    assert op.kwargs["chosen"].meta["val"].dtype is torch.int32
    assert op.kwargs["weights"].meta["val"].dtype is torch.float32


def test_every_expert_is_what_the_chosen_ones_are() -> None:
    gate, down = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 6, 5, dtype=torch.float64)
    x, chosen, weights = torch.randn(7, 4, dtype=torch.float64), torch.randint(-1, 3, (7, 2)), torch.rand(7, 2, dtype=torch.float64)
    given = {"gate": gate, "down": down, "bias": torch.randn(3, 6, dtype=torch.float64), "activation": "silu"}
    torch.testing.assert_close(every_expert(x, chosen, weights, **given), experts_ffn.reference(x, chosen, weights, up=None, **given))
    gate[2] = math.nan
    assert not every_expert(x, chosen.clamp(max=1), weights, **given).isnan().any()


@pytest.mark.parametrize("largest", [True, False])
def test_the_largest_of_a_row(largest: bool) -> None:
    run = build.load(TopRows(largest, 2), host()).function
    for rows, size, count in ((1, 1, 1), (5, 17, 17), (3, 40, 7)):
        x = torch.randint(-4, 4, (rows, size)).float()
        x[0, 0] = math.nan
        values, places = torch.empty(rows, count, dtype=torch.float32), torch.empty(rows, count, dtype=torch.int64)
        run(x, values, places)
        expected = x.sort(dim=-1, descending=largest, stable=True)
        torch.testing.assert_close(values, expected.values[:, :count], equal_nan=True)
        assert torch.equal(places, expected.indices[:, :count])


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return OPS.held_ffn(x, self.up.weight, self.down.weight, activation="relu", density=0.5, share=0.1, prompt=4, key="a")


class Sorted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sort(0).values


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.zeta(x, x)


class Blocks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None]
        return OPS.attend(x, x, x, indexer="Indexer(scorer='pooled', selector='top_p(mass=0.5)')")


@pytest.mark.parametrize(("model", "told", "advice"), [
    (Blocks(), "this attention chooses the blocks that it reads by scores, in a way that whole graphs do not", "top_k"),
    (Held(), "held_ffn reads what a text's prompt used, which whole graphs do not remember", "compile without the pass"),
    (Sorted(), "sort numbers of float32, along the last dimension", "save() keeps the model"),
    (Odd(), "no whole graph has the operator aten.special_zeta", "save() keeps the model")])
def test_what_is_refused(model: nn.Module, told: str, advice: str, tmp_path: Path) -> None:
    """What, where, and what next; nothing is written."""
    with pytest.raises(SparsifyError) as refused:
        exported(model, torch.randn(2, 3, 8, dtype=torch.float32), tmp_path / "out")
    assert told in str(refused.value)
    assert advice in str(refused.value)
    assert refused.value.where
    assert not (tmp_path / "out").exists()


class Dtypes(nn.Module):
    """Operators of which TVM's importer leaves out the dtype, and sums of truths."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        mask = x.new_ones((), dtype=torch.bool) & (x[:, None, :, 0] <= x[:, :, None, 0])
        attended = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=mask[:, None])
        return attended, mask, (x > 0).cumsum(-1), torch.diff(x, prepend=x[..., :1]), x.amax(-1)


def test_dtypes_are_those_of_the_graph(tmp_path: Path) -> None:
    x = torch.randn(2, 4, 8, dtype=torch.float32)
    compiled, model = exported(Dtypes(), x, tmp_path / "out")
    for found, expected in zip(model.run(x=x.numpy()).values(), compiled(x), strict=True):  # type: ignore[attr-defined]
        torch.testing.assert_close(torch.from_numpy(numpy.array(found)), expected)


class Orders(nn.Module):
    """Every way of asking for the first of an order, arguments given and left out."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (*x.topk(3), *x.topk(3, largest=False), *x.sort(), *x.sort(descending=True), x.amin(-1), x.amax(2, keepdim=True), x.amin((1, 2)))


def test_orders_are_those_of_the_graph(tmp_path: Path) -> None:
    x = torch.randn(2, 4, 8, dtype=torch.float32)
    compiled, model = exported(Orders(), x, tmp_path / "out")
    for found, expected in zip(model.run(x=x.numpy()).values(), compiled(x), strict=True):  # type: ignore[attr-defined]
        torch.testing.assert_close(torch.from_numpy(numpy.array(found)), expected, rtol=0, atol=0)
