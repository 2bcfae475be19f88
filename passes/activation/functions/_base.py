"""What an activation is given as.

A file holds a function `name(*, options...) -> Activation`; replace_activation(to="name(option=...)") writes it into every FFN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """formula(x, **numbers) of what a linear gives, in plain torch or our `select`.

    numbers  name -> value, which every FFN stores as a float32 scalar of its own
    shift    is subtracted from every output of the linear before, through its bias
    learned  numbers, and the shift of a linear that had no bias, are parameters; buffers otherwise
    up       name of the activation that the up projection of a gated FFN gets; "" for none
    """

    formula: Callable[..., Tensor]
    numbers: Mapping[str, float] = field(default_factory=dict)
    shift: float = 0.0
    learned: bool = False
    up: str = ""
