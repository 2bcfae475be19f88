"""N:M: n weights kept in every m consecutive inputs of a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor
from torch.nn.functional import pad

from sparsify_compiler.errors import StructureError
from sparsify_compiler.passes.prune.structures._base import ANY_MASK, Structure, keep_top, kept
from sparsify_compiler.passes.prune.structures.unstructured import Unstructured


@dataclass(frozen=True)
class NM(Structure):
    """n of every m consecutive inputs are kept, in every output row ("2:4": arXiv:2104.08378).

    along    "inputs", or "outputs": n of every m consecutive outputs of each input (DaSS, arXiv:2405.01943, for up and gate projections)
    padded   what does not divide is cut as if it went on with zeros: the last group, of r weights, keeps min(n, r)
    """

    n: int
    m: int
    along: Literal["inputs", "outputs"] = "inputs"
    padded: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m <= 256:
            raise StructureError(f"N:M needs 1 <= n < m <= 256, got {self.n}:{self.m}", where="NM")
        if self.along not in ("inputs", "outputs"):
            raise StructureError(f"along is 'inputs' or 'outputs', not {self.along!r}", where="NM")

    def __str__(self) -> str:
        options = [f"along={self.along}"] * (self.along != "inputs") + ["padded=True"] * self.padded
        return f"NM({', '.join([f'n={self.n}', f'm={self.m}', *options])})" if options else f"{self.n}:{self.m}"

    @property
    def density(self) -> float | None:
        return self.n / self.m

    @property
    def loose(self) -> Structure:
        return Unstructured()

    def at(self, density: float) -> Structure | None:
        n = max(self.n, kept(self.m, density))
        return replace(self, n=n) if n < self.m else None

    @property
    def hint(self) -> str:  # type: ignore[override]
        return f"NM(n={self.n}, m={self.m}, padded=True) makes the last group shorter; mask_weights(on_misfit='skip') leaves such layers dense"

    def formats(self) -> tuple[tuple[str, Mapping[str, int]], ...]:
        if self.along == "outputs":
            return ANY_MASK
        same: tuple[tuple[str, Mapping[str, int]], ...] = (("nm", {"n": self.n, "m": self.m}),)
        return (*same, ("condensed", {})) if self.padded else same  # every row keeps the same number, whatever the last group's

    def misfit(self, rows: int, columns: int) -> str | None:
        size = columns if self.along == "inputs" else rows
        return f"{size} {self.along} do not divide into groups of {self.m}" if size % self.m and not self.padded else None

    def _keep(self, score: Tensor, density: float) -> Tensor:
        turned = score if self.along == "inputs" else score.T.contiguous()
        long = pad(turned, (0, -turned.shape[1] % self.m), value=-float("inf"))
        mask = keep_top(long.reshape(-1, self.m), self.n).view(long.shape)[:, : turned.shape[1]]
        return mask if self.along == "inputs" else mask.T
