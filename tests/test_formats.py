"""Formats: lossless to and from (dense, mask), and no damaged tensor gets in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsify_compiler import catalog
from sparsify_compiler.errors import ArtefactError, StructureError
from sparsify_compiler.formats._base import Format
from sparsify_compiler.formats.bitmap import Bitmap
from sparsify_compiler.formats.bsr import Bsr
from sparsify_compiler.formats.condensed import Condensed
from sparsify_compiler.formats.csr import Csr
from sparsify_compiler.formats.nm import Nm

quick = settings(max_examples=40, derandomize=True, deadline=None)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def make_mask(name: str, rows: int, columns: int, density: float, seed: int, n: int = 1, m: int = 2, r: int = 3,
              c: int = 2) -> tuple[Tensor, dict[str, int]]:
    """A random mask that the format of that name can hold; `columns` is rounded up to what divides."""
    rand = torch.Generator().manual_seed(seed)
    if name in ("csr", "bitmap"):
        return torch.rand(rows, columns, generator=rand) < density, {}
    if name == "condensed":
        return torch.rand(rows, columns, generator=rand).argsort(1) < round(density * columns), {}
    if name == "nm":
        groups = -(-columns // m)
        return (torch.rand(rows, groups, m, generator=rand).argsort(-1) < n).view(rows, groups * m), {"n": n, "m": m}
    blocks = torch.rand(-(-rows // r), -(-columns // c), generator=rand) < density
    return blocks.repeat_interleave(r, 0).repeat_interleave(c, 1)[:rows], {"r": r, "c": c}


NAMES = st.sampled_from(["csr", "bitmap", "condensed", "nm", "bsr"])
MASKS = st.builds(make_mask, NAMES, st.integers(1, 9), st.integers(1, 12), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(0, 99),
                  n=st.integers(1, 2), m=st.integers(2, 5), r=st.integers(1, 4), c=st.integers(1, 3))


def kind_of(attributes: dict[str, int], mask: Tensor, any_mask: type[Format] = Csr) -> type[Format]:
    if "n" in attributes:
        return Nm
    if "r" in attributes:
        return Bsr
    return Condensed if len(set(mask.sum(1).tolist())) == 1 else any_mask


@quick
@given(MASKS, st.sampled_from(DTYPES), st.booleans())
def test_round_trip_is_exact(made: tuple[Tensor, dict[str, int]], dtype: torch.dtype, transposed: bool) -> None:
    mask, attributes = made
    weight = torch.randn(mask.shape[::-1]).T.to(dtype) if transposed else torch.randn(mask.shape).to(dtype)
    weight[torch.rand(mask.shape) < 0.2] = 0.0  # a kept place may hold a zero
    kind = kind_of(attributes, mask, Bitmap if transposed else Csr)
    form = kind.encode(weight, mask, **attributes)
    assert torch.equal(form.mask(), mask)
    assert torch.equal(form.decode(), weight.masked_fill(~mask, 0))
    assert form.decode().dtype == dtype
    again = kind.from_tensors(form.tensors(), form.attributes())
    assert torch.equal(again.decode(), form.decode())
    assert form.bytes() == sum(t.numel() * t.element_size() for t in form.tensors().values())
    assert torch.equal(form.gather(form.decode()), form.values)


@pytest.mark.parametrize("name", ["csr", "bitmap", "condensed", "nm", "bsr"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (7, 4), (1, 40000), (5, 40000)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_shapes_that_are_edges(name: str, rows: int, columns: int, density: float) -> None:
    mask, attributes = make_mask(name, rows, columns, density, 0, n=2, m=4)
    kind: type[Format] = catalog.get("format", name)
    weight = torch.randn(mask.shape)
    form = kind.encode(weight, mask, **attributes)
    assert torch.equal(form.mask(), mask)
    assert torch.equal(form.decode(), weight * mask)
    kind.from_tensors(form.tensors(), form.attributes())
    for tensor_name, tensor in form.tensors().items():
        assert tensor.is_contiguous()
        if tensor_name.endswith("columns"):
            assert tensor.dtype == (torch.int32 if mask.shape[1] > 32767 else torch.int16)


def test_values_that_are_not_finite_are_kept_and_others_dropped() -> None:
    weight = torch.tensor([[float("nan"), 1.0, float("inf"), -0.0]])
    mask = torch.tensor([[True, False, True, True]])
    decoded = Csr.encode(weight, mask).decode()
    assert decoded[0, 0].isnan()
    assert decoded[0, 2] == float("inf")
    assert torch.signbit(decoded[0, 3])
    hidden = Csr.encode(weight, ~mask).decode()
    assert torch.equal(hidden, torch.tensor([[0.0, 1.0, 0.0, 0.0]]))


def test_layout_is_as_documented() -> None:
    weight = torch.arange(1.0, 13.0).view(3, 4)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]]).bool()
    form = Bsr.encode(weight, mask, r=2, c=2)
    assert form.values.tolist() == [[[1.0, 5.0], [2.0, 6.0]], [[11.0, 0.0], [12.0, 0.0]]]
    assert form.block_columns.tolist() == [0, 1]
    assert form.block_row_pointers.tolist() == [0, 1, 2]
    packed = Nm.encode(weight, torch.tensor([[0, 1, 1, 0]]).bool().expand(3, 4), n=1, m=2)
    assert packed.offsets.tolist() == [[1, 0]] * 3
    assert packed.values.tolist() == [[2.0, 3.0], [6.0, 7.0], [10.0, 11.0]]
    bitmap = Bitmap.encode(torch.arange(9.0)[None], torch.tensor([[0, 1, 1, 0, 0, 0, 0, 1, 1]]).bool())
    assert bitmap.bits.tolist() == [[0b10000110, 1]]
    assert bitmap.values.tolist() == [1.0, 2.0, 7.0, 8.0]


@pytest.mark.parametrize(("kind", "attributes", "mask", "why"), [
    (Condensed, {}, [[1, 0], [1, 1]], "from 1 to 2"),
    (Nm, {"n": 1, "m": 2}, [[1, 1], [1, 0]], "exactly 1"),
    (Nm, {"n": 1, "m": 3}, [[1, 1], [1, 0]], "do not divide"),
    (Bsr, {"r": 2, "c": 1}, [[1, 1], [1, 0]], "in part"),
    (Bsr, {"r": 1, "c": 3}, [[1, 1], [1, 0]], "do not divide"),
])
def test_a_mask_that_does_not_fit_is_refused_with_the_reason(kind: type[Format], attributes: dict[str, int], mask: Any, why: str) -> None:
    weight, places = torch.randn(2, 2), torch.tensor(mask).bool()
    reason = kind.fits(weight, places, **attributes)
    assert reason is not None
    assert why in reason
    with pytest.raises(StructureError, match=why):
        kind.encode(weight, places, **attributes)


@pytest.mark.parametrize("bad", [
    lambda w, m: (w.long(), m), lambda w, m: (w, m.float()), lambda w, m: (w[0], m[0]), lambda w, m: (w, m[:1]),
])
def test_encode_refuses_what_is_no_weight_and_mask(bad: Any) -> None:
    with pytest.raises(StructureError):
        Csr.encode(*bad(torch.randn(2, 4), torch.ones(2, 4, dtype=torch.bool)))


@pytest.mark.parametrize("attributes", [{}, {"n": 0, "m": 4}, {"n": 5, "m": 4}, {"n": 2, "m": 300}])
def test_nm_needs_sensible_numbers(attributes: dict[str, int]) -> None:
    with pytest.raises(StructureError):
        Nm.encode(torch.randn(2, 4), torch.ones(2, 4, dtype=torch.bool), **attributes)


def _tamper() -> list[Any]:
    def change(name: str, index: Any, value: int) -> Any:
        def apply(tensors: dict[str, Tensor], attributes: dict[str, int]) -> None:
            tensors[name] = tensors[name].clone()
            tensors[name][index] = value
        return apply

    def replace(name: str, function: Any) -> Any:
        return lambda tensors, attributes: tensors.update({name: function(tensors[name])})

    def attribute(name: str, value: Any) -> Any:
        return lambda tensors, attributes: attributes.update({name: value})

    everywhere = [replace("values", lambda t: t[:-1]), replace("values", Tensor.int), attribute("out_features", 7), attribute("out_features", -1),
                  attribute("in_features", True), attribute("in_features", 2.0), attribute("more", 1),
                  lambda tensors, attributes: tensors.pop("values"), lambda tensors, attributes: attributes.pop("in_features")]
    return [(name, function) for name in ("csr", "bitmap", "condensed", "nm", "bsr") for function in everywhere] + [
        ("csr", change("columns", 0, 12)), ("csr", change("columns", 0, -1)), ("csr", change("columns", 0, 11)),
        ("csr", replace("columns", Tensor.long)), ("csr", change("row_pointers", 1, 60)), ("csr", change("row_pointers", 0, 1)),
        ("csr", change("row_pointers", -1, 1)), ("csr", replace("row_pointers", lambda t: t[:-1])),
        ("bitmap", replace("bits", lambda t: t[:, :1])), ("bitmap", replace("bits", Tensor.short)), ("bitmap", change("bits", (0, 1), 16)),
        ("bitmap", replace("bits", lambda t: t | 1)), ("bitmap", replace("values", lambda t: t[:, None])),
        ("condensed", change("columns", (0, 0), 99)), ("condensed", change("columns", (0, 0), 11)),
        ("condensed", replace("columns", lambda t: t[:, :1])),
        ("nm", change("offsets", (0, 0), 4)), ("nm", change("offsets", (0, 0), 3)), ("nm", attribute("n", 0)), ("nm", attribute("m", 5)),
        ("bsr", change("block_columns", 0, 6)), ("bsr", change("block_columns", 0, 5)), ("bsr", change("block_row_pointers", 1, -1)),
        ("bsr", attribute("r", 2)), ("bsr", attribute("c", 0)),
    ]


@pytest.mark.parametrize(("name", "tamper"), _tamper())
def test_damaged_tensors_are_refused(name: str, tamper: Any) -> None:
    mask, attributes = make_mask(name, 5, 12, 0.5, 1, n=2, m=4)
    kind: type[Format] = catalog.get("format", name)
    form = kind.encode(torch.randn(mask.shape), mask, **attributes)
    tensors, numbers = form.tensors(), form.attributes()
    kind.from_tensors(tensors, numbers)
    tamper(tensors, numbers)
    with pytest.raises(ArtefactError):
        kind.from_tensors(tensors, numbers)


@quick
@given(MASKS, st.floats(0, 0.5), st.integers(0, 99))
def test_a_widened_mask_is_the_least_that_fits_and_keeps_all_that_was_kept(made: tuple[Tensor, dict[str, int]], lost: float, seed: int) -> None:
    mask, attributes = made
    kind, weight = kind_of(attributes, mask), torch.empty(mask.shape)
    holed = mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) >= lost)
    wide = kind.widened(holed, mask.numel(), **attributes)
    if kind is Csr:
        assert wide is None
        return
    assert wide is not None
    assert kind.fits(weight, wide, **attributes) is None
    assert bool(wide[holed].all())
    assert int(wide.sum()) <= int(mask.sum())
    assert torch.equal(kind.widened(wide, int(wide.sum()), **attributes), wide)
    assert torch.equal(kind.widened(holed, int(wide.sum()), **attributes), wide)
    assert kind.widened(holed, int(wide.sum()) - 1, **attributes) is None


@pytest.mark.parametrize(("kind", "attributes", "mask"), [(Nm, {"n": 1, "m": 2}, [[True, True]]), (Nm, {"n": 1, "m": 2}, [[True, False, True]]),
                                                          (Bsr, {"r": 1, "c": 2}, [[True, False, True]])])
def test_what_no_more_weights_can_mend_is_not_widened(kind: type[Format], attributes: dict[str, int], mask: Any) -> None:
    assert kind.widened(torch.tensor(mask), 99, **attributes) is None
