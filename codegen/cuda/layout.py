"""Sparse weights as the kernels for GPUs read them: strips of block rows, lists of eights, places of two bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify_compiler.errors import KernelError
from sparsify_compiler.formats._base import Format
from sparsify_compiler.formats.bitmap import Bitmap
from sparsify_compiler.formats.bsr import Bsr
from sparsify_compiler.formats.condensed import Condensed
from sparsify_compiler.formats.csr import Csr
from sparsify_compiler.formats.nm import Nm

FORMATS: Mapping[str, type[Format]] = {"linear_bsr": Bsr, "linear_csr": Csr, "linear_condensed": Condensed, "linear_nm": Nm, "linear_bitmap": Bitmap}
STEP, EIGHT = 32, 8     # listed inputs of a step of strips.py; kept values that a lane reads at once
LARGEST = 1 << 15       # columns that 16 bits hold


def stored(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> Format:
    """The weight in its format. Raises KernelError."""
    if op not in FORMATS:
        raise KernelError(f"no sparse format belongs to {op}", where=op, hint=f"known: {', '.join(FORMATS)}")
    kind = FORMATS[op]
    given: dict[str, Any] = {name: tensors[name].detach() for name in kind.TENSORS} | {name: attributes[name] for name in kind.ATTRIBUTES}
    return kind(**given)


def strips(weight: Bsr) -> dict[str, Tensor]:
    """values [L, r], inputs [L] (-1 where a list is filled up) and pointers [R + 1], in steps, as strips.py reads them."""
    device, r = weight.values.device, weight.r
    counts = weight.block_row_pointers.long().diff() * weight.c
    pointers = pad((counts + (STEP - 1)).div(STEP, rounding_mode="floor").cumsum(0), (1, 0))
    listed = (weight.block_columns.long()[:, None] * weight.c + torch.arange(weight.c, device=device)).reshape(-1)
    at = _spread(counts, pointers[:-1] * STEP)
    total = int(pointers[-1]) * STEP
    values = torch.zeros((total, r), dtype=weight.values.dtype, device=device)
    values[at] = weight.values.reshape(-1, r)
    inputs = torch.full((total,), -1, dtype=torch.int32, device=device)
    inputs[at] = listed.int()
    return {"values": values, "inputs": inputs, "pointers": pointers.int()}


def eights(weight: Format) -> dict[str, Tensor]:
    """values [L], columns [L], pointers [N + 1], in eights, and counts [N], as sparse_rows.py reads them."""
    places, device = weight.places().reshape(-1), weight.values.device
    order = places.argsort(stable=True)
    places, kept = places[order], weight.values.reshape(-1)[order]
    rows = places.div(weight.in_features, rounding_mode="floor")
    counts = torch.bincount(rows, minlength=weight.out_features)
    pointers = pad((counts + (EIGHT - 1)).div(EIGHT, rounding_mode="floor").cumsum(0), (1, 0))
    at, total = _spread(counts, pointers[:-1] * EIGHT), max(int(pointers[-1]), 1) * EIGHT
    values = torch.zeros(total, dtype=kept.dtype, device=device)
    columns = torch.zeros(total, dtype=torch.int16 if weight.in_features <= LARGEST else torch.int32, device=device)
    values[at], columns[at] = kept, (places % weight.in_features).to(columns.dtype)
    return {"values": values, "columns": columns, "pointers": pointers.int(), "counts": counts.int()}


def halves(weight: Nm) -> dict[str, Tensor]:
    """values [Np, K / 2] and places [Np / 16, K / 32, 16] of a 2:4 weight, as sparse24.py reads them."""
    missing = -weight.out_features % 16
    values, offsets = pad(weight.values, (0, 0, 0, missing)), weight.offsets
    if missing:
        filled = torch.tensor([0, 1], dtype=torch.uint8, device=offsets.device).repeat(missing, offsets.shape[1] // 2)
        offsets = torch.cat((offsets, filled))
    return {"values": values.contiguous(), "places": places_of(offsets)}


def places_of(offsets: Tensor) -> Tensor:
    """Of the kept values [N, K / 2] (uint8, 0 to 3): int32 [N / 16, K / 32, 16] as mma.sp wants them, N and K multiples of 16 and 32.

    Word 2 g + p of a 16 x 32 tile: rows g (low half) and g + 8 (high half), inputs 16 p to 16 p + 15; PTX ISA, "Matrix Fragments for sparse
    mma.m16n8k32", selector 0: lanes 4 g and 4 g + 1 tell for their four.
    """
    outputs, kept = offsets.shape
    tiles = offsets.view(outputs // 16, 2, 8, kept // 16, 2, 8).permute(0, 3, 2, 4, 1, 5).to(torch.int64)   # tile, step, g, p, half, place
    shifts = torch.arange(16, device=offsets.device).view(2, 8) * 2
    words = (tiles << shifts).sum((-2, -1))
    return (words - ((words >> 31) << 32)).to(torch.int32).reshape(outputs // 16, kept // 16, 16)


def _spread(counts: Tensor, starts: Tensor) -> Tensor:
    """Where each entry of lists of these lengths goes that begin at these places."""
    owner = torch.repeat_interleave(torch.arange(counts.shape[0], device=counts.device), counts)
    before = pad(counts.cumsum(0), (1, 0))[:-1]
    return torch.arange(owner.shape[0], device=counts.device) - before[owner] + starts[owner]
