"""float16: weights are stored as they are, and computed in float32 by the kernels of float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import sparsify_compiler as sc
from sparsify_compiler import catalog
from sparsify_compiler.codegen import runtime
from sparsify_compiler.errors import InputError
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.target import host

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("structure", ["unstructured", "16x1", "2:4"])
def test_numbers_of_every_kernel(structure: str, x_dtype: torch.dtype) -> None:
    weight, bias = torch.randn(48, 64).half(), torch.randn(48).half()
    mask = Structure.parse(structure).mask(torch.rand(48, 64), 0.5)
    exact, count = weight.double() * mask, 0
    for name, sizes in Structure.parse(structure).formats():
        stored = catalog.get("format", name).encode(weight, mask, **sizes)
        assert stored.values.dtype is torch.float16
        assert torch.equal(stored.decode(), weight * mask)
        for rows in (1, 20):
            x = torch.randn(rows, 64).to(x_dtype)
            want = x.double() @ exact.T + bias.double()
            bound = 2e-6 * (x.double().abs() @ exact.abs().T + 1) + (5e-4 * want.abs() if x_dtype is torch.float16 else 0)  # one rounding
            for candidate in runtime.candidates(f"linear_{name}", stored.tensors(), stored.attributes(), x_dtype, (rows,), host()):
                kernel = candidate.bind(bias)
                y = kernel(x)
                assert y.dtype is x_dtype
                assert ((y.double() - want).abs() <= bound).all(), kernel.name
                with pytest.raises(InputError):
                    kernel(x.double())
                count += 1
    assert count


def test_bfloat16_is_not_computed_from_float16() -> None:
    stored = catalog.get("format", "csr").encode(torch.randn(16, 16).half(), torch.rand(16, 16) < 0.5)
    assert runtime.candidates("linear_csr", stored.tensors(), stored.attributes(), torch.bfloat16, (1,), host()) == []  # it would round the weight


class Net(nn.Module):
    """A sparse pointwise convolution and a sparse linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(32, 64, 1), nn.Linear(64, 96)
        for layer, structure in ((self.conv, "unstructured"), (self.linear, "16x1")):
            mask = Structure.parse(structure).mask(torch.rand_like(layer.weight).flatten(1), 0.2)
            prune.custom_from_mask(layer, "weight", mask.view_as(layer.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(torch.relu(self.conv(x)).flatten(2).transpose(1, 2)))


def test_compiles_saves_and_loads(tmp_path: Path) -> None:
    model, x = Net().eval().half(), torch.randn(1, 32, 8, 8).half()
    compiled = sc.compile(model, (x,), recipe=sc.Pipeline.parse("pack() | lower(rounds=2, prefer='bytes')"))
    got = compiled(x)
    assert got.dtype is torch.float16
    torch.testing.assert_close(got, model(x), rtol=1e-2, atol=1e-2)
    assert {row.format for row in compiled.report().sites} == {"bitmap", "bsr"}
    compiled.save(tmp_path / "net")
    assert torch.equal(sc.load(tmp_path / "net")(x), got)
    values = [tensor for name, tensor in compiled.program.regions[""].module.state_dict().items() if name.endswith("_packed.values")]
    assert [tensor.dtype for tensor in values] == [torch.float16] * 2
