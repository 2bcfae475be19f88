"""Packed weights from compile() to the disk and back: lossless in every format and dtype, counted as they are, and in memory once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import fx, nn

import sparsify_compiler as sc
from sparsify_compiler import catalog
from sparsify_compiler.artefact import GRAPH, KERNELS, WEIGHTS, export_dense
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.operands import operands
from sparsify_compiler.packed_storage import leave_in_temporary_file
from sparsify_compiler.program import Region, get_tensor, set_tensor
from sparsify_compiler.storage import map_safetensors, read_safetensors, write_safetensors

# structure, density -> the format that Pack takes
CASES = {("unstructured", 0.5): "bitmap", ("unstructured", 0.02): "csr", ("fan_in", 0.02): "condensed", ("2:4", 0.5): "nm", ("16x1", 0.2): "bsr",
         ("VNM(v=16, n=2, m=8)", 0.25): "nm", ("GroupedNM(n=1, m=4)", 0.25): "nm"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def packed(structure: str, density: float, dtype: torch.dtype = torch.float32) -> tuple[CompiledModel, torch.Tensor]:
    """One wide layer that stays packed, and one that stays dense, compiled; and an input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1000, 48), nn.ReLU(), nn.Linear(48, 3)).eval().to(dtype)
    x = torch.randn(4, 1000).to(dtype)
    recipe = sc.Pipeline.parse(f"mask_weights(score='magnitude', structure={structure!r}, targets=('0',)) | pack() | lower(prefer='bytes')")
    return sc.compile(model, (x,), recipe=recipe, budget=sc.Budget(density=density)), x


def packed_node(compiled: CompiledModel) -> tuple[Region, fx.Node]:
    """The one packed node."""
    return next((region, node) for region, node in compiled.program.nodes() if getattr(node.target, "namespace", "") == "sparsify")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("structure", "density"), CASES)
def test_every_format_comes_back_from_disk_as_it_was(structure: str, density: float, dtype: torch.dtype, tmp_path: Path) -> None:
    compiled, x = packed(structure, density, dtype)
    site = next(site for site in compiled.report().sites if site.site == "0")
    assert site.format == CASES[structure, density]
    compiled.save(tmp_path / "out")
    again = sc.load(tmp_path / "out")
    assert torch.equal(again(x), compiled(x))
    one, two = compiled.state_dict(), again.state_dict()
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in one)
    region, node = packed_node(compiled)
    tensors, attributes, _ = operands(region, node)
    kind = catalog.get("format", site.format)
    form = kind.from_tensors(tensors, {name: attributes[name] for name in kind.ATTRIBUTES})  # beside those of what the kernel computes behind it
    assert form.values.dtype == dtype
    stored = load_file(tmp_path / "out" / WEIGHTS)
    assert form.bytes() == sum(t.numel() * t.element_size() for name, t in stored.items() if "_packed." in name)
    assert form.bytes() < site.dense_bytes  # type: ignore[operator]
    assert site.bytes == node.meta["kernel"].resident_bytes
    export_dense(again, tmp_path / "dense.safetensors")
    dense = load_file(tmp_path / "dense.safetensors")
    plain = nn.Sequential(nn.Linear(1000, 48), nn.ReLU(), nn.Linear(48, 3)).to(dtype)
    plain.load_state_dict(dense)
    assert float((dense["0.weight"] != 0).float().mean()) == pytest.approx(density, abs=0.005)
    torch.testing.assert_close(plain(x), compiled(x))


def test_bytes_on_disk_are_those_of_the_files(tmp_path: Path) -> None:
    compiled, _ = packed("16x1", 0.2)
    compiled.save(tmp_path / "out")
    files = [tmp_path / "out" / WEIGHTS, tmp_path / "out" / GRAPH, *(tmp_path / "out" / KERNELS).iterdir()]
    assert sc.load(tmp_path / "out").report().compiled_disk_bytes == sum(file.stat().st_size for file in files)
    assert len(files) > 2


@pytest.mark.parametrize("structure", ["unstructured", "16x1"])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_packed_weight_is_in_memory_once(structure: str, loaded: bool, tmp_path: Path) -> None:
    compiled, x = packed(structure, 0.2)
    compiled.save(tmp_path / "out")
    model = sc.load(tmp_path / "out") if loaded else compiled
    region, node = packed_node(model)
    kernel, stored = node.meta["kernel"].state().values(), operands(region, node)[0].values()
    others = [get_tensor(region.module, str(n.target)) for n in region.graph.nodes if n.op == "get_attr" and "packed" not in str(n.target)]
    dense = [n.meta["kernel"].resident_bytes for n in region.graph.nodes if n is not node and n.meta.get("kernel") is not None]
    counted = sum(t.untyped_storage().nbytes() for t in (*kernel, *others)) + sum(dense)
    assert model.resident_bytes() == compiled.resident_bytes() == counted
    held = {t.untyped_storage().data_ptr() for t in stored}
    assert len(held) == 1, "each of them lies in the one mapped file"
    assert held.isdisjoint(t.untyped_storage().data_ptr() for t in (*kernel, *others))
    before = {name: tensor.clone() for name, tensor in compiled.state_dict().items()}
    model.save(tmp_path / "out")  # over the very file that is mapped
    again = sc.load(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    for each in (model, again):
        assert torch.equal(each(x), compiled(x))
        assert all(torch.equal(before[name], tensor) for name, tensor in each.state_dict().items())


def test_without_room_for_a_file_it_stays_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    compiled, x = packed("16x1", 0.2)
    expected, once = compiled(x), compiled.resident_bytes()
    stored = operands(*packed_node(compiled))[0]
    for name, tensor in stored.items():
        set_tensor(compiled.program.regions[""].module, f"0.weight_packed.{name}", tensor.clone())
    monkeypatch.setattr("sparsify_compiler.storage.write_safetensors", full)
    twice = CompiledModel(compiled.program, compiled.target, mapped=leave_in_temporary_file(compiled.program))
    assert twice.resident_bytes() - once == sum(t.numel() * t.element_size() for t in stored.values())
    assert torch.equal(twice(x), expected)


def test_where_there_is_no_kernel_the_reference_keeps_the_bytes() -> None:
    compiled, x = packed("16x1", 0.2, dtype := torch.float64)
    site = next(site for site in compiled.report().sites if site.site == "0")
    assert (site.format, site.kernel) == ("bsr", "reference")
    assert site.compiled_ms == site.sparse_ms is not None
    assert compiled.resident_bytes() < site.dense_bytes  # type: ignore[operator]
    assert compiled(x).dtype == dtype


def test_mapped_tensors_are_the_files(tmp_path: Path) -> None:
    given = {"a": torch.arange(5, dtype=torch.uint8), "b": torch.randn(3, 4), "c": torch.randn(3).bfloat16(), "empty": torch.empty(0, 3),
             "scalar": torch.tensor(2.0, dtype=torch.float64)}
    write_safetensors(tmp_path / "w.safetensors", given)
    whole, mapped = read_safetensors(tmp_path / "w.safetensors"), map_safetensors(tmp_path / "w.safetensors")
    assert set(whole) == set(given)
    assert set(mapped) == set(given) - {"empty"}
    for name, tensor in mapped.items():
        assert torch.equal(tensor, given[name])
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % tensor.element_size() == 0
    mapped["b"].zero_()  # a private copy of the page
    assert torch.equal(read_safetensors(tmp_path / "w.safetensors")["b"], given["b"])
