"""What was decided at one site, and the measurements behind it: a row of the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .planned import Option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Decision:
    """One site's choice. Times are medians in milliseconds at `rows` rows of input, or what `source` says; bytes are of weights and indices.

    A field that was never measured or does not apply stays None and is shown as a dash, never as a number.
    """

    site: str
    kind: str
    shape: tuple[int, ...] = ()  # of the weight, [out, in] for a linear
    dtype: str = ""
    structure: str = "dense"
    density: float = 1.0  # kept / total
    budget: float = 1.0  # density that the allocator asked for
    format: str = "dense"
    kernel: str = "dense"  # name of the kernel variant that runs, or the dense form
    rows: int | None = None  # rows of the input at which the times were measured; of an attention, tokens of one text
    dense_form: str = ""  # which dense form was the fastest, for example "eager fp32"
    dense_ms: float | None = None
    sparse_ms: float | None = None  # the best sparse kernel's time, also when it lost
    compiled_ms: float | None = None  # time of what was chosen
    dense_bytes: int | None = None
    bytes: int | None = None
    reason: str = ""  # why this choice; for a site that stayed dense, why
    merged: int | None = None  # how many ops an exact rewrite made into this one
    flops_before: float | None = None  # of those ops, and below of the one, by the formulas of the cost model
    flops: float | None = None
    moved_before: float | None = None  # bytes read and written
    moved: float | None = None
    source: str = ""  # how its times came about; empty where they were measured on the machine that compiled the model
    predicted_ms: float | None = None  # what the plan assumed of the choice
    loss: float | None = None  # likewise what it costs in quality
    options: list[Option] = field(default_factory=list)  # what the plan could choose from here

    @staticmethod
    def of(site: str, kind: str, weight: Tensor) -> Decision:
        """A row on a weight as it is: dense, of its own bytes."""
        size = weight.numel() * weight.element_size()
        return Decision(site, kind, tuple(weight.shape), str(weight.dtype).removeprefix("torch."), dense_bytes=size, bytes=size)
