"""What a token importance is.

A function `name(region, block, *, options...) -> Asked | str` in a file of its own: the formula of float32 [batch, tokens, 1], the higher the more a
token matters to the block, and the nodes of the region that it is computed of, none of them behind the block's end; or why this block has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, fx

Asked = tuple[Callable[..., Tensor], Mapping[str, fx.Node]]
