"""Who computes what: each worker has panels of x to itself; those left over go to several workers each, with a part of the outputs.

A worker packs what it multiplies: what another has written comes through the slow way between cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsify_compiler.codegen import emit as e


@dataclass(frozen=True)
class Share:
    """A worker's part: `own` panels from `first` on, with all outputs; where `left` is 1, not 0, parts `begin` to `end` of the panel `rest` too."""

    first: Any
    own: Any
    left: Any
    rest: Any
    begin: Any
    end: Any


def share(panels: Any, parts: Any, workers: int, me: Any) -> Share:
    """The part of worker `me`, where y is so many panels of x rows times so many parts of outputs."""
    own = e.opaque(e.floordiv(panels, workers))
    over = e.opaque(panels - own * workers)
    mine = e.opaque(e.floordiv(me * over, workers))
    since = e.opaque(e.floordiv(mine * workers + (over - 1), e.maximum(over, 1)))           # the first worker at this panel
    until = e.opaque(e.floordiv((mine + 1) * workers + (over - 1), e.maximum(over, 1)))     # and who comes after its last
    begin, end = (e.opaque(e.floordiv(parts * (me + i - since), until - since)) for i in range(2))
    return Share(e.opaque(me * own), own, e.opaque(e.minimum(over, 1)), e.opaque(own * workers + mine), begin, end)
