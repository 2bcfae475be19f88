"""Windows that do not overlap: stretches of a text, or rectangles of an image (Swin, arXiv:2103.14030, section 3.2; SparseViT's dense form)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.block_pattern import Places
from sparsify_compiler.errors import StructureError


@dataclass(frozen=True)
class Windows(Places):
    """Query and key in the same window.

    size    tokens of a window of a text; or (height, width) of one of an image whose rows are `width` tokens long
    width   tokens in a row of the image
    prefix  tokens before the image ([CLS], registers), which read all and are read by all
    before  of a text, windows before its own that a query reads too
    """

    size: int | tuple[int, int]
    width: int | None = None
    prefix: int = 0
    before: int = 0

    def __post_init__(self) -> None:
        sizes = (self.size,) if isinstance(self.size, int) else self.size
        if min(sizes) < 1 or self.prefix < 0 or self.before < 0 or (self.before and len(sizes) == 2):
            raise StructureError(f"a window of {self.size} tokens, {self.prefix} tokens before the image or {self.before} windows before cannot be",
                                 where="Windows")
        if (len(sizes) == 2) != (self.width is not None) or (self.width is not None and self.width < 1):
            raise StructureError(f"a window of an image needs size=(height, width) and the image's width, got {self.size} and {self.width}",
                                 where="Windows", hint="for a text write Windows(size=128)")

    def allows(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        place_q, place_k = q - self.prefix, k - self.prefix
        (down_q, along_q), (down_k, along_k) = self._window(place_q), self._window(place_k)
        same = (down_k <= down_q) & (down_k >= down_q - self.before) & (along_q == along_k)
        return same | (place_q < 0) | (place_k < 0)

    def _window(self, place: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.size, int) or self.width is None:
            return place // self.size, place * 0  # type: ignore[operator]
        return place // self.width // self.size[0], place % self.width // self.size[1]
