"""Operators in libraries without torch, held against torch: those that an importer would take for something else, at the arguments where it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsify_compiler.capture import capture
from sparsify_compiler.codegen import cache
from sparsify_compiler.codegen.vectors import multiplies_pairs
from sparsify_compiler.codegen.whole_graph_import import GraphImporter
from sparsify_compiler.target import host
from sparsify_compiler.whole_call import build_call


class Results(nn.Module):
    """What functions make of one tensor and some parameters of 8 numbers."""

    def __init__(self, functions: list[Callable[..., Tensor]]) -> None:
        super().__init__()
        self.functions = functions
        self.first, self.second = nn.Parameter(torch.randn(8)), nn.Parameter(torch.rand(8) + 0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(x, self.first, self.second) for function in self.functions)


ROWS: dict[str, Callable[..., Tensor]] = {
    "add": lambda x, a, b: torch.add(x, b, alpha=3),
    "sub": lambda x, a, b: torch.sub(x, b, alpha=2),
    "rsub": lambda x, a, b: 3 - x,
    "celu": lambda x, a, b: functional.celu(x, 0.7),
    "celu of 1": lambda x, a, b: functional.celu(9 * x),
    "div": lambda x, a, b: (9 * x).long() / 4,
    "div of two": lambda x, a, b: (9 * x).long() / ((9 * x.abs()).int() + 2),
    "index below 0": lambda x, a, b: x[:, torch.tensor([-1, 0])],
    "two indices": lambda x, a, b: x[torch.tensor([0, -1]), torch.tensor([2, 3])],
    "indices apart": lambda x, a, b: x[torch.tensor([0, 1]), :, torch.tensor([2, -3])],
    "indices behind": lambda x, a, b: x[:, torch.tensor([[0, 1], [2, -3]]), torch.tensor([5])],
    "narrow": lambda x, a, b: x.narrow(1, 2, 3),
    "narrow at the end": lambda x, a, b: x.narrow(-1, 0, 5),
}
PICTURES: dict[str, Callable[..., Tensor]] = {
    "norm": lambda x, a, b: functional.batch_norm(x, a, b, b, a, eps=0.2),
    "norm without weights": lambda x, a, b: functional.batch_norm(x, a, b),
    "norm of the batch": lambda x, a, b: functional.batch_norm(x, None, None, b, a, training=True),
    "norm of lines": lambda x, a, b: functional.batch_norm(x.flatten(2), a, b, None, a),
    "norm of each picture": lambda x, a, b: functional.instance_norm(x, weight=a, bias=b, eps=0.1),
    "norm of each picture, fixed": lambda x, a, b: functional.instance_norm(x, a, b, b, a, use_input_stats=False),
    "nearest": lambda x, a, b: functional.interpolate(x, size=(5, 11)),
    "nearest, larger": lambda x, a, b: functional.interpolate(x, scale_factor=2),
    "nearest, by 1.5": lambda x, a, b: functional.interpolate(x, scale_factor=1.5),
    "nearest, smaller": lambda x, a, b: functional.interpolate(x, size=(3, 5)),
    "nearest of lines": lambda x, a, b: functional.interpolate(x.flatten(2), size=50),
    "bilinear": lambda x, a, b: functional.interpolate(x, scale_factor=1.7, mode="bilinear"),
    "bilinear, smaller": lambda x, a, b: functional.interpolate(x, scale_factor=(0.7, 1.0), mode="bilinear"),
    "bicubic": lambda x, a, b: functional.interpolate(x, scale_factor=1.7, mode="bicubic"),
    "pool": lambda x, a, b: functional.avg_pool2d(x, 2, divisor_override=3),
    "pool with a border": lambda x, a, b: functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False, divisor_override=2),
    "shuffle": lambda x, a, b: functional.pixel_shuffle(x, 2),
}


def library_of(model: nn.Module, x: Tensor) -> Any:
    library, _ = build_call(capture(model.eval(), (x,)), host(), {})
    return library.run


@pytest.mark.parametrize(("functions", "shape"), [(ROWS, (4, 6, 8)), (PICTURES, (2, 8, 8, 8))], ids=["rows", "pictures"])
def test_a_library_says_what_torch_says(functions: dict[str, Callable[..., Tensor]], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = Results(list(functions.values())), torch.randn(shape)
    with torch.no_grad():
        for name, found, expected in zip(functions, library_of(model, x)(x.clone()), model(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_bfloat16_norms_are_computed_in_float32() -> None:
    torch.manual_seed(0)
    norms = [PICTURES[name] for name in ("norm", "norm of the batch", "norm of each picture")]
    model, x = Results(norms).bfloat16(), torch.randn(2, 8, 8, 8).bfloat16()
    with torch.no_grad():
        for found, expected in zip(library_of(model, x)(x.clone()), model(x), strict=True):
            assert found.dtype is torch.bfloat16
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("width", "pairs"), [(64, True), (20, False)])
def test_bfloat16_attention(width: int, pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiplied in pairs where heads are whole vectors of them and the machine can, else in float32; a mask and causality beside."""
    torch.manual_seed(0)
    q, x = torch.randn(2, 3, 37, width).bfloat16(), torch.randn(2, 3, 37, width).bfloat16()
    mask = torch.rand(2, 1, 1, 37) > 0.3
    attend = functional.scaled_dot_product_attention
    model = Results([lambda x, a, b: attend(q, x, x), lambda x, a, b: attend(x, q, x, is_causal=True), lambda x, a, b: attend(q, x, x, mask)])
    built: list[str] = []
    original = GraphImporter.one_kernel
    monkeypatch.setattr(GraphImporter, "one_kernel", lambda self, schedule, *rest: (built.append(schedule.dtype), original(self, schedule, *rest))[1])
    monkeypatch.setattr(cache, "read_or_build", lambda key, build: build())
    library = library_of(model, x)
    assert built == ["bfloat16" if pairs and multiplies_pairs(host()) else "float32"] * 3
    with torch.no_grad():
        for found, expected in zip(library(x.clone()), model(x), strict=True):
            assert found.dtype is torch.bfloat16
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
