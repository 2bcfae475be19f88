"""Sparse 1×1 convolutions in bfloat16 are linear layers over pixels, channels last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_help import longest_first
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.nn.utils import prune

import sparsify_compiler as sc
from sparsify_compiler import catalog
from sparsify_compiler.codegen import pixels, runtime
from sparsify_compiler.errors import InputError, KernelError
from sparsify_compiler.passes.lower import lower
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.target import host

pytestmark = pytest.mark.usefixtures("seeded")
POINTWISE: dict[str, Any] = {"kernel_size": [1, 1], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}


def stored(structure: str, outputs: int = 48, inputs: int = 33) -> tuple[Any, Tensor]:
    """A packed weight, and the same dense."""
    weight = torch.randn(outputs, inputs).bfloat16()
    mask = Structure.parse(structure).mask(torch.rand(outputs, inputs), 0.3)
    name, sizes = Structure.parse(structure).formats()[0]
    return catalog.get("format", name).encode(weight, mask, **sizes), weight * mask


@pytest.mark.parametrize("structure", ["unstructured", "4x1", "16x1"])
def test_numbers_of_every_kernel(structure: str) -> None:
    packed, weight = stored(structure)
    bias = torch.randn(48).bfloat16()
    for shape in ((1, 33, 1, 1), (2, 33, 5, 7), (1, 33, 20, 20)):
        offered = runtime.candidates(f"conv2d_{packed.name()}", packed.tensors(), packed.attributes() | POINTWISE, torch.bfloat16, shape, host())
        found = [candidate for candidate in offered if candidate.options["family"] == pixels.NAME]
        assert found
        for candidate in found:
            kernel = candidate.bind(bias)
            x = torch.randn(shape).bfloat16()
            want = conv2d(x.double(), weight.double()[..., None, None], bias.double())
            scale = conv2d(x.double().abs(), weight.double().abs()[..., None, None]) + 1
            last, turned = x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)
            for given in (x, last, turned, x.clone().requires_grad_()):
                y = kernel(given)
                assert y.dtype is torch.bfloat16
                assert y.shape == want.shape
                assert ((y.double() - want).abs() <= 8e-3 * scale).all(), kernel.name
            assert kernel(x[:0]).shape == (0, *want.shape[1:])
            for bad in (x[0], x[:, :5], x.float()):
                with pytest.raises(InputError):
                    kernel(bad)


@pytest.mark.parametrize("change", [{"stride": [2, 2]}, {"padding": [1, 1]}, {"groups": 3}, {"kernel_size": [3, 1]}])
def test_any_other_convolution_is_refused(change: dict[str, Any]) -> None:
    packed, _ = stored("unstructured")
    arguments = packed.tensors(), packed.attributes() | POINTWISE | change
    assert pixels.offer("conv2d_bitmap", *arguments, torch.bfloat16, (1, 33, 4, 4), host()) == []
    with pytest.raises(KernelError, match="does not fit"):
        runtime.rebind("conv2d_bitmap", {"family": pixels.NAME, "kind": "lanes"}, *arguments, None, {}, host())


class Block(nn.Module):
    """Two pointwise convolutions, the second with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(64, 128, 1), nn.Conv2d(128, 64, 1)
        for layer in (self.up, self.down):
            mask = Structure.parse("16x1").mask(torch.rand_like(layer.weight).flatten(1), 0.1)
            prune.custom_from_mask(layer, "weight", mask.view_as(layer.weight))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.down(torch.relu(self.up(x))))


def test_compiles_saves_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower, "round_robin", longest_first)
    model, x = Block().eval().bfloat16(), torch.randn(2, 64, 9, 11).bfloat16()
    compiled = sc.compile(model, (x,), recipe=sc.Pipeline.parse("pack() | lower(prefer='bytes')"))
    assert all(str(row.kernel).startswith("pixels ") for row in compiled.report().sites)
    got, want = compiled(x), model(x)
    assert got.is_contiguous()
    torch.testing.assert_close(got, want, rtol=3e-2, atol=5e-2)
    compiled.save(tmp_path / "block")
    assert torch.equal(sc.load(tmp_path / "block")(x), got)
